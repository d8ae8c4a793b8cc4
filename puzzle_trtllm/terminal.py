"""Where tables for people go."""

from __future__ import annotations

from rich.console import Console

WIDTH_OF_NO_TERMINAL = 120


def stdout_console() -> Console:
    """On stdout, as wide as the terminal, or 120 columns where there is none (rich would say 80 and cut names)."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH_OF_NO_TERMINAL)
