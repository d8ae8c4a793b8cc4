"""The demo's task: long additions, answered at once or after reasoning.

A problem is the sum of two numbers with the same count of digits, `48213+90677=`. How much is written before the
answer is the reasoning effort:

- low: nothing; the answer comes at once, so every carry has to be seen ahead.
- medium: each column's sum as two digits, from the right, `10 08 09 18 13`: the left digit is the carry into the next
  column. The operands' digits and the incoming carry are not written, but looked up.
- high: the columns written out, `3+7+0=10 1+7+1=09 ...`, and then all of them checked a second time the other way round
  (`check 7+3+0=10 ...`); the answer is read from the check.

In training some first passes at high effort hold a slip (a wrong digit copied), with consistent arithmetic after it, so
that the check has to go back to the problem itself, a long way, instead of copying the first pass.

Problems are split by a hash of their operands, so held-out problems are disjoint from training by construction.
Pure Python: the evaluation and its clients need no torch.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from puzzle_trtllm.errors import ConfigError

EFFORTS = ("low", "medium", "high")
"""Reasoning efforts, from the least to the most thinking."""

MIN_DIGITS, MAX_DIGITS = 4, 7
"""Digits of each operand in held-out problems; both operands have the same count."""

SPLITS = {"problems": 0, "calibration": 1}
"""Residues of the operands' hash that belong to a held-out set; every other residue is training."""

_SPLIT_MODULUS = 64


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One held-out problem: what the user asks, and the only right answer."""

    id: str
    prompt: str
    answer: str


def split_of(a: int, b: int) -> str:
    """Which set the problem a + b belongs to: "problems", "calibration" or "training" (1/64, 1/64 and the rest)."""
    mixed = (a * 1_000_003 + b) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
    mixed = (mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    residue = (mixed >> 32) % _SPLIT_MODULUS
    return next((name for name, value in SPLITS.items() if value == residue), "training")


def sample_operands(rng: random.Random, split: str, digits: int) -> tuple[int, int]:
    """Draw two numbers of exactly `digits` digits whose problem belongs to `split`."""
    low, high = (10 ** (digits - 1) if digits > 1 else 0), 10**digits - 1
    while True:
        a, b = rng.randint(low, high), rng.randint(low, high)
        if split_of(a, b) == split:
            return a, b


def prompt_text(a: int, b: int) -> str:
    """What the user writes."""
    return f"{a}+{b}="


def columns(a: int, b: int) -> Iterator[tuple[int, int]]:
    """Digit pairs of a and b from the right, as many as the longer number has."""
    for place in range(max(len(str(a)), len(str(b)))):
        yield a // 10**place % 10, b // 10**place % 10


def reasoning_trace(a: int, b: int, effort: str, *, slip: tuple[int, int] | None = None) -> tuple[str | None, str]:
    """What the model is taught to write for a + b: (thinking, or None at low effort; answer).

    `slip = (column, digit)` copies a wrong first digit into that column of the first pass at high effort; the check
    and the answer stay right. Raises ConfigError for an unknown effort.
    """
    if effort not in EFFORTS:
        raise ConfigError("unknown reasoning effort", found=repr(effort), expected=", ".join(EFFORTS))
    if effort == "low":
        return None, str(a + b)
    if effort == "medium":
        return _terse_columns(a, b), str(a + b)
    first = _full_columns([(slip[1] if slip and slip[0] == i else x, y) for i, (x, y) in enumerate(columns(a, b))])
    check = _full_columns([(y, x) for x, y in columns(a, b)])
    return f"{first} check {check}", str(a + b)


def _terse_columns(a: int, b: int) -> str:
    terms, carry = [], 0
    for x, y in columns(a, b):
        total = x + y + carry
        terms.append(f"{total:02d}")
        carry = total // 10
    return " ".join(terms)


def _full_columns(pairs: list[tuple[int, int]]) -> str:
    terms, carry = [], 0
    for x, y in pairs:
        total = x + y + carry
        terms.append(f"{x}+{y}+{carry}={total:02d}")
        carry = total // 10
    return " ".join(terms)


def load_problems(path: str | Path) -> list[Problem]:
    """Read a problem set: one JSON object a line with the string keys id, prompt and answer.

    Raises ConfigError that names the line when the file is missing, is no JSON, or has a wrong or missing key.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", file=path) from None
    problems = [_parse_problem(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not problems:
        raise ConfigError("holds no problem", file=path)
    return problems


def _parse_problem(line: str, place: str) -> Problem:
    try:
        record = json.loads(line)
    except ValueError:
        raise ConfigError("is not JSON", file=place) from None
    keys = {"id", "prompt", "answer"}
    if not isinstance(record, dict) or set(record) != keys or not all(isinstance(v, str) for v in record.values()):
        raise ConfigError("a problem has the string keys id, prompt, answer", file=place, found=line[:60])
    return Problem(**record)


def extract_answer(text: str) -> str | None:
    """The last number of the final channel, or of the whole text if no final channel was opened; None without one.

    Works on text with special tokens (`<|channel|>final<|message|>5788<|return|>`) and without (`...final5788`). A
    text that opened the analysis channel and never reached the final one has no answer: it was cut while thinking.
    """
    before, marker, final = text.rpartition("final")
    if not marker and "analysis" in before + final:
        return None
    numbers = re.findall(r"\d+", final)
    return numbers[-1] if numbers else None


def is_correct(problem: Problem, text: str) -> bool:
    """Whether the generated text answers the problem."""
    return extract_answer(text) == problem.answer
