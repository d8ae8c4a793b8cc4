"""Numbers as people read them."""

from __future__ import annotations

import pytest

from puzzle_trtllm.serve.metrics.bootstrap import Interval
from puzzle_trtllm.serve.metrics.statistics import Ratio, wilson_interval
from puzzle_trtllm.serve.metrics.units import (
    show_bytes,
    show_interval,
    show_number,
    show_percent,
    show_percents,
    show_ratio,
)


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.98 KiB"),
        (1024, "1.00 KiB"),
        (10 * 1024, "10.0 KiB"),
        (100 * 1024, "100 KiB"),
        (1.5 * 2**20, "1.50 MiB"),
        (60.8 * 2**30, "60.8 GiB"),
        (3 * 2**40, "3.00 TiB"),
        (4096 * 2**40, "4,096 TiB"),
        (-12 * 2**20, "-12.0 MiB"),
        (-150 * 2**20, "-150 MiB"),
    ],
)
def test_bytes_have_three_digits_and_a_binary_unit(count, shown):
    assert show_bytes(count) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0.000"), (0.00047, "0.000470"), (0.03052, "0.0305"), (-0.03052, "-0.0305"), (0.1234, "0.123"), (1, "1.00"),
     (4.561, "4.56"), (9.5, "9.50"), (10, "10.0"), (78.91, "78.9"), (100, "100"), (1234.6, "1,235"), (-78.91, "-78.9")],
)  # fmt: skip
def test_numbers_have_three_digits_and_above_1000_are_whole(value, shown):
    assert show_number(value) == shown


def test_an_interval_has_the_digits_of_the_accuracy_in_it():
    """13,902 right of 14,042 problems: 99.0%, and `99% to 99%` would leave no doubt."""
    assert show_percents(*wilson_interval(13_902, 14_042)) == "98.8 to 99.2%"


def test_ratios_and_intervals_that_do_not_exist_are_a_dash_and_nothing():
    ratio = Ratio(value=1.826, interval=Interval(low=1.704, high=1.949))
    assert (show_ratio(ratio), show_interval(ratio)) == ("1.83×", "1.70 to 1.95")
    none = Ratio(value=None, reason="the parent solved nothing")
    assert (show_ratio(none), show_interval(none)) == ("–", "")
    assert (show_ratio(None), show_interval(None)) == ("–", "")
    assert show_interval(Ratio(value=1.0, interval=Interval(reason="a single round"))) == ""
    assert (show_percent(0.9994), show_percent(0.5, digits=0), show_percent(None)) == ("99.9%", "50%", "–")
