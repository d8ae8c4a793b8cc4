"""The comparison as a picture: one self-contained SVG (or the same in an HTML page), nothing to install to see it.

Rows are GPU setups, columns loads, a cell the child's speedup. Blue is where the child is faster, orange where it is
slower, and the darker the more; setups where only the child fits are outlined, those where nothing fits are grey.
"""

from __future__ import annotations

import math
from html import escape
from pathlib import Path

from puzzle_trtllm.build.planner.comparison import Cell, Comparison
from puzzle_trtllm.build.planner.throughput import Load
from puzzle_trtllm.errors import ConfigError
from puzzle_trtllm.folders import write_atomically
from puzzle_trtllm.svg import text_width

CELL_WIDTH, CELL_HEIGHT, LEFT, TOP, BOTTOM = 104, 40, 210, 100, 46
FULL_COLOUR = 2.5
"""Speedup at which the colour is at its darkest."""
SMALL = 11
"""Font size of title and caveat, which may be wider than a map of few loads."""
CAVEAT = "Predicted, not measured: docs/planner.md says how far off."
_FASTER, _SLOWER, _PALE, _GREY = (8, 81, 156), (204, 76, 2), (240, 244, 248), "#e2e2e2"


def heat_map_svg(comparison: Comparison) -> str:
    """The picture as an SVG document."""
    loads = [cell.load for cell in comparison.rows[0]]
    title = comparison.title.split("; ")
    widest = max(text_width(line, SMALL) for line in (*title, CAVEAT))
    width = max(LEFT + CELL_WIDTH * len(loads), math.ceil(16 + widest)) + 20
    height = TOP + CELL_HEIGHT * len(comparison.rows) + BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="13" role="img">',
        f"<title>{escape(comparison.title)}</title>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        _text(16, 24, "Where the child pays", size=17, bold=True),
        *(_text(16, 44 + 16 * i, line, size=SMALL, colour="#555") for i, line in enumerate(title)),
    ]
    parts += [_text(_x(i) + CELL_WIDTH / 2, TOP - 12, load_name(load), middle=True) for i, load in enumerate(loads)]
    for row, cells in enumerate(comparison.rows):
        y = TOP + row * CELL_HEIGHT
        parts.append(_text(16, y + CELL_HEIGHT / 2 + 4, setup_name(cells[0])))
        parts += [_cell(_x(column), y, cell) for column, cell in enumerate(cells)]
    parts.append(_text(16, height - 18, CAVEAT, size=SMALL, colour="#555"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def heat_map_html(comparison: Comparison) -> str:
    """The picture in a page of its own."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Where the child pays</title></head>\n'
        f'<body style="margin:24px">\n{heat_map_svg(comparison)}</body></html>\n'
    )


def write_heat_map(comparison: Comparison, file: str | Path) -> Path:
    """Write the picture, as .svg or .html. Raises ConfigError for another suffix, PuzzleError where it cannot."""
    path = Path(file)
    if path.suffix not in (".svg", ".html"):
        raise ConfigError("unknown kind of picture", key="out", found=path.name, expected="a name in .svg or .html")
    text = heat_map_svg(comparison) if path.suffix == ".svg" else heat_map_html(comparison)
    write_atomically(path, text)
    return path


def load_name(load: Load) -> str:
    """64K/64K."""
    return f"{_short(load.isl)}/{_short(load.osl)}"


def setup_name(cell: Cell) -> str:
    """8 x h100-80gb; says so where the cache is not of the dtype that the title states."""
    plans = [p for p in (cell.child, cell.parent) if p is not None]
    without_fp8 = any(p.setup.gpu.fp8_flops_per_s is None for p in plans)
    return f"{cell.num_gpus} x {cell.gpu}{' (bf16 KV)' if without_fp8 else ''}"


def colour_of(speedup: float | None) -> str:
    """#rrggbb of a cell: pale at 1, blue above, orange below; grey where there is no ratio."""
    if speedup is None:
        return _GREY
    towards = _FASTER if speedup >= 1 else _SLOWER
    distance = (speedup - 1) / (FULL_COLOUR - 1) if speedup >= 1 else (1 / speedup - 1) / (FULL_COLOUR - 1)
    share = min(1.0, distance)
    return "#" + "".join(f"{round(p + (t - p) * share):02x}" for p, t in zip(_PALE, towards, strict=True))


def text_colour_of(speedup: float | None) -> str:
    """Dark on pale, white on dark."""
    dark = speedup is not None and max(speedup, 1 / speedup) > 1 + 0.55 * (FULL_COLOUR - 1)
    return "#fff" if dark else "#111"


def _cell(x: float, y: float, cell: Cell) -> str:
    only_child = cell.child is not None and cell.parent is None
    border = f'stroke="rgb{_FASTER}" stroke-width="2"' if only_child else 'stroke="#fff"'
    box = (
        f'<rect x="{x + 1}" y="{y + 1}" width="{CELL_WIDTH - 2}" height="{CELL_HEIGHT - 2}" rx="4" '
        f'fill="{colour_of(cell.speedup)}" {border}><title>{escape(_tooltip(cell))}</title></rect>'
    )
    middle = _text(
        x + CELL_WIDTH / 2, y + CELL_HEIGHT / 2 + 5, cell.text, middle=True, colour=text_colour_of(cell.speedup)
    )
    return box + middle


def _tooltip(cell: Cell) -> str:
    rates = [
        f"{name}: {p.setup.layout.name}, {p.num_in_flight} in flight, {p.tokens_per_s:,.0f} tok/s"
        for name, p in (("child", cell.child), ("parent", cell.parent))
        if p is not None
    ]
    return "; ".join([f"{setup_name(cell)}, {load_name(cell.load)}", *rates])


def _text(
    x: float, y: float, text: str, *, size: int = 13, bold: bool = False, middle: bool = False, colour: str = "#111"
) -> str:
    weight = ' font-weight="600"' if bold else ""
    anchor = ' text-anchor="middle"' if middle else ""
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}"{weight}{anchor}>{escape(text)}</text>'


def _x(column: int) -> int:
    return LEFT + column * CELL_WIDTH


def _short(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)
