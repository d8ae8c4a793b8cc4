"""Graders: does a final answer say what the problem expects?

    exact     the same text, runs of white space counted as one space
    numeric   the last number in it equals the expected one (1,234.50 = 1234.5)
    regex     the expected answer is a pattern that is found in it

A grader is given the final answer, never the reasoning; no final answer is wrong with every grader.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from decimal import Decimal

from puzzle_trtllm.errors import ConfigError

Grader = Callable[[str, str], bool]
"""(final answer, expected answer) -> whether it is right."""

_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\d+(?:\.\d+)?")


def grade_exact(final: str, expected: str) -> bool:
    return final.split() == expected.split()


def grade_numeric(final: str, expected: str) -> bool:
    """Raises ConfigError when the expected answer holds no number."""
    wanted = last_number(expected)
    if wanted is None:
        raise ConfigError("the numeric grader needs a number", key="answer", found=repr(expected))
    return last_number(final) == wanted


def grade_regex(final: str, expected: str) -> bool:
    """Raises ConfigError when the expected answer is no pattern."""
    try:
        return re.search(expected, final) is not None
    except re.error as error:
        raise ConfigError(f"the regex grader needs a pattern: {error}", key="answer", found=repr(expected)) from None


def last_number(text: str) -> Decimal | None:
    """The last number of a text, thousands separators removed; None when it holds none."""
    numbers = _NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


GRADERS: Mapping[str, Grader] = {"exact": grade_exact, "numeric": grade_numeric, "regex": grade_regex}


def find_grader(name: str) -> Grader:
    """Raises ConfigError listing the known graders."""
    if name not in GRADERS:
        raise ConfigError("unknown grader", found=repr(name), expected=", ".join(GRADERS))
    return GRADERS[name]
