"""Confidence intervals by the bootstrap: draw the sample again, with replacement, and see how far a number moves.

Percentile intervals (Efron 1979) of seeded resamples, so equal inputs give equal intervals. What is drawn are problems,
and a problem is drawn for both engines or neither: hard problems make both slow and wrong, and an unpaired interval of
their ratio would count that twice. A resample is a row of multinomial counts, so that a mean over it is a dot product.

The trap: a bootstrap cannot see beyond its sample. Where every resample gives one value (both engines solved
everything) or some give none (a resample in which the baseline solved nothing), there is no interval, but a reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

RESAMPLES, SEED, LEVEL = 4000, 0, 0.95
Array = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A 95% interval, or why there is none."""

    low: float | None = None
    high: float | None = None
    reason: str | None = None
    """Set exactly when the ends are None."""


def draw_counts(size: int, *, resamples: int = RESAMPLES, seed: int = SEED) -> Array:
    """How often each of `size` items is in each resample: `[resamples, size]`, rows sum to `size`."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(size, np.full(size, 1 / size), size=resamples).astype(np.float64)


def ratio_of(numerators: Array, denominators: Array) -> Array:
    """Elementwise quotient; NaN over 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(denominators != 0, numerators / denominators, np.nan)


def resampled_medians(rounds: tuple[float, ...], *, stream: int = 0) -> Array:
    """Medians of resampled rounds, `[RESAMPLES]`: one stream draws rounds that were measured in turn together."""
    drawn = np.random.default_rng(SEED + 1 + stream).integers(len(rounds), size=(RESAMPLES, len(rounds)))
    medians: Array = np.median(np.array(rounds)[drawn], axis=1)
    return medians


def percentile_interval(replicates: Array) -> Interval:
    """The middle `LEVEL` of the resampled values."""
    undefined = int(np.isnan(replicates).sum())
    if undefined:
        return Interval(reason=f"undefined in {undefined} of {len(replicates)} resamples")
    low, high = (float(value) for value in np.quantile(replicates, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    spread: Any = np.ptp(replicates)
    if spread <= 1e-12 * abs(high):
        return Interval(reason="every resample gives the same value: the sample is too small or too uniform to tell")
    return Interval(low=low, high=high)
