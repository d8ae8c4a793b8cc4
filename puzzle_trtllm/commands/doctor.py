"""`doctor`: what stands between this machine and a running TensorRT-LLM engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from puzzle_trtllm.commands.output import JsonOption, print_json, print_table

NOT_READY = 1


def doctor_command(
    engine: Annotated[Path | None, typer.Option("--engine", help="Also check what this engine asks for.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Check this machine for TensorRT-LLM.

    GPU, driver, NCCL, Triton, versions, and every upstream name that the child's model relies on. Exit code 0 when a
    TensorRT-LLM engine can be expected to start here, 1 when something is missing or does not fit.
    """
    from puzzle_trtllm.doctor import diagnose

    diagnosis = diagnose(engine)
    if as_json:
        print_json(diagnosis.to_json())
        raise typer.Exit(0 if diagnosis.ready else NOT_READY)
    from rich.table import Table

    table = Table(title="doctor", title_justify="left")
    for column in ("", "what", "found", "so"):
        table.add_column(column, overflow="fold")
    for item in diagnosis.checks:
        table.add_row(item.outcome, f"{item.group}: {item.name}", item.found, item.advice)
    print_table(table)
    obstacles = [item for item in diagnosis.checks if item.outcome in ("missing", "wrong")]
    if obstacles:
        names = ", ".join(f"{item.group} {item.name}" for item in obstacles)
        print(f"Not ready for TensorRT-LLM: {names}. The reference runtime needs none of it.")
    else:
        print("Ready for TensorRT-LLM.")
    raise typer.Exit(0 if diagnosis.ready else NOT_READY)
