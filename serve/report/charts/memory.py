"""What the given memory holds: the weights, then one segment for every sequence that fits at its full length.

Drawn only when every engine has a cap and one GPU. Packing is ideal (no block rounding), so a runtime holds a little
less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from puzzle_trtllm.axes import Axis
from puzzle_trtllm.serve.metrics.units import show_bytes
from puzzle_trtllm.serve.report.measurement import EngineMeasurement
from puzzle_trtllm.svg import Drawing

WIDTH, LEFT, RIGHT = 960.0, 190.0, 20.0
BAR, ROW = 34.0, 74.0
MOST_SEGMENTS = 160
"""Above this, single sequences would be thinner than a hair: one segment stands for all."""


def memory_chart(engines: Sequence[EngineMeasurement], styles: Mapping[str, str]) -> str | None:
    """One row an engine; None when it is not known how many sequences one holds."""
    if any(engine.sequences_held is None for engine in engines):
        return None
    drawing = Drawing(WIDTH, 6 + ROW * len(engines), label="What the given memory holds")
    most = max(max(engine.memory_bytes or 0, engine.weight_bytes) for engine in engines)
    axis = Axis(low=0, high=most, start=LEFT, end=WIDTH - RIGHT)
    for index, engine in enumerate(engines):
        _row(drawing, axis, 4 + index * ROW, engine, styles[engine.name])
    return drawing.render()


def _row(drawing: Drawing, axis: Axis, y: float, engine: EngineMeasurement, style: str) -> None:
    held = engine.sequences_held or 0
    cap = engine.memory_bytes or 0
    drawing.name(LEFT - 14, y + 15, engine.name, room=LEFT - 20, anchor="end")
    drawing.text(LEFT - 14, y + 31, f"{show_bytes(cap)} given", "faint", anchor="end")
    drawing.rect(axis(0), y, axis(cap) - axis(0), BAR, "empty", radius=3, hover=f"{show_bytes(cap)} given")
    weights_end = axis(min(engine.weight_bytes, cap))
    hover = f"weights: {show_bytes(engine.weight_bytes)}"
    drawing.rect(axis(0), y, weights_end - axis(0), BAR, f"fill {style}", radius=3, hover=hover)
    _sequences(drawing, axis, y, engine, held, style)
    drawing.text(axis(0), y + BAR + 17, f"weights {show_bytes(engine.weight_bytes)}", "faint")
    sequence = f"{engine.kv_sequence_tokens:,} tokens ({show_bytes(engine.kv_bytes_per_sequence)} each)"
    text = f"room for {held} sequence{'s' if held != 1 else ''} of {sequence}"
    drawing.text(axis(cap), y + BAR + 17, text, "faint", anchor="end")


def _sequences(drawing: Drawing, axis: Axis, y: float, engine: EngineMeasurement, held: int, style: str) -> None:
    size = engine.kv_bytes_per_sequence
    each, segments = (size, held) if held <= MOST_SEGMENTS else (size * held, 1)
    for index in range(segments):
        start = axis(engine.weight_bytes + index * each)
        width = axis(engine.weight_bytes + (index + 1) * each) - start
        inset = min(1.5, width * 0.18)
        hover = f"KV cache of sequence {index + 1}: {show_bytes(size)}" if segments > 1 else f"{held} sequences"
        drawing.rect(start + inset, y, width - 2 * inset, BAR, f"fill pale {style}", radius=2, hover=hover)
