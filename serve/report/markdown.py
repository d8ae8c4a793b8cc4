"""report.md: the comparison for a pull request, a README or a ticket; the same numbers as report.json, rounded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
from puzzle_trtllm.serve.report.summary import Report, headline


def render_markdown(report: Report) -> str:
    """The Markdown text of a report."""
    parts = [f"# {_escape(report.title)}", _escape(headline(report)), *_notes(report), _engines(report)]
    if report.child.efforts:
        parts += ["## By reasoning effort", _efforts(report)]
        for comparison in report.comparisons:
            parts += [f"## {_escape(report.child.name)} against {_escape(comparison.baseline)}", _ratios(comparison)]
        parts += ["## Accuracy-speed frontier", _frontier(report)]
    parts.append("Intervals are 95%, bootstrapped over problems and rounds. How each number is defined: report.json.")
    return "\n\n".join(parts) + "\n"


def _notes(report: Report) -> Iterator[str]:
    if report.notes:
        yield "\n".join(f"> - {_escape(note)}" for note in report.notes)


def _engines(report: Report) -> str:
    rows = [
        [
            engine.name,
            show_bytes(engine.weight_bytes),
            show_bytes(engine.kv_bytes_per_sequence),
            NONE if engine.sequences_held is None else str(engine.sequences_held),
            f"{show_number(engine.output_tokens_per_s.median)} ({show_number(engine.output_tokens_per_s.low)} to "
            f"{show_number(engine.output_tokens_per_s.high)})",
        ]
        for engine in report.engines
    ]
    kv = f"KV of {report.child.kv_sequence_tokens:,} tokens"
    return _table(["engine", "weights", kv, "sequences that fit", "tokens/s (range of rounds)"], rows)


def _efforts(report: Report) -> str:
    rows = []
    for effort in report.child.efforts:
        for engine in report.engines:
            result = engine.efforts.get(effort)
            if result is not None:
                interval = show_percents(result.accuracy_low, result.accuracy_high)
                accuracy = f"{show_percent(result.accuracy)} ({interval})"
                tokens = f"{result.mean_output_tokens:.1f}"
                rows.append([effort, engine.name, accuracy, tokens, show_number(engine.requests_per_s(effort))])
    return _table(["effort", "engine", "accuracy", "tokens a request", "requests/s"], rows)


def _ratios(comparison: Comparison) -> str:
    rows = [["", "tokens/s", _with_interval(comparison.per_token_speedup)]]
    if comparison.per_gpu_speedup is not None:
        rows.append(["", "tokens/s, each GPU or rank", _with_interval(comparison.per_gpu_speedup)])
    break_even = show_ratio(comparison.break_even_length_ratio)
    rows.append(["", "break-even length ratio", f"{break_even} the baseline's tokens a request"])
    for effort, result in comparison.efforts.items():
        headroom = NONE if result.length_headroom is None else f"{result.length_headroom:+.0%}"
        rows += [
            [effort, "requests/s, same effort", _with_interval(result.relative_request_rate)],
            [effort, "requests/s, to its high effort", _with_interval(result.relative_request_rate_to_high)],
            [effort, "tokens a request", _with_interval(result.relative_output_tokens)],
            [effort, "length headroom", headroom],
            [effort, "accuracy retained", _with_interval(result.accuracy_retention)],
        ]
    return _table(["effort", "child / baseline", "ratio (95% interval)"], rows)


def _frontier(report: Report) -> str:
    rows = []
    for point in report.frontier:
        by = ", ".join(f"{engine} {effort}" for engine, effort in point.dominated_by)
        share = NONE if point.dominated_share is None else f"{point.dominated_share:.0%}"
        verdict = f"dominated by {by}" if by else "on the frontier"
        rows.append(
            [
                point.engine,
                point.effort,
                show_percent(point.accuracy),
                show_number(point.requests_per_s),
                verdict,
                share,
            ]
        )
    return _table(["engine", "effort", "accuracy", "requests/s", "", "dominated in resamples"], rows)


def _with_interval(ratio: Ratio) -> str:
    if ratio.value is None:
        return f"{NONE} ({ratio.reason})"
    interval = show_interval(ratio)
    return show_ratio(ratio) + (f" ({interval})" if interval else "")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_escape(cell) for cell in line) + " |" for line in lines)


def _escape(text: str) -> str:
    """So that a name cannot break a table or become markup."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("`", "\\`")
