"""A report's content, put together once for the terminal, the page and report.json, and its headline in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from puzzle_trtllm.serve.metrics.units import show_bytes, show_percent, show_ratio
from puzzle_trtllm.serve.report.compare import Comparison
from puzzle_trtllm.serve.report.frontier import FrontierPoint
from puzzle_trtllm.serve.report.measurement import EngineMeasurement

BASELINE_COLOURS = 4
"""s0 to s3 in page.html.jinja."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Engines in the order they are shown, and the child's comparisons in the order of the baselines."""

    title: str
    engines: tuple[EngineMeasurement, ...]
    child: EngineMeasurement
    comparisons: tuple[Comparison, ...]
    notes: tuple[str, ...]
    frontier: tuple[FrontierPoint, ...] = ()

    def engine(self, name: str) -> EngineMeasurement:
        return next(engine for engine in self.engines if engine.name == name)

    @property
    def first(self) -> Comparison:
        """Against the first baseline: what headlines are about."""
        return self.comparisons[0]

    @property
    def styles(self) -> dict[str, str]:
        """Engine name -> CSS class of its colour; the page has BASELINE_COLOURS of them, then they come again."""
        others = [engine.name for engine in self.engines if engine is not self.child]
        colours = {name: f"s{index % BASELINE_COLOURS}" for index, name in enumerate(others)}
        return {self.child.name: "child", **colours}


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One headline figure."""

    figure: str
    caption: str
    detail: str


def headline_tiles(report: Report) -> list[Tile]:
    """The figures at the top of the page, against the first baseline; what was not measured gives no tile."""
    first, child = report.first, report.child
    baseline = report.engine(first.baseline)
    tiles = [
        Tile(
            figure=show_ratio(first.per_token_speedup),
            caption="tokens per second",
            detail=_range_text(first) or f"against {baseline.name}",
        )
    ]
    if first.efforts:
        effort = list(first.efforts)[-1]
        result = first.efforts[effort]
        ours, theirs = child.efforts[effort], baseline.efforts[effort]
        tiles.append(
            Tile(
                figure=show_ratio(result.relative_request_rate),
                caption=f"requests per second, {effort} effort",
                detail=f"{ours.mean_output_tokens:.0f} tokens a request against {theirs.mean_output_tokens:.0f}",
            )
        )
        tiles.append(
            Tile(
                figure=show_percent(result.accuracy_retention.value),
                caption=f"accuracy retained, {effort} effort",
                detail=f"{ours.accuracy:.1%} against {theirs.accuracy:.1%}",
            )
        )
    tiles.append(_bytes_tile("weights", child.weight_bytes, baseline.weight_bytes))
    tiles.append(_bytes_tile("KV cache of a sequence", child.kv_bytes_per_sequence, baseline.kv_bytes_per_sequence))
    return tiles


def _bytes_tile(caption: str, ours: int, theirs: int) -> Tile:
    return Tile(
        figure=f"{ours / theirs - 1:+.0%}".replace("-", "−"),
        caption=caption,
        detail=f"{show_bytes(ours)} against {show_bytes(theirs)}",
    )


def _range_text(comparison: Comparison) -> str:
    low, high = comparison.per_token_speedup_range or (0.0, 0.0)
    if low == high:  # a single round has no range
        return ""
    return f"{low:.2f}× to {high:.2f}× over rounds"


def headline(report: Report) -> str:
    """The result in two or three plain sentences, nothing but what was measured."""
    return " ".join([*_throughput_sentences(report), *_effort_sentences(report)])


def _throughput_sentences(report: Report) -> Sequence[str]:
    first, child = report.first, report.child
    given = ""
    if child.memory_bytes is not None and child.memory_bytes == report.engine(first.baseline).memory_bytes:
        each = " on each GPU" if child.num_ranks > 1 else ""
        given = f"Given {show_bytes(child.memory_bytes)}{each} for weights and KV cache, "
    others = [f"{show_ratio(c.per_token_speedup)} those of {c.baseline}" for c in report.comparisons[1:]]
    against = " and ".join(
        [f"{show_ratio(first.per_token_speedup)} the tokens per second of {first.baseline}", *others]
    )
    sentences = [f"{given}{child.name} generates {against}."]
    if first.per_gpu_speedup is not None:
        each = show_ratio(first.per_gpu_speedup)
        sentences.append(f"For each GPU or rank the ratio to {first.baseline} is {each}.")
    if first.uncapped_per_token_speedup is not None:
        ratio = show_ratio(first.uncapped_per_token_speedup)
        sentences.append(f"Without a memory limit the ratio to {first.baseline} is {ratio}.")
    return sentences


def _effort_sentences(report: Report) -> Sequence[str]:
    first = report.first
    if not first.efforts:
        return []
    effort, result = list(first.efforts.items())[-1]
    retention = result.accuracy_retention.value
    kept = "" if retention is None else f" and keeps {show_percent(retention)} of its accuracy"
    rate = show_ratio(result.relative_request_rate)
    return [f"At {effort} effort it answers {rate} the requests of {first.baseline}{kept}."]
