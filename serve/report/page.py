"""report.html: one self-contained file, made from page.html.jinja beside this module.

Everything is inside: style, drawings, numbers. It loads nothing and runs no script, so it can be mailed, attached to a
ticket or opened from a disk years later, and it follows the reader's light or dark setting.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from puzzle_trtllm.serve.bench.result import show_lengths
from puzzle_trtllm.serve.metrics.units import show_bytes, show_interval, show_number, show_percent, show_ratio
from puzzle_trtllm.serve.report.charts.frontier import frontier_chart
from puzzle_trtllm.serve.report.charts.layer_map import layer_map
from puzzle_trtllm.serve.report.charts.length_budget import length_budget_chart
from puzzle_trtllm.serve.report.charts.memory import memory_chart
from puzzle_trtllm.serve.report.charts.throughput import throughput_chart
from puzzle_trtllm.serve.report.document import DEFINITIONS
from puzzle_trtllm.serve.report.summary import Report, headline, headline_tiles

TEMPLATE = "page.html.jinja"


def render_page(report: Report) -> str:
    """The HTML text of a report."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        bytes=show_bytes, number=show_number, ratio=show_ratio, percent=show_percent, interval=show_interval
    )
    return environment.get_template(TEMPLATE).render(
        report=report,
        child=report.child,
        scenario=report.child.scenario,
        lengths=show_lengths(report.child.scenario),
        headline=headline(report),
        tiles=headline_tiles(report),
        charts=_charts(report),
        definitions=DEFINITIONS,
    )


def _charts(report: Report) -> dict[str, Any]:
    """Chart name -> SVG, None where there is nothing to draw."""
    baseline = report.engine(report.first.baseline)
    drawings = {
        "throughput": throughput_chart(report.engines, report.styles, report.comparisons),
        "memory": memory_chart(report.engines, report.styles),
        "frontier": frontier_chart(report.engines, report.styles, baseline=baseline, frontier=report.frontier),
        "budget": length_budget_chart(report.comparisons),
        "layers": layer_map(report.child, baseline),
    }
    return {name: Markup(svg) if svg else None for name, svg in drawings.items()}  # Drawing escapes
