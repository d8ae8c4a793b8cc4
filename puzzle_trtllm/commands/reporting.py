"""`report`: measured engines side by side.

Each engine is given as NAME=FILE. FILE is an engine measurement, or the files that one is made of, separated by commas:
one `bench --engine ... --out` result a round, and an `evaluate --out` result, or several of different efforts. The
engine folder is the one that the bench results name.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from puzzle_trtllm.commands.output import JsonOption, print_json
from puzzle_trtllm.errors import PuzzleError


def report_command(
    child: Annotated[
        str, typer.Option("--child", metavar="[NAME=]FILE[,FILE...]", help="The child's result files; NAME: child.")
    ],
    baseline: Annotated[
        list[str],
        typer.Option("--baseline", metavar="NAME=FILE[,FILE...] ...", help="What to compare with, headlines first."),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for report.json, .md and .html.")] = Path("runs/report"),
    title: Annotated[str, typer.Option("--title", help="Of the page.")] = "A Puzzle child against its parent",
    as_json: JsonOption = False,
) -> None:
    """Compare a child with its baselines.

    Per-token speedup, relative request rate, accuracy retention and the frontier, with 95% intervals; as a table,
    report.json, report.md and report.html.
    """
    from puzzle_trtllm.serve.report import make_report
    from puzzle_trtllm.serve.report.files import load_measurement

    names = [name_and_files(value, "--baseline") for value in baseline]
    child_name, child_files = name_and_files(child if "=" in child else f"child={child}", "--child")
    given = [*names, (child_name, child_files)]
    engines = [load_measurement(name, files) for name, files in given]
    check_distinct(given)
    document = make_report(
        engines, baselines=[name for name, _ in names], child=child_name, out=out, title=title, quiet=as_json
    )
    if as_json:
        print_json(document)
    else:
        print(f"page: {out / 'report.html'}")


def check_distinct(given: Sequence[tuple[str, Sequence[Path]]]) -> None:
    """Raises PuzzleError for a file of two engines, which would be compared with itself."""
    owners: dict[Path, str] = {}
    for name, files in given:
        for file in files:
            owner = owners.setdefault(file.resolve(), name)
            if owner != name:
                raise PuzzleError("the same file for two engines", file=file, found=f"{owner} and {name}")


def name_and_files(value: str, option: str) -> tuple[str, list[Path]]:
    """`NAME=FILE,FILE` in its parts."""
    name, _, rest = value.partition("=")
    files = rest.split(",")
    if not name or not all(files):
        raise PuzzleError("names no file", key=option, found=value, expected="NAME=FILE")
    return name, [Path(file) for file in files]
