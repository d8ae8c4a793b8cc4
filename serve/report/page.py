"""report.html: one self-contained file, made from page.html.jinja beside this module.

Everything is inside: style, drawings, numbers. It loads nothing and runs no script, so it can be mailed, attached to a
ticket or opened from a disk years later, and it follows the reader's light or dark setting.
"""

from __future__ import annotations

from pathlib import Path

from puzzle_trtllm.html_page import Filters, render_page
from puzzle_trtllm.serve.bench.result import show_lengths
from puzzle_trtllm.serve.metrics.units import show_bytes, show_interval, show_number, show_percent, show_ratio
from puzzle_trtllm.serve.report.charts.frontier import frontier_chart
from puzzle_trtllm.serve.report.charts.layer_map import layer_map
from puzzle_trtllm.serve.report.charts.length_budget import length_budget_chart
from puzzle_trtllm.serve.report.charts.memory import memory_chart
from puzzle_trtllm.serve.report.charts.throughput import throughput_chart
from puzzle_trtllm.serve.report.document import DEFINITIONS
from puzzle_trtllm.serve.report.summary import Report, headline, headline_tiles

TEMPLATE = Path(__file__).with_name("page.html.jinja")
FILTERS: Filters = {
    "bytes": show_bytes,
    "number": show_number,
    "ratio": show_ratio,
    "percent": show_percent,
    "interval": show_interval,
}


def report_page(report: Report) -> str:
    """The HTML text of a report."""
    return render_page(
        TEMPLATE,
        _drawings(report),
        filters=FILTERS,
        report=report,
        child=report.child,
        scenario=report.child.scenario,
        lengths=show_lengths(report.child.scenario),
        headline=headline(report),
        tiles=headline_tiles(report),
        definitions=DEFINITIONS,
    )


def _drawings(report: Report) -> dict[str, str | None]:
    """Chart name -> SVG, None where there is nothing to draw."""
    baseline = report.engine(report.first.baseline)
    return {
        "throughput": throughput_chart(report.engines, report.styles, report.comparisons),
        "memory": memory_chart(report.engines, report.styles),
        "frontier": frontier_chart(report.engines, report.styles, baseline=baseline, frontier=report.frontier),
        "budget": length_budget_chart(report.comparisons),
        "layers": layer_map(report.child, baseline),
    }
