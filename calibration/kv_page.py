"""kv_report.html: the report for people, one self-contained file without scripts, from kv_page.html.jinja."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from puzzle_trtllm.calibration.kv_charts import amax_chart, saved_chart, snr_chart
from puzzle_trtllm.calibration.kv_report import KvCalibration
from puzzle_trtllm.folders import write_atomically

PAGE_NAME = "kv_report.html"
TEMPLATE = "kv_page.html.jinja"


def write_page(report: KvCalibration, folder: Path) -> None:
    """Write kv_report.html into `folder`."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    drawings = {
        "amax": amax_chart(report),
        "k": snr_chart(report, "k"),
        "v": snr_chart(report, "v"),
        "saved": saved_chart(report),
    }
    charts = {name: Markup(svg) if svg else None for name, svg in drawings.items()}  # Drawing escapes
    page = environment.get_template(TEMPLATE).render(report=report, charts=charts)
    write_atomically(folder / PAGE_NAME, page)
