"""Where tables for people and warnings go."""

from __future__ import annotations

from rich.console import Console

WIDTH_OF_NO_TERMINAL = 120


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
