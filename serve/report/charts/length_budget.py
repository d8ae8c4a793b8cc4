"""How much longer the child's answers may be before its speedup is gone: one row a baseline.

Along x the length of the child's answers relative to the baseline's. The bar reaches to the break-even ratio (the
per-token speedup): an effort whose mark lies on the bar answers more requests than the baseline, one beyond it fewer.
"""

from __future__ import annotations

from collections.abc import Sequence

from puzzle_trtllm.axes import Axis
from puzzle_trtllm.serve.metrics.units import show_ratio
from puzzle_trtllm.serve.report.compare import Comparison
from puzzle_trtllm.svg import Drawing

WIDTH, LEFT, RIGHT = 960.0, 190.0, 40.0
BAR, ROW, FOOT = 26.0, 94.0, 56.0
APART = 22.0
"""Marks nearer than this are stacked."""


def length_budget_chart(comparisons: Sequence[Comparison]) -> str | None:
    """None when nothing was evaluated, or no baseline generated anything."""
    shown = [c for c in comparisons if c.efforts and c.break_even_length_ratio.value is not None]
    if not shown:
        return None
    lengths = [r.relative_output_tokens.value or 0 for c in shown for r in c.efforts.values()]
    limits = [c.break_even_length_ratio.value or 0 for c in shown]
    height = ROW * len(shown) + FOOT
    drawing = Drawing(WIDTH, height, label="How long the child's answers may be before its speedup is gone")
    axis = Axis(low=0, high=max([*lengths, *limits, 1.0]) * 1.1, start=LEFT, end=WIDTH - RIGHT)
    for tick in axis.ticks(8):
        drawing.line(axis(tick), 0, axis(tick), height - FOOT + 6, "grid")
        drawing.text(axis(tick), height - FOOT + 22, f"{tick:g}×", "tick", anchor="middle")
    drawing.text((LEFT + WIDTH - RIGHT) / 2, height - 8, "tokens a request, child / baseline", "axis", anchor="middle")
    for index, comparison in enumerate(shown):
        _row(drawing, axis, index * ROW, comparison)
    return drawing.render()


def _row(drawing: Drawing, axis: Axis, top: float, comparison: Comparison) -> None:
    limit = comparison.break_even_length_ratio.value or 0.0
    y = top + 50
    drawing.name(LEFT - 14, y + 10, f"vs {comparison.baseline}", room=LEFT - 20, anchor="end")
    drawing.text(LEFT - 14, y + 26, f"gone at {show_ratio(comparison.break_even_length_ratio)}", "faint", anchor="end")
    hover = f"break-even at {limit:.2f}×"
    drawing.rect(axis(0), y, axis(limit) - axis(0), BAR, "fill pale child", radius=3, hover=hover)
    drawing.line(axis(limit), y - 5, axis(limit), y + BAR + 5, "whisker")
    taken: list[tuple[float, int]] = []
    for effort, result in comparison.efforts.items():
        length = result.relative_output_tokens.value
        if length is None:
            continue
        x = axis(length)
        beside = {level for other, level in taken if abs(x - other) < APART}
        level = next(level for level in range(len(taken) + 1) if level not in beside)
        taken.append((x, level))
        headroom = f"{result.length_headroom:+.0%}" if result.length_headroom is not None else "none"
        hover = f"{effort} effort: {length:.2f}× as long; may change by {headroom} until no request is gained"
        drawing.circle(x, y + BAR / 2 - level * APART, 10, "fill child ring", hover=hover)
        drawing.text(x, y + BAR / 2 + 4.5 - level * APART, effort[:1].upper(), "inside", anchor="middle")
