"""The statistics behind the metrics: percentiles, distributions, the Wilson interval, and ratios that may not exist.

Percentiles interpolate linearly between order statistics, numpy's default: for n sorted values the q-th percentile sits
at rank (n - 1) * q / 100. Nearest-rank tools differ from it by up to one sample, which shows at p99 of short runs.

Wilson's interval is the accuracy interval of choice at the edges: at 60 right of 60 the textbook p +- z*sqrt(p(1-p)/n)
says 100% +- 0; Wilson says 94% to 100%.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from puzzle_trtllm.errors import BenchError
from puzzle_trtllm.serve.metrics.bootstrap import Interval

Z_95 = 1.959963984540054
"""Standard normal quantile of a two-sided 95% interval."""


def percentile(sorted_values: Sequence[float], q: float) -> float:
    """The q-th percentile (0 to 100) of ascending values, interpolated linearly. Raises BenchError for no values."""
    if not sorted_values:
        raise BenchError("no values to take a percentile of")
    rank = (len(sorted_values) - 1) * q / 100
    below = math.floor(rank)
    above = min(below + 1, len(sorted_values) - 1)
    low, high = sorted_values[below], sorted_values[above]
    return low + (high - low) * (rank - below)


def median(values: Iterable[float]) -> float:
    """The middle value, or the mean of the two middle ones."""
    return percentile(sorted(values), 50)


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """A sample in nine numbers, all but `count` in the metric's unit."""

    count: int
    mean: float
    min: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Distribution:
        """Raises BenchError when there are no values."""
        ordered = sorted(values)
        if not ordered:
            raise BenchError("no values to take a distribution of")
        return cls(
            count=len(ordered),
            mean=math.fsum(ordered) / len(ordered),
            min=ordered[0],
            p50=percentile(ordered, 50),
            p90=percentile(ordered, 90),
            p95=percentile(ordered, 95),
            p99=percentile(ordered, 99),
            max=ordered[-1],
        )


def wilson_interval(successes: int, trials: int, *, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927). Raises BenchError for no trials.

    At its edges it ends at 0 and 1 exactly: computed, it missed them, and with them the proportion, by rounding.
    """
    if trials < 1:
        raise BenchError("no trials to take an interval of")
    p = successes / trials
    center = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    return 0.0 if successes == 0 else center - half, 1.0 if successes == trials else center + half


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """numerator / denominator, or why there is none."""

    value: float | None
    reason: str | None = None
    """Set exactly when `value` is None."""
    interval: Interval | None = None
    """Its 95% interval, where one was asked for."""

    @classmethod
    def of(cls, numerator: float, denominator: float, *, zero_reason: str) -> Ratio:
        """`zero_reason` says what a denominator of 0 means."""
        if denominator == 0:
            return cls(value=None, reason=zero_reason)
        return cls(value=numerator / denominator)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """One number measured in several rounds: its median, its range, and the rounds themselves."""

    median: float
    low: float
    high: float
    rounds: tuple[float, ...]

    @classmethod
    def of(cls, rounds: Iterable[float]) -> Spread:
        """Raises BenchError when there are no rounds."""
        values = tuple(rounds)
        if not values:
            raise BenchError("no rounds to take a median of")
        return cls(median=median(values), low=min(values), high=max(values), rounds=values)
