"""The report in the terminal: engines as columns, so that it fits 80 of them, efforts as groups of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from puzzle_trtllm.serve.metrics.statistics import Ratio
from puzzle_trtllm.serve.metrics.units import (
    NONE,
    show_bytes,
    show_interval,
    show_number,
    show_percent,
    show_percents,
    show_ratio,
)
from puzzle_trtllm.serve.report.compare import Comparison
from puzzle_trtllm.serve.report.measurement import EngineMeasurement
from puzzle_trtllm.serve.report.summary import Report, headline

Show = Callable[[EngineMeasurement], str]


def report_table(report: Report) -> RenderableType:
    """What `report` prints on stdout."""
    notes = [Text(f"note: {note}", style="yellow") for note in report.notes]
    return Group(engine_table(report), Text(headline(report), style="bold"), *notes)


def engine_table(report: Report) -> Table:
    """One column an engine: what it did, what it is, and then each reasoning effort. Ratios are the child's."""
    table = Table(title=report.title, title_justify="left", title_style="bold")
    table.add_column("")
    for engine in report.engines:
        table.add_column(engine.name, justify="right", style="bold" if engine is report.child else None)
    for label, show in _engine_rows(report.child.kv_sequence_tokens):
        _add_row(table, report, label, show)
    for comparison in report.comparisons:
        for label, ratio in _engine_ratios(comparison):
            _add_ratio(table, report, label, show_ratio(ratio))
    for effort in report.child.efforts:
        table.add_section()
        table.add_row(Text(f"{effort} effort", style="bold"))
        for label, show in _effort_rows(effort):
            _add_row(table, report, label, show)
        for comparison in report.comparisons:
            result = comparison.efforts[effort]
            retention = show_percent(result.accuracy_retention.value)
            _add_ratio(table, report, f"  rate vs {comparison.baseline}", show_ratio(result.relative_request_rate))
            _add_ratio(table, report, "    95% interval", show_interval(result.relative_request_rate) or NONE)
            to_high = show_ratio(result.relative_request_rate_to_high)
            _add_ratio(table, report, "    vs its high effort", to_high)
            _add_ratio(table, report, f"  accuracy vs {comparison.baseline}", retention)
        _add_dominated(table, report, effort)
    return table


def _add_row(table: Table, report: Report, label: str, show: Show) -> None:
    """A row of facts; left out where no engine has the fact."""
    values = [show(engine) for engine in report.engines]
    if any(value != NONE for value in values):
        table.add_row(label, *values)


def _add_ratio(table: Table, report: Report, label: str, ratio: str) -> None:
    table.add_row(label, *(ratio if engine is report.child else "" for engine in report.engines))


def _uncapped(engine: EngineMeasurement) -> str:
    spread = engine.uncapped_output_tokens_per_s
    return show_number(spread.median) if spread else NONE


def _latency(tag: str) -> Show:
    def show(engine: EngineMeasurement) -> str:
        found = engine.latencies.get(tag)
        return f"{show_number(found.p50)} / {show_number(found.p95)}" if found else NONE

    return show


def _add_dominated(table: Table, report: Report, effort: str) -> None:
    """Which engines are beaten in both speed and accuracy at this effort; left out where none is."""
    dominated = {point.engine for point in report.frontier if point.effort == effort and not point.is_on_frontier}
    if dominated:
        words = ("dominated" if engine.name in dominated else "frontier" for engine in report.engines)
        table.add_row("  accuracy and speed", *words)


def _engine_rows(kv_tokens: int) -> Iterator[tuple[str, Show]]:
    """`kv_tokens`: the length of the sequence whose KV bytes are stated."""

    def span(engine: EngineMeasurement) -> str:
        rounds = engine.output_tokens_per_s
        return f"{show_number(rounds.low)} to {show_number(rounds.high)}"

    yield "weights", lambda e: show_bytes(e.weight_bytes)
    yield f"KV cache, {kv_tokens:,} tokens", lambda e: show_bytes(e.kv_bytes_per_sequence)
    yield "memory given", lambda e: NONE if e.memory_bytes is None else show_bytes(e.memory_bytes)
    yield "  sequences that fit", lambda e: NONE if e.sequences_held is None else str(e.sequences_held)
    yield "TTFT ms, p50 / p95", _latency("ttft_ms")
    yield "ITL ms, p50 / p95", _latency("itl_ms")
    yield "tokens/s, median", lambda e: show_number(e.output_tokens_per_s.median)
    yield "  range of rounds", span
    yield "  no memory limit", _uncapped


def _engine_ratios(comparison: Comparison) -> Iterator[tuple[str, Ratio]]:
    yield f"speedup vs {comparison.baseline}", comparison.per_token_speedup
    if comparison.per_gpu_speedup is not None:
        yield "  each GPU or rank", comparison.per_gpu_speedup
    if comparison.uncapped_per_token_speedup is not None:
        yield "  no memory limit", comparison.uncapped_per_token_speedup


def _effort_rows(effort: str) -> Iterator[tuple[str, Show]]:
    def accuracy(engine: EngineMeasurement) -> str:
        result = engine.efforts.get(effort)
        return NONE if result is None else show_percent(result.accuracy)

    def interval(engine: EngineMeasurement) -> str:
        result = engine.efforts.get(effort)
        return NONE if result is None else show_percents(result.accuracy_low, result.accuracy_high)

    def tokens(engine: EngineMeasurement) -> str:
        result = engine.efforts.get(effort)
        return NONE if result is None else f"{result.mean_output_tokens:.1f}"

    def rate(engine: EngineMeasurement) -> str:
        return show_number(engine.requests_per_s(effort)) if effort in engine.efforts else NONE

    yield from (("  accuracy", accuracy), ("  95% interval", interval), ("  tokens/request", tokens))
    yield "  requests/s", rate
