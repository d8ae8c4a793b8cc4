"""The demo's task: traces are true arithmetic, held-out sets are disjoint."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puzzle_trtllm.demo import problems
from puzzle_trtllm.errors import ConfigError

operand = st.integers(min_value=0, max_value=999_999)


def carries_by_hand(a: int, b: int) -> list[int]:
    """Oracle: the carry out of each column, from sums of the numbers cut to that column."""
    width = max(len(str(a)), len(str(b)))
    return [int(a % 10**k + b % 10**k >= 10**k) for k in range(1, width + 1)]


@given(operand, operand)
def test_every_effort_ends_in_the_sum(a: int, b: int) -> None:
    for effort in problems.EFFORTS:
        assert problems.reasoning_trace(a, b, effort)[1] == str(a + b)


@given(operand, operand)
def test_low_effort_does_not_think(a: int, b: int) -> None:
    assert problems.reasoning_trace(a, b, "low")[0] is None


@given(operand, operand)
def test_medium_effort_writes_each_columns_carry(a: int, b: int) -> None:
    thinking, _ = problems.reasoning_trace(a, b, "medium")
    assert thinking is not None
    assert [int(carry) for carry in re.findall(r"(\d)\d", thinking)] == carries_by_hand(a, b)


@given(operand, operand)
def test_high_effort_checks_what_it_wrote(a: int, b: int) -> None:
    thinking, answer = problems.reasoning_trace(a, b, "high")
    assert thinking is not None
    first, check = thinking.split(" check ")
    for part, (x, y) in ((first, (a, b)), (check, (b, a))):
        terms = re.findall(r"(\d)\+(\d)\+(\d)=(\d)(\d)", part)
        assert [int(term[2]) for term in terms] == [0, *carries_by_hand(x, y)[:-1]]
        digits = terms[-1][3].strip("0") + "".join(term[4] for term in reversed(terms))
        assert int(digits) == int(answer)


def test_traces_read_as_documented() -> None:
    assert problems.reasoning_trace(4821, 1967, "medium") == ("08 08 17 06", "6788")
    thinking, _ = problems.reasoning_trace(95, 10, "high")
    assert thinking == "5+0+0=05 9+1+0=10 check 0+5+0=05 1+9+0=10"


def test_a_slip_spoils_the_first_pass_only() -> None:
    thinking, answer = problems.reasoning_trace(19, 25, "high", slip=(0, 2))
    assert thinking == "2+5+0=07 1+2+0=03 check 5+9+0=14 2+1+1=04"
    assert answer == "44"


def test_an_unknown_effort_is_refused() -> None:
    with pytest.raises(ConfigError, match="extreme"):
        problems.reasoning_trace(1, 2, "extreme")


@pytest.mark.parametrize("split", ["problems", "calibration", "training"])
def test_samples_belong_to_their_split_and_have_their_digits(split: str) -> None:
    rng = random.Random(3)
    for _ in range(20):
        a, b = problems.sample_operands(rng, split, 5)
        assert problems.split_of(a, b) == split
        assert len(str(a)) == len(str(b)) == 5


def test_splits_have_the_stated_shares() -> None:
    """1/64 each: of 6400 pairs 100 are expected in a held-out set, with a standard deviation of 10."""
    rng = random.Random(0)
    splits = [problems.split_of(rng.randrange(10**6), rng.randrange(10**6)) for _ in range(6400)]
    assert 60 <= splits.count("problems") <= 140
    assert 60 <= splits.count("calibration") <= 140
