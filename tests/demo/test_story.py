"""The demo, for real but small: every step, six live Triton servers, and the report that users are promised."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.demo.story import ABACUS, run_demo
from puzzle_trtllm.engine import Engine
from puzzle_trtllm.folders import locked_folder
from tests.front_door.cli import assert_user_error, invoke


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "run"
    run_demo(out, quick=True)
    return out


def test_a_folder_that_another_demo_is_writing_is_left_alone(tmp_path):
    """Its engines would be replaced while they are measured."""
    with locked_folder(tmp_path):
        assert_user_error(invoke("demo", "--out", tmp_path, "--quick"), "another process is writing this folder")
    assert list(tmp_path.iterdir()) == []


def test_the_report_holds_what_it_promises(demo):
    report = json.loads((demo / "report.json").read_text())
    for name in ("parent_bf16", "parent_fp8", "child"):
        engine = report[name]
        for key in ("weight_bytes", "kv_bytes_per_sequence", "output_tokens_per_s", "memory_bytes"):
            assert engine[key] > 0, (name, key)
        for effort in ("low", "medium", "high"):
            result = engine["efforts"][effort]
            assert 0 <= result["accuracy"] <= 1
            expected = engine["output_tokens_per_s"] / result["mean_output_tokens"]
            assert result["requests_per_s"] == pytest.approx(expected)
    child = report["child"]
    for comparison, baseline in ((child, "parent_bf16"), (child["vs_parent_fp8"], "parent_fp8")):
        expected = child["output_tokens_per_s"] / report[baseline]["output_tokens_per_s"]
        assert comparison["per_token_speedup"] == pytest.approx(expected)
        for effort, result in comparison["efforts"].items():
            theirs = report[baseline]["efforts"][effort]
            ours = child["efforts"][effort]
            assert result["relative_request_rate"] == pytest.approx(ours["requests_per_s"] / theirs["requests_per_s"])
            if theirs["accuracy"] > 0:
                assert result["accuracy_retention"] == pytest.approx(ours["accuracy"] / theirs["accuracy"])


def test_every_engine_was_given_the_same_memory_and_the_child_needs_less_of_it(demo):
    report = json.loads((demo / "report.json").read_text())
    assert len({report[name]["memory_bytes"] for name in ("parent_bf16", "parent_fp8", "child")}) == 1
    assert report["child"]["weight_bytes"] < report["parent_bf16"]["weight_bytes"]
    by_size = [report[name]["kv_bytes_per_sequence"] for name in ("child", "parent_fp8", "parent_bf16")]
    assert by_size == sorted(by_size)


def test_the_child_is_the_architecture_that_was_asked_for_and_carries_scales(demo):
    wanted = json.loads((ABACUS / "child_architecture.json").read_text())["block_configs"]
    child = Checkpoint.open(demo / "checkpoints" / "child-kv")
    child.validate()
    assert [block.to_json() for block in child.architecture.blocks] == wanted
    assert len(child.kv_scales) == 2 * len(wanted)
    engine = Engine.open(demo / "engines" / "child")
    assert engine.manifest.kv_fold.mode == "tensor"
    assert not Checkpoint.open(engine.model_path).kv_scales


def test_the_page_is_self_contained(demo):
    page = (demo / "report.html").read_text()
    assert "<svg" in page
    assert 'src="http' not in page and 'href="http' not in page
