"""The bootstrap: against scipy's, its coverage on simulated data, and what it must refuse to say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from puzzle_trtllm.serve.metrics.bootstrap import (
    draw_counts,
    percentile_interval,
    ratio_of,
    resampled_medians,
)


def ratio_interval(ours, theirs, **options):
    counts = draw_counts(len(ours), **options)
    return percentile_interval(ratio_of(counts @ ours, counts @ theirs))


def samples(seed, size):
    """Token counts of two engines on the same problems: long-tailed, and correlated through the problem."""
    generator = np.random.default_rng(seed)
    hardness = generator.normal(size=size)
    ours, theirs = (np.exp(4 + 0.7 * hardness + 0.4 * generator.normal(size=size) + shift) for shift in (0.2, 0.0))
    return ours, theirs


def test_it_agrees_with_scipys_paired_percentile_bootstrap():
    ours, theirs = samples(1, 96)
    mine = ratio_interval(ours, theirs, resamples=20_000)
    other = stats.bootstrap(
        (ours, theirs), lambda a, b, axis: a.mean(axis) / b.mean(axis), paired=True, method="percentile",
        n_resamples=20_000, rng=np.random.default_rng(5),
    ).confidence_interval  # fmt: skip
    assert (mine.low, mine.high) == pytest.approx((other.low, other.high), abs=0.01)


def test_a_95_percent_interval_holds_the_truth_about_95_times_in_100():
    """400 simulated evaluations of 128 problems, true ratio e^0.2. 3 standard deviations of 400 trials are 0.033; a
    percentile bootstrap of a skewed ratio covers a little less than it says, hence 0.90."""
    covered = 0
    for seed in range(400):
        interval = ratio_interval(*samples(seed, 128), resamples=500)
        covered += interval.low <= np.exp(0.2) <= interval.high
    assert 0.90 <= covered / 400 <= 0.985


def test_pairs_make_it_narrower_than_strangers():
    ours, theirs = samples(3, 128)
    paired = ratio_interval(ours, theirs)
    counts, others = draw_counts(128, seed=1), draw_counts(128, seed=2)
    apart = percentile_interval(ratio_of(counts @ ours, others @ theirs))
    assert paired.high - paired.low < 0.8 * (apart.high - apart.low)


def test_equal_seeds_give_equal_intervals():
    ours, theirs = samples(4, 32)
    assert ratio_interval(ours, theirs) == ratio_interval(ours, theirs)
    assert ratio_interval(ours, theirs) != ratio_interval(ours, theirs, seed=1)


@given(st.integers(1, 40), st.integers(0, 99))
def test_every_resample_draws_as_many_as_there_are(size, seed):
    counts = draw_counts(size, resamples=50, seed=seed)
    assert (counts.sum(axis=1) == size).all()
    assert (counts >= 0).all()


@given(st.lists(st.floats(1, 1000), min_size=3, max_size=30, unique=True), st.floats(0.1, 10))
def test_an_interval_scales_with_its_numerator_and_holds_only_what_was_seen(values, scale):
    ours, ones = np.array(values), np.ones(len(values))
    interval, scaled = (ratio_interval(each, ones, resamples=200) for each in (ours, ours * scale))
    assert min(values) * (1 - 1e-9) <= interval.low <= interval.high <= max(values) * (1 + 1e-9)
    assert (scaled.low, scaled.high) == pytest.approx((interval.low * scale, interval.high * scale))


def test_what_every_resample_says_alike_has_no_interval_but_a_reason():
    for size in (1, 50):
        interval = ratio_interval(np.ones(size), np.ones(size))
        assert (interval.low, interval.high) == (None, None)
        assert interval.reason.startswith("every resample gives the same value")


def test_a_resample_over_zero_leaves_none():
    few = np.zeros(10)
    few[0] = 1  # (1 - 1/10)^10 = 35% of the resamples miss it
    interval = ratio_interval(np.ones(10), few)
    assert interval.low is None
    missed = np.isnan(ratio_of(draw_counts(10) @ np.ones(10), draw_counts(10) @ few)).sum()
    assert interval.reason == f"undefined in {missed} of 4000 resamples"
    assert missed == pytest.approx(0.35 * 4000, rel=0.1)


def test_rounds_measured_in_turn_are_drawn_together():
    ours, theirs = (100.0, 200.0, 400.0), (50.0, 100.0, 200.0)
    together = ratio_of(resampled_medians(ours), resampled_medians(theirs))
    assert together == pytest.approx(2.0)  # the noise is common, so their ratio has none
    for others in (theirs, (50.0, 100.0)):
        apart = ratio_of(resampled_medians(ours), resampled_medians(others, stream=1))
        assert apart.max() > apart.min()
