"""A problem set: JSONL, one object a line with a prompt and the answer that counts as right.

Any data set in that form will do: the two keys can be named otherwise, other keys are ignored, an answer may be a
number, and a problem without an `id` is called by its line. The fingerprint of what was asked and expected goes into
every result: accuracies on different problems must not be compared.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from puzzle_trtllm.errors import ConfigError
from puzzle_trtllm.json_files import unique_keys
from puzzle_trtllm.plain_file import read_text


class Problem(BaseModel):
    """What the user asks, and what counts as right (how, the grader decides)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    id: str = Field(min_length=1)
    prompt: str = Field(min_length=1)
    answer: str = Field(min_length=1)


@dataclass(frozen=True, kw_only=True)
class ProblemSet:
    """The problems of a file, or its first few."""

    file: Path
    problems: tuple[Problem, ...]
    fingerprint: str
    """sha256 over the problems in order."""


def load_problems(
    path: str | Path, *, limit: int | None = None, prompt_key: str = "prompt", answer_key: str = "answer"
) -> ProblemSet:
    """Read a problem set, or its first `limit` problems.

    Raises ConfigError naming file and line for text that is no JSON, a missing or empty prompt or answer, a repeated
    id, or a file without problems.
    """
    file = Path(path)
    text = read_text(file, ConfigError, encoding="utf-8-sig")
    lines = text.split("\n")  # not splitlines: JSON strings may hold U+2028
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()][:limit]
    problems = [_problem(line, file, number, prompt_key, answer_key) for number, line in numbered]
    if not problems:
        raise ConfigError("holds no problem", file=file)
    repeated = next((name for name, times in Counter(p.id for p in problems).items() if times > 1), None)
    if repeated is not None:
        raise ConfigError("two problems with one id", file=file, key="id", found=repeated)
    content = "\n".join(problem.model_dump_json() for problem in problems)
    return ProblemSet(file=file, problems=tuple(problems), fingerprint=hashlib.sha256(content.encode()).hexdigest())


def _problem(line: str, file: Path, number: int, prompt_key: str, answer_key: str) -> Problem:
    place = f"{file}:{number}"
    try:
        record = json.loads(line, object_pairs_hook=unique_keys)
        json.dumps(record, ensure_ascii=False).encode()
    except RecursionError:
        raise ConfigError("nested too deeply", file=place) from None
    except UnicodeEncodeError:
        raise ConfigError("not text: half of a surrogate pair stands alone", file=place) from None
    except ValueError as error:
        raise ConfigError(f"not JSON: {error}", file=place) from None
    if not isinstance(record, dict):
        raise ConfigError("not a JSON object", file=place, expected=f"the keys {prompt_key}, {answer_key}")
    return Problem(
        id=_text(record, "id", place) if "id" in record else f"line {number}",
        prompt=_text(record, prompt_key, place),
        answer=_text(record, answer_key, place),
    )


def _text(record: Mapping[str, Any], key: str, place: str) -> str:
    """A string, or a number written out without an exponent."""
    if key not in record:
        raise ConfigError("missing", file=place, key=key, found=f"keys {', '.join(record) or 'none'}")
    value = record[key]
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return format(Decimal(repr(value)), "f")
    if not isinstance(value, str) or not value:
        raise ConfigError(
            "not a text", file=place, key=key, found=json.dumps(value)[:40], expected="text or a number that is finite"
        )
    return value
