"""`make_report`: measured engines in; a table, report.json, report.md and report.html out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from puzzle_trtllm.errors import BenchError
from puzzle_trtllm.folders import write_atomically
from puzzle_trtllm.serve.report.compare import compare
from puzzle_trtllm.serve.report.document import RESERVED_KEYS, report_document
from puzzle_trtllm.serve.report.frontier import frontier_of
from puzzle_trtllm.serve.report.markdown import render_markdown
from puzzle_trtllm.serve.report.measurement import EngineMeasurement
from puzzle_trtllm.serve.report.notes import notes_on
from puzzle_trtllm.serve.report.page import report_page
from puzzle_trtllm.serve.report.summary import Report
from puzzle_trtllm.serve.report.table import report_table
from puzzle_trtllm.terminal import stdout_console

JSON_NAME, PAGE_NAME, MARKDOWN_NAME = "report.json", "report.html", "report.md"


def make_report(
    engines: Sequence[EngineMeasurement],
    *,
    baselines: Sequence[str],
    child: str,
    out: str | Path,
    title: str = "A Puzzle child against its parent",
    extra: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Compare `child` with each of `baselines` (names of engines), write report.json, .html and .md into `out`.

    Headlines are against the first baseline. Files already in `out` stay, but the three reports are replaced.
    extra: anything JSON that belongs to the run, kept under `extra`. quiet: print no table.

    Returns the content of report.json. Raises BenchError when names do not fit or engines cannot be compared.
    """
    report = assemble_report(engines, baselines=baselines, child=child, title=title)
    document = report_document(
        report.engines,
        report.comparisons,
        child=child,
        notes=report.notes,
        extra=extra or {},
        frontier=report.frontier,
    )
    texts = {
        JSON_NAME: json.dumps(document, indent=2, allow_nan=False) + "\n",
        PAGE_NAME: report_page(report),
        MARKDOWN_NAME: render_markdown(report),
    }
    for name, text in texts.items():
        write_atomically(Path(out) / name, text)
    if not quiet:
        stdout_console().print(report_table(report))
    return document


def assemble_report(
    engines: Sequence[EngineMeasurement], *, baselines: Sequence[str], child: str, title: str
) -> Report:
    """Check the names and form every comparison. Raises BenchError."""
    by_name = {engine.name: engine for engine in engines}
    _check_names(engines, baselines, child)
    return Report(
        title=title,
        engines=tuple(engines),
        child=by_name[child],
        comparisons=tuple(compare(by_name[child], by_name[name]) for name in baselines),
        notes=tuple(notes_on(engines, baselines=baselines, child=child)),
        frontier=frontier_of(engines),
    )


def _check_names(engines: Sequence[EngineMeasurement], baselines: Sequence[str], child: str) -> None:
    names = [engine.name for engine in engines]
    for name in names:
        if names.count(name) > 1:
            raise BenchError("two engines of one name", key=name)
        if name in RESERVED_KEYS or name.startswith("vs_"):
            raise BenchError("no engine may have this name, report.json uses it", key=name)
    for name in (*baselines, child):
        if name not in names:
            raise BenchError("no such engine", key=name, expected=f"one of: {', '.join(names)}")
    if not baselines:
        raise BenchError("no baseline to compare with", file=child)
    if child in baselines:
        raise BenchError("compared with itself", key=child)
