"""JSON in, one object out: what Python's json reads and nobody means is an error."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from puzzle_trtllm.errors import PuzzleError
from puzzle_trtllm.plain_file import read_text


def read_json_object(file: Path, kind: type[PuzzleError]) -> dict[str, Any]:
    """Read a JSON file that must hold one object. Raises an error of this kind naming the file."""
    text = read_text(file, kind)
    try:
        value = json.loads(text, parse_float=_finite, parse_constant=_finite, object_pairs_hook=unique_keys)
    except RepeatedKeyError as error:
        raise kind("occurs twice", file=file, key=error.key) from None
    except (ValueError, RecursionError) as error:
        raise kind(f"not valid JSON: {error}", file=file) from None
    if not isinstance(value, dict):
        raise kind("not a JSON object", file=file, found=type(value).__name__, expected="object")
    return value


class RepeatedKeyError(ValueError):
    """A JSON object with the same key twice."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the key {json.dumps(key)} occurs twice")
        self.key = key


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`object_pairs_hook` of json.loads: Python lets the last of equal keys win. Raises RepeatedKeyError."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise RepeatedKeyError(key)
        result[key] = value
    return result


def _finite(text: str) -> float:
    """A JSON number. Python reads NaN and Infinity as well, and 1e999 as one: sums with them are wrong in silence."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no finite number")
    return number
