"""Two rates of the parent give the child's: recovered from made-up machines, refused where they make no sense."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puzzle_trtllm.build.planner.two_points import Measured, StepCost, fit_step_cost
from puzzle_trtllm.errors import ConfigError

seconds = st.floats(1e-6, 1.0)


@given(seconds, seconds, st.integers(1, 50), st.integers(51, 500), st.integers(1, 1000))
def test_a_machine_of_this_kind_is_recovered(fixed: float, each: float, small: int, large: int, asked: int) -> None:
    machine = StepCost(fixed_s=fixed, per_sequence_s=each)
    rates = [Measured(batch=batch, tokens_per_s=batch / (fixed + each * batch)) for batch in (small, large)]
    # a constant that hides behind the other is recovered no better than their sum is stored
    assert fit_step_cost(*rates).tokens_per_s(asked) == pytest.approx(machine.tokens_per_s(asked), rel=1e-5)


def test_by_hand() -> None:
    """10 ms for 4 sequences and 18 ms for 8: 2 ms a step and 2 ms a sequence."""
    cost = fit_step_cost(Measured(batch=4, tokens_per_s=400), Measured(batch=8, tokens_per_s=8 / 0.018))
    assert (cost.fixed_s, cost.per_sequence_s) == (pytest.approx(0.002), pytest.approx(0.002))
    assert cost.tokens_per_s(1) == pytest.approx(250)


@pytest.mark.parametrize(
    ("rates", "words"),
    [
        (((4, 100.0), (4, 200.0)), "two positive rates at two batches"),
        (((4, 100.0), (8, 0.0)), "two positive rates"),
        (((4, 0.0), (8, 100.0)), "two positive rates"),
        (((4, 100.0), (8, 300.0)), "no step of a"),
        (((4, 100.0), (8, 90.0)), "no step of a"),
    ],
)
def test_rates_of_no_such_machine(rates: tuple[tuple[int, float], tuple[int, float]], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        fit_step_cost(*(Measured(batch=batch, tokens_per_s=rate) for batch, rate in rates))
