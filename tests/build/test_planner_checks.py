"""The planner against what others published; docs/planner.md shows the same rows with their errors.

Nothing here was fitted but the efficiency, and that on every other row of NVIDIA's table only.
"""

from __future__ import annotations

import math
from importlib.util import module_from_spec, spec_from_file_location
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

from puzzle_trtllm.architecture import PuzzleArchitecture
from puzzle_trtllm.build.planner.assumptions import Assumptions
from puzzle_trtllm.build.planner.checks import (
    Models,
    SpeedupCheck,
    check_allocators,
    check_bytes,
    check_speedups,
    check_throughputs,
    fit_efficiency,
)
from puzzle_trtllm.build.planner.published import ALLOCATOR_LOGS, SPEEDUPS, THROUGHPUTS

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
MODELS = Models(
    parent=PuzzleArchitecture.from_path(DATA / "gpt-oss-120b.config.json"),
    child=PuzzleArchitecture.from_path(DATA / "gpt-oss-puzzle-88b.config.json"),
)


@pytest.fixture(scope="module")
def speedups() -> list[SpeedupCheck]:
    return list(check_speedups(MODELS))


def test_published_bytes_and_parameters_to_the_printed_digit() -> None:
    rows = list(check_bytes(MODELS))
    assert len(rows) == 7
    assert [row for row in rows if not row.agrees] == []


def test_both_allocator_logs_to_the_printed_digit() -> None:
    """A pool that prints as 38.72 GiB is one of 66 block counts, and only 1 in 11 token counts is reachable at all."""
    child, parent = check_allocators(MODELS)
    assert (child.num_tokens, child.concurrency) == (2_819_653, 21.51)
    assert (parent.num_tokens, parent.concurrency) == (857_331, 6.54)
    for check in (child, parent):
        assert check.pool_bytes is not None
        assert round(check.pool_bytes / 2**30, 2) == check.log.pool_gib


def test_other_layouts_do_not_explain_the_log_of_the_child() -> None:
    child, parent = check_allocators(MODELS)
    assert child.by_window_concurrency == pytest.approx(15.09, abs=0.005)
    assert child.ideal_concurrency == pytest.approx(22.5, abs=0.01)
    assert parent.by_window_concurrency == pytest.approx(6.54, abs=0.005)


def test_the_logs_by_independent_arithmetic() -> None:
    """No planner code: vLLM's formula written out for the two layouts, FP8, blocks of 16 tokens."""
    for log, layers, blocks in (
        (ALLOCATOR_LOGS[0], 10, 8192 + 2 * (math.ceil(16511 / 16) + 1) + math.ceil(24575 / 16) + 1),
        (ALLOCATOR_LOGS[1], 18, 8192 + math.ceil(16511 / 16) + 1),
    ):
        pages = [round(log.pool_gib * 2**30 / (16 * 1024 * layers)) + delta for delta in range(-40, 41)]
        assert log.num_tokens in [int(page / blocks * 131072) for page in pages]


def test_the_efficiency_is_the_one_fitted_on_half_of_the_rows() -> None:
    checks = check_throughputs(MODELS)
    assert [check.row for check in checks] == list(THROUGHPUTS)
    assert sum(check.is_fitted for check in checks) == 6
    assert round(fit_efficiency(checks), 3) == Assumptions().efficiency


def test_every_published_row_within_its_stated_error() -> None:
    """As docs/planner.md states them; the other half of the rows tests the fit."""
    checks = check_throughputs(MODELS)
    for check in checks:
        assert check.predicted == pytest.approx(check.roofline * Assumptions().efficiency)
        assert check.roofline > check.row.tokens_per_s_per_gpu  # a roofline that is beaten is no roofline
    worst = max(checks, key=lambda check: abs(check.error))
    assert (worst.row.gpu, worst.row.load.osl, worst.is_fitted) == ("h100-80gb", 1024, True)
    assert abs(worst.error) < 0.60
    tested = [abs(check.error) for check in checks if not check.is_fitted]
    assert max(tested) < 0.23
    assert sum(tested) / len(tested) < 0.15


def test_which_gpu_is_faster_is_predicted_right_but_for_a_tie() -> None:
    checks = check_throughputs(MODELS)
    wrong = []
    for load in {check.row.load for check in checks}:
        rows = [check for check in checks if check.row.load == load]
        by_measured = sorted(rows, key=lambda check: check.row.tokens_per_s_per_gpu)
        wrong += [(a, b) for a, b in pairwise(by_measured) if a.predicted > b.predicted]
    ((slower, faster),) = wrong
    assert (slower.row.gpu, faster.row.gpu, slower.row.load.isl) == ("h100-80gb", "h200-141gb", 1024)
    assert slower.predicted < 1.01 * faster.predicted


def named(speedups: list[SpeedupCheck], name: str) -> list[SpeedupCheck]:
    return [check for check in speedups if check.headline.name == name]


def test_every_headline_is_reproduced_by_some_assumptions(speedups: list[SpeedupCheck]) -> None:
    for headline in SPEEDUPS:
        assert any(check.reproduces for check in named(speedups, headline.name)), headline.name


def test_the_ones_that_reproduce_leave_the_parents_kv_dtype_open(speedups: list[SpeedupCheck]) -> None:
    """1.63x wants an FP8 parent, 2.82x a BF16 one, or an FP8 one of which a single sequence fits into V1's pools."""
    long_on_eight = {c.parent_kv_dtype for c in named(speedups, "8 x H100, 64K/64K") if c.reproduces}
    long_on_one = {(c.parent_kv_dtype, c.allocator) for c in named(speedups, "1 x H100, 64K/64K") if c.reproduces}
    assert (long_on_eight, long_on_one) == ({"fp8"}, {("bf16", "vllm"), ("fp8", "trtllm_v1_tuned")})


def test_no_setting_reproduces_more_than_two_of_the_four(speedups: list[SpeedupCheck]) -> None:
    def common(check: SpeedupCheck) -> tuple[str, ...]:
        return check.parent_kv_dtype, check.allocator, check.memory_rule, check.sequences

    on_one = {(common(c), c.headline.name) for c in speedups if c.headline.num_gpus == 1 and c.reproduces}
    scores: dict[tuple[str, ...], int] = {}
    for check in speedups:
        if check.headline.num_gpus == 8:
            key = (*common(check), check.layout)
            scores.setdefault(key, sum(setting == common(check) for setting, _ in on_one))
            scores[key] += check.reproduces
    assert max(scores.values()) == 2


def test_combinations_that_do_not_fit_are_said_to(speedups: list[SpeedupCheck]) -> None:
    parent_at_256 = [c for c in named(speedups, "8 x H100, 64K/64K") if c.sequences == "256"]
    assert len(parent_at_256) == 60
    assert all(c.ratio is None and not c.reproduces for c in parent_at_256)


def tables_module() -> ModuleType:
    spec = spec_from_file_location("planner_tables", ROOT / "tests" / "bench" / "planner_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_shows_these_very_rows(speedups: list[SpeedupCheck], monkeypatch: pytest.MonkeyPatch) -> None:
    tables = tables_module()
    assert tables.models() == MODELS
    monkeypatch.setattr(tables, "check_speedups", lambda _: speedups)  # of these models: computed once in this file
    page = (ROOT / "docs" / "planner.md").read_text(encoding="utf-8")
    assert page == tables.with_tables(page), "run: python tests/bench/planner_tables.py --write"
    drawn = (ROOT / "docs" / "planner-map.svg").read_text(encoding="utf-8")
    assert drawn == tables.picture(), "run: python tests/bench/planner_tables.py --write"
