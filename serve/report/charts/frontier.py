"""The accuracy-speed frontier: one curve an engine, one point a reasoning effort (L, M, H).

Along x the request rate relative to the first baseline at its highest effort, logarithmic, since low effort writes many
times fewer tokens; along y the accuracy with its 95% interval. Up and to the right is better: where the child's curve
lies right of its parent's, it answers more requests at the same accuracy. Dominated points are hollow, and a dashed
line runs through the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from puzzle_trtllm.axes import Axis
from puzzle_trtllm.serve.metrics.units import show_number
from puzzle_trtllm.serve.report.frontier import FrontierPoint
from puzzle_trtllm.serve.report.measurement import EngineMeasurement
from puzzle_trtllm.svg import NAME_PX, Drawing, text_width

WIDTH, HEIGHT = 960.0, 450.0
LEFT, RIGHT, TOP, BOTTOM = 74.0, 30.0, 64.0, 62.0
LOG_ABOVE = 3.0
"""Ratio of largest to smallest rate from which a linear axis would squeeze the slow points."""


def frontier_chart(
    engines: Sequence[EngineMeasurement],
    styles: Mapping[str, str],
    *,
    baseline: EngineMeasurement,
    frontier: Sequence[FrontierPoint] = (),
) -> str | None:
    """None when nothing was evaluated, or an engine generated nothing."""
    efforts = list(baseline.efforts)
    speeds = {(e.name, effort): e.requests_per_s(effort) for e in engines for effort in e.efforts}
    if not efforts or min(speeds.values()) <= 0:
        return None
    unit = baseline.requests_per_s(efforts[-1])
    rates = {point: speed / unit for point, speed in speeds.items()}
    drawing = Drawing(WIDTH, HEIGHT, label="Accuracy against relative request rate by reasoning effort")
    x, y = _axes(list(rates.values()))
    _grid(drawing, x, y, f"request rate relative to {baseline.name} at {efforts[-1]} effort")
    _legend(drawing, engines, styles)
    best = sorted((p.requests_per_s / unit, p.accuracy) for p in frontier if p.is_on_frontier)
    drawing.polyline([(x(rate), y(accuracy)) for rate, accuracy in best], "front")
    dominated = {(point.engine, point.effort): point for point in frontier if not point.is_on_frontier}
    for engine in engines:
        points = [(effort, x(rates[engine.name, effort])) for effort in engine.efforts]
        _curve(drawing, engine, points, y, styles[engine.name], rates, dominated)
    return drawing.render()


def _axes(rates: list[float]) -> tuple[Axis, Axis]:
    low, high = min(rates), max(rates)
    logarithmic = high / low > LOG_ABOVE
    span = (low / 1.35, high * 1.35) if logarithmic else (0.0, high * 1.12)
    x = Axis(low=span[0], high=span[1], start=LEFT, end=WIDTH - RIGHT, logarithmic=logarithmic)
    return x, Axis(low=0.0, high=1.03, start=HEIGHT - BOTTOM, end=TOP)


def _grid(drawing: Drawing, x: Axis, y: Axis, x_title: str) -> None:
    for tick in y.ticks(6):
        drawing.line(LEFT, y(tick), WIDTH - RIGHT, y(tick), "grid")
        drawing.text(LEFT - 10, y(tick) + 4, f"{tick:.0%}", "tick", anchor="end")
    for tick in x.ticks(8):
        drawing.line(x(tick), TOP, x(tick), HEIGHT - BOTTOM, "grid")
        drawing.text(x(tick), HEIGHT - BOTTOM + 19, f"{tick:g}×", "tick", anchor="middle")
    drawing.text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14, x_title, "axis", anchor="middle")
    drawing.turned_text(20, (TOP + HEIGHT - BOTTOM) / 2, "accuracy", "axis")


def _legend(drawing: Drawing, engines: Sequence[EngineMeasurement], styles: Mapping[str, str]) -> None:
    widths = [text_width(engine.name, NAME_PX) for engine in engines]
    share = min(1.0, (WIDTH - RIGHT - LEFT - 46 * len(engines)) / sum(widths))
    at = LEFT
    for engine, width in zip(engines, widths, strict=True):
        drawing.circle(at + 7, 16, 7, f"fill {styles[engine.name]}")
        drawing.name(at + 20, 21, engine.name, room=width * share)
        at += 20 + width * share + 26
    drawing.text(WIDTH - RIGHT, 46, "L M H: low, medium, high effort; hollow: dominated", "faint", anchor="end")


def _curve(
    drawing: Drawing,
    engine: EngineMeasurement,
    points: list[tuple[str, float]],
    y: Axis,
    style: str,
    rates: Mapping[tuple[str, str], float],
    dominated: Mapping[tuple[str, str], FrontierPoint],
) -> None:
    drawing.polyline([(px, y(engine.efforts[effort].accuracy)) for effort, px in points], f"stroke {style}")
    for effort, px in points:
        result = engine.efforts[effort]
        drawing.line(px, y(result.accuracy_low), px, y(result.accuracy_high), f"stroke thin {style}")
        rate = show_number(rates[engine.name, effort])
        hover = (
            f"{engine.name}, {effort} effort: accuracy {result.accuracy:.1%} ({result.accuracy_low:.1%} to "
            f"{result.accuracy_high:.1%}), {show_number(engine.requests_per_s(effort))} requests/s ({rate}×), "
            f"{result.mean_output_tokens:.1f} tokens a request"
        )
        point = dominated.get((engine.name, effort))
        shape, letter = ("fill", "inside") if point is None else ("hollow", "inside hollow-letter")
        if point is not None:
            hover += "; dominated by " + ", ".join(f"{name} at {other}" for name, other in point.dominated_by)
        drawing.circle(px, y(result.accuracy), 10, f"{shape} {style} ring", hover=hover)
        drawing.text(px, y(result.accuracy) + 4.5, effort[:1].upper(), letter, anchor="middle")
