"""Resampled accuracies and lengths of every engine at every effort, all from the same draws of problems.

One draw serves all: a problem that is drawn counts for each engine and each effort, so that differences between them
are paired. Engines of measurements that keep no single answers have no resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from puzzle_trtllm.serve.metrics.bootstrap import Array, draw_counts, ratio_of
from puzzle_trtllm.serve.report.measurement import EffortMeasurement, EngineMeasurement

NO_OUTCOMES = "the measurement keeps no single answers"


@dataclass(frozen=True, kw_only=True)
class ResampledEffort:
    """One engine at one effort; NaN in resamples without an answered problem."""

    accuracy: Array
    mean_output_tokens: Array


def resample_efforts(engines: Sequence[EngineMeasurement]) -> Mapping[tuple[str, str], ResampledEffort]:
    """(engine, effort) -> its resamples; efforts without single answers are left out."""
    efforts = {(engine.name, name): effort for engine in engines for name, effort in engine.efforts.items()}
    problems = sorted({problem for effort in efforts.values() for problem in effort.outcomes})
    if not problems:
        return {}
    counts = draw_counts(len(problems))
    return {key: _resample(effort, problems, counts) for key, effort in efforts.items() if effort.outcomes}


def _resample(effort: EffortMeasurement, problems: list[str], counts: Array) -> ResampledEffort:
    absent = (False, 0)
    answered = np.array([problem in effort.outcomes for problem in problems], dtype=np.float64)
    correct = np.array([effort.outcomes.get(problem, absent)[0] for problem in problems], dtype=np.float64)
    tokens = np.array([effort.outcomes.get(problem, absent)[1] for problem in problems], dtype=np.float64)
    drawn = counts @ answered
    return ResampledEffort(
        accuracy=ratio_of(counts @ correct, drawn), mean_output_tokens=ratio_of(counts @ tokens, drawn)
    )
