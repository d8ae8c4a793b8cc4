"""The accuracy-speed frontier: every engine at every effort as a point, and which of them are dominated.

A point is dominated when another is at least as accurate and at least as fast, and better in one of the two: nobody
who has both engines would choose it. Points are estimates, so each also says in which share of the resamples (of
problems and of rounds) it is dominated: near 0 or 1 the verdict is safe, near a half it is chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from puzzle_trtllm.serve.metrics.bootstrap import RESAMPLES, Array, resampled_medians
from puzzle_trtllm.serve.report.measurement import EngineMeasurement
from puzzle_trtllm.serve.report.resampling import resample_efforts


@dataclass(frozen=True, kw_only=True)
class FrontierPoint:
    """One engine at one effort."""

    engine: str
    effort: str
    requests_per_s: float
    accuracy: float
    dominated_by: tuple[tuple[str, str], ...]
    """(engine, effort) of every point that is better."""
    dominated_share: float | None
    """Of the resamples; None without single answers."""

    @property
    def is_on_frontier(self) -> bool:
        return not self.dominated_by


def frontier_of(engines: Sequence[EngineMeasurement]) -> tuple[FrontierPoint, ...]:
    """All points, engines and efforts in their order."""
    places = [(engine, effort) for engine in engines for effort in engine.efforts]
    points = [(engine.requests_per_s(effort), engine.efforts[effort].accuracy) for engine, effort in places]
    shares = _dominated_shares(engines)
    return tuple(
        FrontierPoint(
            engine=engine.name,
            effort=effort,
            requests_per_s=rate,
            accuracy=accuracy,
            dominated_by=tuple(
                (other.name, other_effort)
                for (other, other_effort), point in zip(places, points, strict=True)
                if dominates(point, (rate, accuracy))
            ),
            dominated_share=None if shares is None else shares[index],
        )
        for index, ((engine, effort), (rate, accuracy)) in enumerate(zip(places, points, strict=True))
    )


def dominates(a: tuple[float, float], b: tuple[float, float]) -> bool:
    """Whether `a` is at least as good as `b` in both and better in one."""
    return a[0] >= b[0] and a[1] >= b[1] and a != b


def _dominated_shares(engines: Sequence[EngineMeasurement]) -> list[float] | None:
    resampled = resample_efforts(engines)
    places = [(engine, effort) for engine in engines for effort in engine.efforts]
    if any((engine.name, effort) not in resampled for engine, effort in places):
        return None
    speeds = {engine.name: _speeds(engine, engines) for engine in engines}
    rates = [speeds[e.name] / resampled[e.name, effort].mean_output_tokens for e, effort in places]
    accuracies = [resampled[e.name, effort].accuracy for e, effort in places]
    shares = []
    for index in range(len(places)):
        beaten = np.zeros(RESAMPLES, dtype=bool)
        for other in range(len(places)):
            no_worse = (rates[other] >= rates[index]) & (accuracies[other] >= accuracies[index])
            better = (rates[other] > rates[index]) | (accuracies[other] > accuracies[index])
            beaten |= no_worse & better
        shares.append(float(beaten.mean()))
    return shares


def _speeds(engine: EngineMeasurement, engines: Sequence[EngineMeasurement]) -> Array:
    """Resampled median throughput; engines that were measured in turn are drawn together."""
    group = [other is engine or other.was_measured_in_turn_with(engine) for other in engines]
    return resampled_medians(engine.output_tokens_per_s.rounds, stream=group.index(True))
