"""Graders: does a final answer say what the problem expects?

    exact     the same text, runs of white space counted as one space
    numeric   the last number in it equals the expected one (1,234.50 = 1234.5 = 1.2345e3), as people and LaTeX write it
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

_SEPARATOR = re.compile(r"[\u00a0\u2009\u202f]|\{,\}|\\,")
"""Between groups of thousands: no-break, thin and narrow no-break spaces, LaTeX's `{,}` and `\\,`; commas aside."""

_GROUPED = re.compile(rf"(?<!\d)\d{{1,3}}(?:(?:{_SEPARATOR.pattern})\d{{3}})+(?!\d)")

_NUMBER = re.compile(
    r"(?P<sign>(?<![\w.])[-+])?(?:\\?\$)?"  # a minus behind a word or a number is no sign: 12-5
    r"(?P<value>(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)"
    r"(?:[eE][-+]?\d{1,9}(?!\d))?)"  # so many digits because Decimal's exponent is bounded
)


def grade_exact(final: str, expected: str) -> bool:
    """Raises ConfigError when the expected answer is blank: an empty answer would be right."""
    if not expected.strip():
        raise ConfigError("the exact grader needs a text", key="answer", found=repr(expected))
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
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"the regex grader needs a pattern: {error}", key="answer", found=repr(expected)) from None


def last_number(text: str) -> Decimal | None:
    """The last number of a text, thousands separators removed; None when it holds none."""
    numbers = list(_NUMBER.finditer(_normalise(text)))
    if not numbers:
        return None
    sign, value = numbers[-1].group("sign", "value")
    return Decimal((sign or "") + value.replace(",", ""))


def _normalise(text: str) -> str:
    """The typographic minus as a hyphen, and groups of thousands joined unless commas divide them."""
    return _GROUPED.sub(lambda grouped: _SEPARATOR.sub("", grouped.group()), text.replace("\u2212", "-"))


GRADERS: Mapping[str, Grader] = {"exact": grade_exact, "numeric": grade_numeric, "regex": grade_regex}


def find_grader(name: str) -> Grader:
    """Raises ConfigError listing the known graders."""
    if name not in GRADERS:
        raise ConfigError("unknown grader", key="--grader", found=repr(name), expected=", ".join(GRADERS))
    return GRADERS[name]
