"""A problem set: one JSON object a line with the string keys id, prompt and answer.

Its fingerprint goes into every result: accuracies on different problems must not be compared.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from puzzle_trtllm.errors import ConfigError


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


def load_problems(path: str | Path, *, limit: int | None = None) -> ProblemSet:
    """Read a problem set, or its first `limit` problems.

    Raises ConfigError naming file and line for text that is no JSON, a missing, empty, unknown or repeated key, or a
    file without problems.
    """
    file = Path(path)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=file) from None
    except UnicodeDecodeError:
        raise ConfigError("not UTF-8 text", file=file) from None
    problems = [_parse(line, f"{file}:{number}") for number, line in enumerate(lines, 1) if line.strip()][:limit]
    if not problems:
        raise ConfigError("holds no problem", file=file)
    ids = [problem.id for problem in problems]
    repeated = next((problem_id for problem_id in ids if ids.count(problem_id) > 1), None)
    if repeated is not None:
        raise ConfigError("two problems with one id", file=file, key="id", found=repeated)
    content = "\n".join(problem.model_dump_json() for problem in problems)
    return ProblemSet(file=file, problems=tuple(problems), fingerprint=hashlib.sha256(content.encode()).hexdigest())


def _parse(line: str, place: str) -> Problem:
    try:
        return Problem.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or None
        raise ConfigError(first["msg"], file=place, key=key, expected="the string keys id, prompt, answer") from None
