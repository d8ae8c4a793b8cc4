"""What users get when their input is wrong: one line that says where, what was found and what was expected.

Every error a user can cause is a `PuzzleError`. The CLI prints it without a traceback and exits with code 2; anything
else is our own fault and exits with code 1. The subclasses say which room raised it, so that callers from Python can
tell a bad checkpoint from a server that did not start.
"""

from __future__ import annotations

from pathlib import Path

MAX_FOUND = 200
"""Characters of a found value that are shown: it may be a whole prompt, and the line must be read."""


class PuzzleError(Exception):
    """A user error in one line: `file: key: message (found X, expected Y)`; parts that are None are left out."""

    def __init__(
        self,
        message: str,
        *,
        file: str | Path | None = None,
        key: str | None = None,
        found: object = None,
        expected: object = None,
    ) -> None:
        place = ": ".join(str(part) for part in (file, key) if part is not None)
        shown = None if found is None else _shorten(str(found))
        details = ", ".join(
            f"{label} {value}" for label, value in (("found", shown), ("expected", expected)) if value is not None
        )
        line = f"{place}: {message}" if place else message
        super().__init__(f"{line} ({details})" if details else line)


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_FOUND else f"{text[:MAX_FOUND]}... ({len(text)} characters)"


class ArchitectureError(PuzzleError):
    """A config.json or architecture file that describes no model we can handle."""


class CheckpointError(PuzzleError):
    """A checkpoint folder that is damaged, incomplete or not the one that was asked for."""


class ConfigError(PuzzleError):
    """A YAML or JSON file of ours (engine config, scenario, importance, dataset) with a wrong key or value."""


class CalibrationError(PuzzleError):
    """Calibration data or activations that cannot give scales or importance."""


class EngineError(PuzzleError):
    """An engine folder that cannot be loaded, or a runtime that is not installed or has died."""


class ServeError(PuzzleError):
    """A server that did not start, or that refused or failed a request."""

    def __init__(self, message: str, *, status: str | None = None, **where: object) -> None:
        super().__init__(message, **where)  # type: ignore[arg-type]
        self.status = status
        """gRPC status name (UNAVAILABLE, INVALID_ARGUMENT, CANCELLED, ...) when a server answered with one."""


class BenchError(PuzzleError):
    """A measurement that cannot be made or compared."""
