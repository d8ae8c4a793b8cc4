"""Tokens per second of every engine: a bar to the median, a whisker over the range, a dot a round.

Where an engine was also measured without the memory cap, a paler bar stands under it: the pair shows how much of a gain
is memory (more sequences at once) and how much is arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from puzzle_trtllm.axes import Axis
from puzzle_trtllm.serve.metrics.statistics import Spread
from puzzle_trtllm.serve.metrics.units import show_number, show_ratio
from puzzle_trtllm.serve.report.compare import Comparison
from puzzle_trtllm.serve.report.measurement import EngineMeasurement
from puzzle_trtllm.svg import Drawing

WIDTH, LEFT, RIGHT = 960.0, 190.0, 175.0
BAR, THIN_BAR, GAP = 30.0, 16.0, 26.0


def throughput_chart(
    engines: Sequence[EngineMeasurement], styles: Mapping[str, str], comparisons: Sequence[Comparison]
) -> str:
    """One row an engine; ratios are against the first comparison's baseline."""
    has_uncapped = any(engine.uncapped_output_tokens_per_s for engine in engines)
    row = BAR + (THIN_BAR + 4 if has_uncapped else 0) + GAP
    height = 34 + row * len(engines)
    drawing = Drawing(WIDTH, height, label="Output tokens per second by engine")
    spreads = [s for e in engines for s in (e.output_tokens_per_s, e.uncapped_output_tokens_per_s) if s]
    axis = Axis(low=0, high=max(s.high for s in spreads) * 1.02, start=LEFT, end=WIDTH - RIGHT)
    for tick in axis.ticks():
        drawing.line(axis(tick), 0, axis(tick), height - 30, "grid")
        drawing.text(axis(tick), height - 12, show_number(tick) if tick else "0", "tick", anchor="middle")
    first = comparisons[0]
    for index, engine in enumerate(engines):
        y = 8 + index * row
        style = styles[engine.name]
        drawing.name(LEFT - 14, y + 14, engine.name, room=LEFT - 20, anchor="end")
        drawing.text(LEFT - 14, y + 30, _subtitle(engine), "faint", anchor="end")
        is_child = style == "child"
        speedup = f" · {show_ratio(first.per_token_speedup)}" if is_child else ""
        _bar(drawing, axis, y, BAR, engine.output_tokens_per_s, f"fill {style}", speedup)
        if engine.uncapped_output_tokens_per_s:
            uncapped = f" · {show_ratio(first.uncapped_per_token_speedup)}" if is_child else ""
            _bar(
                drawing,
                axis,
                y + BAR + 4,
                THIN_BAR,
                engine.uncapped_output_tokens_per_s,
                f"fill pale {style}",
                f" uncapped{uncapped}",
            )
    return drawing.render()


def _subtitle(engine: EngineMeasurement) -> str:
    held = f" · room for {engine.sequences_held}" if engine.sequences_held is not None else ""
    return f"{engine.kv_dtype.upper()} KV{held}"


def _bar(drawing: Drawing, axis: Axis, y: float, height: float, spread: Spread, css: str, note: str) -> None:
    rounds = ", ".join(show_number(value) for value in spread.rounds)
    hover = f"median {show_number(spread.median)} tok/s; rounds {rounds}"
    drawing.rect(axis(0), y, axis(spread.median) - axis(0), height, css, radius=3, hover=hover)
    middle = y + height / 2
    drawing.line(axis(spread.low), middle, axis(spread.high), middle, "whisker")
    for value in spread.rounds:
        drawing.circle(axis(value), middle, 3 if height >= BAR else 2, "dot", hover=f"{show_number(value)} tok/s")
    big = height >= BAR
    x = axis(max(spread.high, spread.median)) + 10
    unit = " tok/s" if big else ""
    drawing.text(
        x, middle + (5 if big else 4), f"{show_number(spread.median)}{unit}{note}", "value" if big else "faint"
    )
