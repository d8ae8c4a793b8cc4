"""Scales: from a number to a pixel, with round ticks.

Linear ticks step by 1, 2 or 5 times a power of ten; logarithmic ones stand at 1, 2 and 5 times every power of ten.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_TOLERANCE = 1e-9


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Maps `low`..`high` to the pixels `start`..`end` (end may lie before start)."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = self.low, self.high, value
        if self.logarithmic:
            low, high, at = math.log(low), math.log(high), math.log(value)
        share = (at - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values inside the axis, about `count` of them."""
        return _log_ticks(self.low, self.high) if self.logarithmic else _linear_ticks(self.low, self.high, count)


def _linear_ticks(low: float, high: float, count: int) -> list[float]:
    step = round_step((high - low) / max(count, 1))
    first = math.ceil(low / step - _TOLERANCE)
    last = math.floor(high / step + _TOLERANCE)
    return [index * step for index in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    return [value for value in values if low * (1 - _TOLERANCE) <= value <= high * (1 + _TOLERANCE)]


def round_step(rough: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is at least `rough`."""
    if rough <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= rough * (1 - _TOLERANCE))
