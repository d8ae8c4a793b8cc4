"""Where no data sheet helps (a CPU, a small model): two measurements of the parent predict the child.

A step of B sequences takes a + b x B seconds: a for what every step costs (launches, Python, weights), b for what every
sequence adds. Output tok/s are B / (a + b x B), so two rates at two batches give a and b. A child that costs as much a
step as its parent, and that more of fit, then reaches B' / (a + b x B') with the B' that the planner counts: this
isolates what memory alone buys. What it leaves out: cheaper steps (fewer experts, shorter windows), and prompts.
"""

from __future__ import annotations

from dataclasses import dataclass

from puzzle_trtllm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Output tok/s with so many sequences in flight."""

    batch: int
    tokens_per_s: float


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Seconds of a step: fixed_s + per_sequence_s x batch."""

    fixed_s: float
    per_sequence_s: float

    def tokens_per_s(self, batch: int) -> float:
        """Output tok/s with `batch` sequences in flight."""
        return batch / (self.fixed_s + self.per_sequence_s * batch)


def fit_step_cost(one: Measured, other: Measured) -> StepCost:
    """Both constants from two rates. Raises ConfigError when they are not of such a machine."""
    if one.batch == other.batch or min(one.tokens_per_s, other.tokens_per_s) <= 0:
        raise ConfigError("needs two positive rates at two batches", key="measurements", found=f"{one}, {other}")
    seconds = one.batch / one.tokens_per_s, other.batch / other.tokens_per_s
    per_sequence = (seconds[1] - seconds[0]) / (other.batch - one.batch)
    fixed = seconds[0] - per_sequence * one.batch
    if per_sequence < 0 or fixed < 0:
        raise ConfigError("rates that no step of a + b x B seconds gives", key="measurements", found=f"{one}, {other}")
    return StepCost(fixed_s=fixed, per_sequence_s=per_sequence)
