"""A drawing: shapes in the order they are added, every text escaped."""

from __future__ import annotations

from html import escape
from typing import Literal

Anchor = Literal["start", "middle", "end"]

CHARACTER_WIDTH = 0.55
"""Mean advance of a sans-serif character in em; enough to keep labels apart."""
NAME_PX = 15
"""Font size of the class `name`."""


class Drawing:
    """An SVG of a fixed coordinate size that scales with the page. Coordinates are pixels, y downwards."""

    def __init__(self, width: float, height: float, *, label: str) -> None:
        self.width = width
        self.height = height
        self._label = label
        self._parts: list[str] = []

    def rect(
        self, x: float, y: float, width: float, height: float, css: str, *, radius: float = 0, hover: str = ""
    ) -> None:
        shape = f'x="{x:.2f}" y="{y:.2f}" width="{max(width, 0):.2f}" height="{max(height, 0):.2f}" rx="{radius:g}"'
        self._add("rect", shape, css, hover)

    def line(self, x1: float, y1: float, x2: float, y2: float, css: str) -> None:
        self._add("line", f'x1="{x1:.2f}" y1="{y1:.2f}" x2="{x2:.2f}" y2="{y2:.2f}"', css, "")

    def circle(self, x: float, y: float, radius: float, css: str, *, hover: str = "") -> None:
        self._add("circle", f'cx="{x:.2f}" cy="{y:.2f}" r="{radius:g}"', css, hover)

    def polyline(self, points: list[tuple[float, float]], css: str) -> None:
        self._add("polyline", 'points="' + " ".join(f"{x:.2f},{y:.2f}" for x, y in points) + '"', css, "")

    def text(self, x: float, y: float, content: str, css: str = "", *, anchor: Anchor = "start") -> None:
        shape = f'x="{x:.2f}" y="{y:.2f}" text-anchor="{anchor}"'
        self._parts.append(f'<text {shape} class="{escape(css)}">{escape(content)}</text>')

    def name(self, x: float, y: float, name: str, *, room: float, anchor: Anchor = "start") -> None:
        """A name that somebody chose: squeezed, not cut, where it is wider than `room`."""
        squeeze = (
            f' textLength="{room:.2f}" lengthAdjust="spacingAndGlyphs"' if text_width(name, NAME_PX) > room else ""
        )
        shape = f'x="{x:.2f}" y="{y:.2f}" text-anchor="{anchor}"{squeeze}'
        self._parts.append(f'<text {shape} class="name">{escape(name)}</text>')

    def turned_text(self, x: float, y: float, content: str, css: str) -> None:
        """Text that reads upwards, centred on its anchor."""
        shape = f'transform="translate({x:.2f},{y:.2f}) rotate(-90)" text-anchor="middle"'
        self._parts.append(f'<text {shape} class="{escape(css)}">{escape(content)}</text>')

    def render(self) -> str:
        """The <svg> element."""
        head = f'<svg viewBox="0 0 {self.width:g} {self.height:g}" role="img" aria-label="{escape(self._label)}">'
        return head + "".join(self._parts) + "</svg>"

    def _add(self, tag: str, shape: str, css: str, hover: str) -> None:
        title = f"<title>{escape(hover)}</title>" if hover else ""
        self._parts.append(f'<{tag} {shape} class="{escape(css)}">{title}</{tag}>')


def text_width(content: str, font_px: float) -> float:
    """Roughly how wide a text is, pixels."""
    return len(content) * font_px * CHARACTER_WIDTH
