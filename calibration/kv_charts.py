"""The pictures of kv_report.html: one row of points a layer, in three drawings.

Colours are CSS classes of the page (`unit`, `calibrated`, `channel`, `k`, `v`); hovering shows exact numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

from puzzle_trtllm.axes import Axis
from puzzle_trtllm.calibration.kv_quality import FP8_STORES
from puzzle_trtllm.calibration.kv_report import KvCalibration, LayerReport, ScaleReport
from puzzle_trtllm.kv_scales import E4M3_MAX
from puzzle_trtllm.svg import Drawing, text_width

WIDTH, HEIGHT = 960.0, 300.0
LEFT, RIGHT, TOP, BOTTOM = 74.0, 20.0, 40.0, 44.0


def amax_chart(report: KvCalibration) -> str:
    """The largest K and V of every layer against what E4M3 holds at scale 1."""
    values = [part.amax for layer in report.layers for part in (layer.k, layer.v) if part.amax > 0]
    low, high = min([*values, E4M3_MAX]) / 2, max([*values, E4M3_MAX]) * 2
    y = Axis(low=low, high=high, start=HEIGHT - BOTTOM, end=TOP, logarithmic=True)
    drawing, x = _canvas(report.layers, "Largest K and V by layer", y, "largest magnitude")
    drawing.line(LEFT, y(E4M3_MAX), WIDTH - RIGHT, y(E4M3_MAX), "limit")
    drawing.text(WIDTH - RIGHT, y(E4M3_MAX) - 6, "448: E4M3 at scale 1 cuts off above", "faint", anchor="end")
    for layer in report.layers:
        for kind, part, shift in (("k", layer.k, -4.0), ("v", layer.v, 4.0)):
            if part.amax > 0:
                hover = f"layer {layer.layer}, {kind.upper()}: amax {part.amax:.6g}, scale {part.scale:.6g}"
                drawing.circle(x(layer.layer) + shift, y(part.amax), 5, f"fill {kind}", hover=hover)
    _legend(drawing, ("k", "v"), ("K", "V"))
    return drawing.render()


def snr_chart(report: KvCalibration, kind: str) -> str | None:
    """Signal to noise of K or V by layer and store; None where nothing was measured."""
    parts: list[ScaleReport] = [getattr(layer, kind) for layer in report.layers]
    found = [q.snr_db for part in parts for q in (part.unit, part.calibrated, part.channel) if q is not None]
    values = [value for value in found if value is not None]
    if not values:
        return None
    y = Axis(low=min(0.0, *values), high=max(values) * 1.08 + 1, start=HEIGHT - BOTTOM, end=TOP)
    label = f"Signal to noise of {kind.upper()} by layer"
    drawing, x = _canvas(report.layers, label, y, f"SNR of {kind.upper()}, dB")
    for index, store in enumerate(FP8_STORES):
        for layer, part in zip(report.layers, parts, strict=True):
            quality = getattr(part, store)
            if quality is None or quality.snr_db is None:
                continue
            hover = (
                f"layer {layer.layer}, {store}: {quality.snr_db:.2f} dB, {quality.saturated_share:.3%} cut off, "
                f"{quality.flushed_share:.3%} become zero"
            )
            drawing.circle(x(layer.layer) + 7 * (index - 1), y(quality.snr_db), 4.5, f"fill {store}", hover=hover)
    _legend(drawing, FP8_STORES, FP8_STORES)
    return drawing.render()


def saved_chart(report: KvCalibration) -> str:
    """What FP8 saves by layer at the longest of the report's lengths."""
    length = max(report.saved_bytes, key=int)
    most = max(layer.saved_bytes[length] for layer in report.layers)
    y = Axis(low=0, high=max(most, 1) / 2**20 * 1.08, start=HEIGHT - BOTTOM, end=TOP)
    label = f"MiB that FP8 saves a sequence of {int(length):,} tokens, by layer"
    drawing, x = _canvas(report.layers, label, y, "MiB a sequence")
    width = min(36.0, (WIDTH - LEFT - RIGHT) / len(report.layers) * 0.7)
    for layer in report.layers:
        saved = layer.saved_bytes[length] / 2**20
        window = "full attention" if layer.sliding_window is None else f"window {layer.sliding_window:,}"
        hover = f"layer {layer.layer}, {window}: {saved:.3f} MiB of {report.saved_bytes[length] / 2**20:.3f}"
        top = y(saved)
        drawing.rect(x(layer.layer) - width / 2, top, width, y(0) - top, "fill calibrated", radius=2, hover=hover)
    drawing.text(LEFT, 20, label, "name")
    return drawing.render()


def _canvas(layers: Sequence[LayerReport], label: str, y: Axis, y_title: str) -> tuple[Drawing, Axis]:
    """A drawing with its grid, and the axis from a layer's number to its column."""
    drawing = Drawing(WIDTH, HEIGHT, label=label)
    column = (WIDTH - LEFT - RIGHT) / len(layers)
    x = Axis(low=0, high=len(layers), start=LEFT + column / 2, end=WIDTH - RIGHT + column / 2)
    ticks = y.ticks(5)
    for tick in ticks[:: max(1, len(ticks) // 8)]:
        drawing.line(LEFT, y(tick), WIDTH - RIGHT, y(tick), "grid")
        drawing.text(LEFT - 10, y(tick) + 4, f"{tick:g}", "tick", anchor="end")
    for layer in layers:
        if column >= 18 or layer.layer % 5 == 0:
            drawing.text(x(layer.layer), HEIGHT - BOTTOM + 18, str(layer.layer), "tick", anchor="middle")
    drawing.text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, "layer", "axis", anchor="middle")
    drawing.turned_text(16, (TOP + HEIGHT - BOTTOM) / 2, y_title, "axis")
    return drawing, x


def _legend(drawing: Drawing, styles: Sequence[str], names: Sequence[str]) -> None:
    at = LEFT
    for style, name in zip(styles, names, strict=True):
        drawing.circle(at + 6, 16, 6, f"fill {style}")
        drawing.text(at + 17, 21, name, "name")
        at += 17 + text_width(name, 15) + 26
