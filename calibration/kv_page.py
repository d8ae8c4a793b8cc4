"""kv_report.html: the report for people, one self-contained file without scripts, from kv_page.html.jinja."""

from __future__ import annotations

from pathlib import Path

from puzzle_trtllm.calibration.kv_charts import amax_chart, saved_chart, snr_chart
from puzzle_trtllm.calibration.kv_report import KvCalibration
from puzzle_trtllm.folders import write_atomically
from puzzle_trtllm.html_page import render_page

PAGE_NAME = "kv_report.html"
TEMPLATE = Path(__file__).with_name("kv_page.html.jinja")


def write_page(report: KvCalibration, folder: Path) -> None:
    """Write kv_report.html into `folder`."""
    drawings = {
        "amax": amax_chart(report),
        "k": snr_chart(report, "k"),
        "v": snr_chart(report, "v"),
        "saved": saved_chart(report),
    }
    write_atomically(folder / PAGE_NAME, render_page(TEMPLATE, drawings, filters={}, report=report))
