"""`doctor`: what stands between this machine and a running TensorRT-LLM engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from puzzle_trtllm.commands.output import JsonOption, print_json, print_table
from puzzle_trtllm.errors import PuzzleError
from puzzle_trtllm.models.trtllm.upstream import Line

if TYPE_CHECKING:
    from puzzle_trtllm.doctor.machine import Diagnosis

NOT_READY = 1


def doctor_command(
    engine: Annotated[Path | None, typer.Option("--engine", help="Also check what this engine asks for.")] = None,
    source: Annotated[
        Path | None,
        typer.Option("--source", help="Check a checkout of TensorRT-LLM instead of this machine; no GPU needed."),
    ] = None,
    line: Annotated[
        Line | None,
        typer.Option("--line", help="With --source: the release line to check it as (default: by its version)."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check this machine for TensorRT-LLM.

    GPU, driver, NCCL, Triton, versions, and every upstream name that the child's model relies on. Exit code 0 when a
    TensorRT-LLM engine can be expected to start here, 1 when something is missing or does not fit.
    """
    from puzzle_trtllm.doctor.machine import diagnose

    if source is None and line is not None:
        raise PuzzleError("goes with --source", key="--line", found=line)
    if source is not None:
        if engine is not None:
            raise PuzzleError("an engine is checked against an installed TensorRT-LLM only", key="--engine, --source")
        from puzzle_trtllm.doctor.source import diagnose_source

        diagnosis = diagnose_source(source, line=line)
        good, bad = "This TensorRT-LLM fits.", "This TensorRT-LLM does not fit: {}."
    else:
        diagnosis = diagnose(engine)
        good = "Ready for TensorRT-LLM."
        bad = "Not ready for TensorRT-LLM: {}. The reference runtime needs none of it: try `puzzle-trtllm demo`."
    if as_json:
        print_json(diagnosis.to_json())
    else:
        _print(diagnosis, good=good, bad=bad)
    raise typer.Exit(0 if diagnosis.ready else NOT_READY)


def _print(diagnosis: Diagnosis, *, good: str, bad: str) -> None:
    from rich.table import Table

    table = Table(title="doctor", title_justify="left")
    for column in ("", "what", "found", "what to do"):
        table.add_column(column, overflow="fold")
    for item in diagnosis.checks:
        table.add_row(item.outcome, f"{item.group}: {item.name}", item.found, item.advice)
    print_table(table)
    obstacles = [f"{item.group} {item.name}" for item in diagnosis.checks if item.outcome in ("missing", "wrong")]
    print(bad.format(", ".join(obstacles)) if obstacles else good)
