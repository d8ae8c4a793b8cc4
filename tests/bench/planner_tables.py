"""Tables and picture of docs/planner.md, from the planner itself: `python tests/bench/planner_tables.py [--write]`.

Everything between the two markers of the page is replaced; a test holds page and picture to what this makes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from statistics import mean

from puzzle_trtllm.architecture import PuzzleArchitecture
from puzzle_trtllm.build.planner.assumptions import Assumptions, explain_assumptions
from puzzle_trtllm.build.planner.checks import (
    SPEEDUP_ALLOCATORS,
    AllocatorCheck,
    Models,
    SpeedupCheck,
    check_allocators,
    check_bytes,
    check_speedups,
    check_throughputs,
    fit_efficiency,
)
from puzzle_trtllm.build.planner.comparison import compare
from puzzle_trtllm.build.planner.heat_map import heat_map_svg
from puzzle_trtllm.gpus import load_gpus

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "planner.md"
PICTURE = ROOT / "docs" / "planner-map.svg"
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


def models() -> Models:
    """From the two published configs."""
    data = ROOT / "tests" / "data"
    return Models(
        parent=PuzzleArchitecture.from_path(data / "gpt-oss-120b.config.json"),
        child=PuzzleArchitecture.from_path(data / "gpt-oss-puzzle-88b.config.json"),
    )


def render() -> str:
    """All tables, Markdown."""
    m = models()
    parts = (byte_lines(m), allocator_lines(m), throughput_lines(m), speedup_lines(m), assumption_lines())
    return "\n".join(line for part in parts for line in part)


def byte_lines(m: Models) -> Iterator[str]:
    yield "## Bytes and parameters\n"
    rows = [(row.what, row.published, row.predicted, "none" if row.agrees else "DIFFERS") for row in check_bytes(m)]
    yield from table(("what", "published", "ours", "error"), rows)


def allocator_lines(m: Models) -> Iterator[str]:
    yield "\n## Two public allocator logs\n"
    rows = [
        (
            c.log.model,
            f"{c.log.pool_gib} GiB, {c.log.num_tokens:,} tokens, {c.log.concurrency}",
            _blocks(c),
            "none" if c.concurrency == c.log.concurrency else "DIFFERS",
            f"{c.by_window_concurrency:.2f}",
            f"{c.ideal_concurrency:.2f}",
        )
        for c in check_allocators(m)
    ]
    heads = ("model", "log", "ours (`vllm`)", "error", "concurrent under `vllm_by_window`", "without blocks or padding")
    yield from table(heads, rows)


def throughput_lines(m: Models) -> Iterator[str]:
    checks = check_throughputs(m)
    yield "\n## NVIDIA's published rows for gpt-oss-120b\n"
    yield f"Efficiency fitted on the rows marked *fit*: {fit_efficiency(checks):.3f}.\n"
    rows = [
        (
            f"{c.row.gpu} {c.row.layout}",
            f"{c.row.load.isl}/{c.row.load.osl}",
            c.row.kv_dtype,
            "fit" if c.is_fitted else "**test**",
            f"{c.row.tokens_per_s_per_gpu:,.0f}",
            f"{c.roofline:,.0f}",
            f"{c.predicted:,.0f}",
            f"{c.error:+.0%}",
            f"{c.batch_per_gpu:.0f}",
            c.bound,
        )
        for c in checks
    ]
    heads = ("setup", "ISL/OSL", "KV (assumed)", "row", "published", "roofline", "predicted", "error", "batch", "bound")
    yield from table(heads, rows)
    tested, fitted = ([abs(c.error) for c in checks if c.is_fitted is kind] for kind in (False, True))
    yield f"\nMean absolute error: {mean(tested):.0%} on the {len(tested)} test rows (largest {max(tested):.0%}),"
    yield f"{mean(fitted):.0%} on the {len(fitted)} fitted rows (largest {max(fitted):.0%})."


def speedup_lines(m: Models) -> Iterator[str]:
    yield "\n## The paper's speedups"
    checks = list(check_speedups(m))
    for _, group in groupby(checks, key=lambda c: c.headline.name):
        rows = list(group)
        headline = rows[0].headline
        fitting = [c for c in rows if c.ratio is not None]
        hits = [c for c in fitting if c.reproduces]
        yield f"\n### {headline.name}: {headline.ratio}x{f' ({headline.note})' if headline.note else ''}\n"
        missing = len(rows) - len(fitting)
        yield f"{len(hits)} of {len(rows)} combinations are within 5%; {missing} do not fit in memory.\n"
        heads = [f"{dtype} {allocator}" for dtype in ("bf16", "fp8") for allocator in SPEEDUP_ALLOCATORS]
        keys = list(dict.fromkeys((c.layout, c.memory_rule, c.sequences) for c in rows))
        yield from table(
            ("layout", "memory", "in flight", *heads),
            [(*key, *[_ratio(rows, key, *head.split()) for head in heads]) for key in keys],
        )
    yield from agreement_lines(checks)


def agreement_lines(checks: Sequence[SpeedupCheck]) -> Iterator[str]:
    """How many of the four headlines one and the same setting reproduces."""
    one_gpu: dict[tuple[str, ...], set[str]] = {}
    settings: dict[tuple[str, ...], set[str]] = {}
    for c in checks:
        common = (c.parent_kv_dtype, c.allocator, c.memory_rule, c.sequences)
        if c.headline.num_gpus == 1:
            one_gpu.setdefault(common, set()).update({c.headline.name} if c.reproduces else ())
        else:
            settings.setdefault((*common, c.layout), set()).update({c.headline.name} if c.reproduces else ())
    scores = {key: names | one_gpu[key[:4]] for key, names in settings.items()}
    most = max(len(names) for names in scores.values())
    yield "\n### One setting for all four\n"
    yield f"No setting reproduces all four. The most is {most}:\n"
    rows = [(*key, "; ".join(sorted(names))) for key, names in scores.items() if len(names) == most]
    yield from table(("parent KV", "allocator", "memory", "in flight", "layout on 8", "within 5%"), rows)


def assumption_lines() -> Iterator[str]:
    yield "\n## Assumptions\n"
    rows = [(f"`{name}`", str(value), reason) for name, value, reason in explain_assumptions(Assumptions())]
    yield from table(("name", "value", "because"), rows)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A Markdown table."""
    yield f"| {' | '.join(heads)} |"
    yield f"|{' --- |' * len(heads)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _blocks(c: AllocatorCheck) -> str:
    if c.num_blocks is None or c.pool_bytes is None:
        return "no whole number of blocks fits"
    return f"{c.num_blocks:,} blocks ({c.pool_bytes / 2**30:.2f} GiB), {c.num_tokens:,} tokens, {c.concurrency}"


def _ratio(rows: Sequence[SpeedupCheck], key: tuple[str, str, str], dtype: str, allocator: str) -> str:
    found = next(
        c
        for c in rows
        if (c.layout, c.memory_rule, c.sequences, c.parent_kv_dtype, c.allocator) == (*key, dtype, allocator)
    )
    if found.ratio is None:
        return "-"
    return f"**{found.ratio:.2f}**" if found.reproduces else f"{found.ratio:.2f}"


def picture() -> str:
    """The heat map of the 88B child."""
    m = models()
    return heat_map_svg(compare(m.parent, m.child, gpus=load_gpus()))


def with_tables(page: str) -> str:
    """The page with fresh tables between its markers."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{render()}\n{END}{after}"


if __name__ == "__main__":
    if "--write" in sys.argv:
        PICTURE.write_text(picture(), encoding="utf-8")
        PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(render())
