"""Where tables for people and warnings go, and what others' words may do to a terminal: nothing."""

from __future__ import annotations

import re

from rich.console import Console

WIDTH_OF_NO_TERMINAL = 120
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""All but tab and newline."""


def visible(text: str) -> str:
    """`text` with its control characters spelt out: a terminal would obey a model's, a server's or a checkpoint's."""
    return _CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def stdout_console() -> Console:
    """On stdout, as wide as the terminal, or 120 columns where there is none (rich would say 80 and cut names).

    What is printed is what it says: a folder may be called `v[1]`, `[/x]` or `:warning:`.
    """
    width = None if Console().is_terminal else WIDTH_OF_NO_TERMINAL
    return Console(width=width, markup=False, emoji=False)


def warn(line: str, *, quiet: bool = False) -> None:
    """One warning line on stderr."""
    if not quiet:
        Console(stderr=True).print(f"warning: {line}", style="yellow", highlight=False, markup=False, soft_wrap=True)
