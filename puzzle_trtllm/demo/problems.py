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
Reading problem sets and grading answers is `evaluate`'s (puzzle_trtllm/serve/evaluate). Pure Python, no torch.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from puzzle_trtllm.errors import ConfigError

EFFORTS = ("low", "medium", "high")
"""Reasoning efforts, from the least to the most thinking."""

MIN_DIGITS, MAX_DIGITS = 4, 7
"""Digits of each operand in held-out problems; both operands have the same count."""

SPLITS = {"problems": 0, "calibration": 1}
"""Residues of the operands' hash that belong to a held-out set; every other residue is training."""

_SPLIT_MODULUS = 64


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
