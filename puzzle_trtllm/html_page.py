"""A page for people from a jinja template: one self-contained HTML file without scripts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

Filters = Mapping[str, Callable[..., str]]


def render_page(template: Path, drawings: Mapping[str, str | None], filters: Filters, **values: object) -> str:
    """The page with `values` and, as `charts`, the drawings (svg.py), None where there is nothing to draw."""
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    charts: dict[str, Any] = {name: Markup(svg) if svg else None for name, svg in drawings.items()}  # Drawing escapes
    return environment.get_template(template.name).render(charts=charts, **values)
