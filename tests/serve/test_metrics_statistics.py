"""Percentiles against numpy, Wilson's interval against published values and scipy's own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from puzzle_trtllm.errors import BenchError
from puzzle_trtllm.serve.metrics.statistics import Distribution, Ratio, Spread, median, percentile, wilson_interval

samples = st.lists(st.floats(min_value=0, max_value=1e9, allow_subnormal=False), min_size=1, max_size=200)


@settings(deadline=None)
@given(samples, st.floats(min_value=0, max_value=100))
def test_percentiles_are_numpys(values, q):
    assert percentile(sorted(values), q) == pytest.approx(np.percentile(values, q), rel=1e-12, abs=1e-12)


@settings(deadline=None)
@given(samples)
def test_a_distribution_is_numpys(values):
    found = Distribution.of(values)
    expected = np.percentile(values, [0, 50, 90, 95, 99, 100])
    assert [found.min, found.p50, found.p90, found.p95, found.p99, found.max] == pytest.approx(list(expected))
    assert found.mean == pytest.approx(np.mean(values))
    assert found.count == len(values)


def test_percentiles_interpolate_between_neighbours():
    # Rank (5 - 1) * 0.9 = 3.6: four tenths short of the last value, 40 + 0.6 * 10.
    assert percentile([10, 20, 30, 40, 50], 90) == pytest.approx(46)
    assert median([4, 1, 3, 2]) == 2.5


def test_no_values_are_an_error_not_zero():
    with pytest.raises(BenchError, match="no values"):
        Distribution.of([])
    with pytest.raises(BenchError, match="no values"):
        percentile([], 50)


def test_wilsons_interval_at_its_edges_and_in_the_middle():
    # 5 of 10: center 0.5, half = 1.96/(1+0.384) * sqrt(0.025 + 0.0096) = 0.2634. Newcombe (1998) table I: 81 of 263.
    assert wilson_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson_interval(60, 60) == pytest.approx((0.9398, 1.0), abs=1e-4)


@settings(deadline=None)
@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilsons_interval_is_scipys(counts):
    expected = binomtest(*counts).proportion_ci(method="wilson")
    low, high = wilson_interval(*counts)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert 0 <= low <= counts[0] / counts[1] <= high <= 1


def test_wilsons_interval_holds_none_and_all_whatever_rounding_does():
    """10 of 10 were 100% in an interval up to 0.9999999999999999, 0 of 7 in one from 2.8e-17."""
    for trials in range(1, 300):
        assert (wilson_interval(0, trials)[0], wilson_interval(trials, trials)[1]) == (0, 1)


def test_a_spread_is_the_median_and_the_range_of_its_rounds():
    assert Spread.of(iter([3.0, 1.0, 7.0])) == Spread(median=3.0, low=1.0, high=7.0, rounds=(3.0, 1.0, 7.0))
    with pytest.raises(BenchError, match="no rounds"):
        Spread.of([])


def test_a_ratio_over_zero_is_none_with_its_reason():
    assert Ratio.of(3, 2, zero_reason="unused").value == 1.5
    assert Ratio.of(3, 0, zero_reason="the parent solved nothing") == Ratio(
        value=None, reason="the parent solved nothing"
    )
