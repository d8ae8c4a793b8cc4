"""Results on stdout: rich tables for people, or one JSON object as the last line for programs (`--json`)."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]


def print_json(value: Mapping[str, Any]) -> None:
    """One line on stdout, at once (a pipe would hold it back)."""
    print(json.dumps(value, allow_nan=False), flush=True)


def print_table(*tables: Any) -> None:
    """Anything that rich can print, on stdout; as wide as the terminal, or 120 columns where there is none."""
    from puzzle_trtllm.terminal import stdout_console

    console = stdout_console()
    for table in tables:
        console.print(table)


def facts_table(title: str, facts: Iterable[tuple[str, str]]) -> Table:
    """Two columns: what, and its value."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, value)
    return table


def quoted(path: str | Path) -> str:
    """A path as a command that is to be typed has it."""
    return shlex.quote(str(path))


def show_bytes(num_bytes: float) -> str:
    """1,965,968 bytes as "1.87 MiB"."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if num_bytes >= 1024**power:
            return f"{num_bytes / 1024**power:,.2f} {unit}"
    return f"{num_bytes:,.0f} B"


def show_count(count: float) -> str:
    """88,150,438,080 as "88.15 B" (billions)."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= limit:
            return f"{count / limit:,.2f} {unit}"
    return f"{count:,.0f}"
