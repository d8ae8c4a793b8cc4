"""Typed values of a config.json: each is what its key needs, or one line that names file, key and what was found."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from puzzle_trtllm.errors import ArchitectureError

Values = Mapping[str, Any]

MAX_INTEGER = 2**31 - 1
"""Kernels count in 32 bits."""
MIN_NUMBER, MAX_NUMBER = 2.0**-126, (2 - 2.0**-23) * 2.0**127
"""What is not 0 or infinity in float32, in which all runtimes compute."""


def positive_integer(
    values: Values,
    key: str,
    source: str | Path,
    *,
    default: int | None = None,
    most: int = MAX_INTEGER,
    prefix: str = "",
) -> int:
    """Raises ArchitectureError, as all of these do. `prefix` names the section that `values` are of."""
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _wrong(value, f"{prefix}{key}", "must be a positive integer", source)
    if value > most:
        raise _wrong(value, f"{prefix}{key}", "too large", source, expected=f"at most {most}")
    return value


def positive_number(
    values: Values, key: str, source: str | Path, *, default: float | None = None, prefix: str = ""
) -> float:
    """An integer counts as one; NaN and infinity, which Python's JSON reads, do not."""
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        raise _wrong(value, f"{prefix}{key}", "must be a positive number", source)
    if not MIN_NUMBER <= value <= MAX_NUMBER:
        expected = f"{MIN_NUMBER:.3g} to {MAX_NUMBER:.3g} (float32)"
        raise _wrong(value, f"{prefix}{key}", "a number that models do not compute with", source, expected=expected)
    return float(value)


def boolean(values: Values, key: str, source: str | Path, *, default: bool, prefix: str = "") -> bool:
    value = values.get(key, default)
    if not isinstance(value, bool):
        raise _wrong(value, f"{prefix}{key}", "must be true or false", source)
    return value


def section(values: Values, key: str, source: str | Path, *, prefix: str = "") -> Values:
    """A nested object; one that is null or absent is empty."""
    value = values.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise _wrong(value, f"{prefix}{key}", "must be an object", source)
    return value or {}


def _wrong(
    value: object, key: str, message: str, source: str | Path, *, expected: str | None = None
) -> ArchitectureError:
    return ArchitectureError(message, file=source, key=key, found=json.dumps(value, default=str), expected=expected)
