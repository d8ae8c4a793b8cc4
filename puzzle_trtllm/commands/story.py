"""`demo`: the main job from end to end, on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from puzzle_trtllm.commands.output import JsonOption, print_json


def demo_command(
    out: Annotated[Path, typer.Option("--out", help="Folder for everything that the demo makes.")] = Path("runs/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer records, problems and requests: a look.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run the whole story on this machine.

    Calibrates, derives, builds, serves and measures a Puzzle child of the demo's trained model against its parent.
    """
    from puzzle_trtllm.demo.story import run_demo

    document = run_demo(out, quick=quick)
    if as_json:
        print_json(document)
