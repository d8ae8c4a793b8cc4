"""The layer map: what Puzzle chose for every layer, over what the parent has there.

Upper bars: routed experts (the parent's count as an outline). Lower bars, hanging down: the attention window, on a
logarithmic scale, since windows differ by factors of 64; a full-attention layer reaches the bottom and is drawn solid.
"""

from __future__ import annotations

from collections import Counter

from puzzle_trtllm.axes import Axis
from puzzle_trtllm.serve.report.measurement import EngineMeasurement, LayerBlock
from puzzle_trtllm.svg import Drawing

WIDTH, LEFT, RIGHT = 960.0, 120.0, 10.0
TOP, EXPERTS, MIDDLE, WINDOWS = 10.0, 130.0, 30.0, 110.0
LABELLED_COLUMN = 26.0
"""Column width from which a number fits over each bar."""


def layer_map(child: EngineMeasurement, parent: EngineMeasurement) -> str:
    """Columns are layers; both engines have the same number of them."""
    height = TOP + EXPERTS + MIDDLE + WINDOWS + 40
    drawing = Drawing(WIDTH, height, label=f"Experts and attention window of each layer of {child.name}")
    column = (WIDTH - LEFT - RIGHT) / len(child.blocks)
    experts = Axis(low=0, high=max(block.num_local_experts for block in parent.blocks), start=TOP + EXPERTS, end=TOP)
    windows = _window_axis([*child.blocks, *parent.blocks])
    drawing.text(LEFT - 14, TOP + 18, "experts", "name", anchor="end")
    drawing.text(LEFT - 14, TOP + 36, f"of {experts.high:g}", "faint", anchor="end")
    drawing.text(LEFT - 14, windows.start + 18, "window", "name", anchor="end")
    drawing.text(LEFT - 14, windows.start + 36, "tokens, log", "faint", anchor="end")
    drawing.text(LEFT - 14, TOP + EXPERTS + 20, "layer", "faint", anchor="end")
    for layer, (ours, theirs) in enumerate(zip(child.blocks, parent.blocks, strict=True)):
        x = LEFT + layer * column
        hover = f"layer {layer}: {_describe(ours)}; parent {_describe(theirs)}"
        _experts_bar(drawing, x, column, experts, ours, theirs, hover)
        _window_bar(drawing, x, column, windows, ours, theirs, hover)
        if column >= 14 or layer % 5 == 0:
            drawing.text(x + column / 2, TOP + EXPERTS + 20, str(layer), "tick", anchor="middle")
    drawing.text(LEFT, height - 8, _totals(child), "faint")
    return drawing.render()


def _totals(child: EngineMeasurement) -> str:
    """How often each expert count and each window occurs."""
    experts = Counter(block.num_local_experts for block in child.blocks)
    windows = Counter(block.sliding_window for block in child.blocks)
    of_experts = ", ".join(f"{count} × {experts[count]}" for count in sorted(experts, reverse=True))
    sizes = [*sorted(window for window in windows if window is not None), *([None] if None in windows else [])]
    of_windows = ", ".join(f"{_short(size)} × {windows[size]}" for size in sizes)
    return f"experts × layers: {of_experts}    ·    window × layers: {of_windows}"


def _window_axis(blocks: list[LayerBlock]) -> Axis:
    sizes = [block.sliding_window for block in blocks if block.sliding_window is not None] or [1]
    start = TOP + EXPERTS + MIDDLE
    # Full attention takes the last quarter, so that even the longest window is visibly shorter.
    return Axis(low=min(sizes) / 4, high=max(sizes), start=start, end=start + WINDOWS * 0.75, logarithmic=True)


def _describe(block: LayerBlock) -> str:
    window = "full attention" if block.sliding_window is None else f"window {block.sliding_window:,}"
    return f"{block.num_local_experts} experts, {window}"


def _bar_x(x: float, column: float) -> tuple[float, float]:
    """Left edge and width of a bar that leaves a sixth of its column free, at most 64 wide."""
    width = min(column * 0.84, 64.0)
    return x + (column - width) / 2, width


def _experts_bar(
    drawing: Drawing, x: float, column: float, axis: Axis, ours: LayerBlock, theirs: LayerBlock, hover: str
) -> None:
    left, width = _bar_x(x, column)
    top = axis(theirs.num_local_experts)
    drawing.rect(left, top, width, axis.start - top, "ghost", radius=3, hover=hover)
    top = axis(ours.num_local_experts)
    drawing.rect(left, top, width, axis.start - top, "fill child", radius=3, hover=hover)
    if column >= LABELLED_COLUMN:
        drawing.text(x + column / 2, top + 16, str(ours.num_local_experts), "inside", anchor="middle")


def _window_bar(
    drawing: Drawing, x: float, column: float, axis: Axis, ours: LayerBlock, theirs: LayerBlock, hover: str
) -> None:
    left, width = _bar_x(x, column)
    drawing.rect(left, axis.start, width, _depth(axis, theirs), "ghost", radius=3, hover=hover)
    css = "fill child" if ours.sliding_window is None else "fill pale child"
    drawing.rect(left, axis.start, width, _depth(axis, ours), css, radius=3, hover=hover)
    if column >= LABELLED_COLUMN:
        css = "inside" if ours.sliding_window is None else "value small"
        drawing.text(x + column / 2, axis.start + 16, _short(ours.sliding_window), css, anchor="middle")


def _depth(axis: Axis, block: LayerBlock) -> float:
    return WINDOWS if block.sliding_window is None else axis(block.sliding_window) - axis.start


def _short(window: int | None) -> str:
    if window is None:
        return "full"
    return f"{window // 1024}K" if window >= 1024 and window % 1024 == 0 else str(window)
