"""A child against one baseline: the ratios, and the refusal to form them where they would mean nothing.

    per_token_speedup       child tok/s / baseline tok/s (medians)
    per_gpu_speedup         the same of tok/s a GPU, where the two ran on different numbers of GPUs (or ranks)
    requests_per_s          tok/s / mean tokens generated per request, at one reasoning effort
    relative_request_rate   child requests_per_s / baseline requests_per_s, at the same effort
    relative_request_rate_to_high   the same, but / baseline requests_per_s at its HIGH effort: the paper's other axis
    accuracy_retention      child accuracy / baseline accuracy, at the same effort
    break_even_length_ratio how long the child's answers may be, relative to the baseline's, until no request is gained:
                            request rate = speedup / length ratio, so it is the per-token speedup itself
    length_headroom         how much longer than now they may still become (0.6: by 60%)

Ratios carry 95% intervals (metrics/bootstrap.py): problems are resampled in pairs, and rounds with them where
throughput is part of the ratio (in pairs too if they were measured in turn).

The second pair is what users pay for: a child that is 2x faster per token and writes 2x longer traces answers no more
requests than its parent. A ratio over 0 is None, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from puzzle_trtllm.errors import BenchError
from puzzle_trtllm.serve.metrics.bootstrap import Array, Interval, percentile_interval, ratio_of, resampled_medians
from puzzle_trtllm.serve.metrics.statistics import Ratio, Spread
from puzzle_trtllm.serve.report.assemble import describe_load, same_load
from puzzle_trtllm.serve.report.measurement import EngineMeasurement
from puzzle_trtllm.serve.report.resampling import NO_OUTCOMES, ResampledEffort, resample_efforts

HIGH = "high"


@dataclass(frozen=True, kw_only=True)
class EffortComparison:
    """One reasoning effort."""

    relative_request_rate: Ratio
    """To the baseline at the same effort."""
    relative_request_rate_to_high: Ratio
    """To the baseline at high effort."""
    accuracy_retention: Ratio
    relative_output_tokens: Ratio
    """Child's mean tokens / baseline's: how much longer (or shorter) its answers are."""

    @property
    def length_headroom(self) -> float | None:
        """How much longer the child's answers may become until no request is gained; negative: too long."""
        rate = self.relative_request_rate.value
        return None if rate is None else rate - 1


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A child against one baseline."""

    baseline: str
    per_token_speedup: Ratio
    per_gpu_speedup: Ratio | None
    """Of the throughputs a GPU; None when both ran on as many, where it is the per-token speedup."""
    per_token_speedup_range: tuple[float, float] | None
    """Lowest and highest ratio of rounds measured in turn; None when they were not measured in turn."""
    break_even_length_ratio: Ratio
    """Child's mean tokens / baseline's at which the request rates are equal: the per-token speedup."""
    uncapped_per_token_speedup: Ratio | None
    """Without the memory cap; None when either was not measured so."""
    weight_bytes_ratio: Ratio
    kv_bytes_per_sequence_ratio: Ratio
    efforts: Mapping[str, EffortComparison]


def compare(child: EngineMeasurement, baseline: EngineMeasurement) -> Comparison:
    """Form every ratio of `child` to `baseline`. Raises BenchError when the two cannot be compared."""
    check_comparable(child, baseline)
    silent = f"{baseline.name} generated no tokens"
    draws = _Draws(child, baseline)
    speedup = _speedup(child.output_tokens_per_s, baseline.output_tokens_per_s, silent)
    speedup = replace(speedup, interval=draws.speedup_interval())
    return Comparison(
        baseline=baseline.name,
        per_token_speedup=speedup,
        per_gpu_speedup=_per_gpu_speedup(child, baseline, silent),
        break_even_length_ratio=speedup,
        per_token_speedup_range=paired_range(child, baseline),
        uncapped_per_token_speedup=(
            _speedup(child.uncapped_output_tokens_per_s, baseline.uncapped_output_tokens_per_s, silent)
            if child.uncapped_output_tokens_per_s and baseline.uncapped_output_tokens_per_s
            else None
        ),
        weight_bytes_ratio=Ratio.of(child.weight_bytes, baseline.weight_bytes, zero_reason="no weights"),
        kv_bytes_per_sequence_ratio=Ratio.of(
            child.kv_bytes_per_sequence, baseline.kv_bytes_per_sequence, zero_reason="no KV cache"
        ),
        efforts={effort: _compare_effort(child, baseline, effort, silent, draws) for effort in child.efforts},
    )


def _compare_effort(
    child: EngineMeasurement, baseline: EngineMeasurement, effort: str, silent: str, draws: _Draws
) -> EffortComparison:
    ours, theirs = child.efforts[effort], baseline.efforts[effort]
    rate = Ratio.of(child.requests_per_s(effort), baseline.requests_per_s(effort), zero_reason=silent)
    to_high = Ratio(value=None, reason=f"{baseline.name} was not evaluated at {HIGH} effort")
    if HIGH in baseline.efforts:
        to_high = Ratio.of(child.requests_per_s(effort), baseline.requests_per_s(HIGH), zero_reason=silent)
    unsolved = f"{baseline.name} solved no problem at {effort} effort"
    retention = Ratio.of(ours.accuracy, theirs.accuracy, zero_reason=unsolved)
    lengths = Ratio.of(ours.mean_output_tokens, theirs.mean_output_tokens, zero_reason=silent)
    return EffortComparison(
        relative_request_rate=draws.with_interval(rate, lambda: draws.rate(effort, effort)),
        relative_request_rate_to_high=draws.with_interval(to_high, lambda: draws.rate(effort, HIGH)),
        accuracy_retention=draws.with_interval(retention, lambda: draws.retention(effort)),
        relative_output_tokens=draws.with_interval(lengths, lambda: 1 / draws.shortening(effort, effort)),
    )


class _Draws:
    """Resampled ratios of one pair of engines."""

    def __init__(self, child: EngineMeasurement, baseline: EngineMeasurement) -> None:
        resampled = resample_efforts([child, baseline])
        self._ours, self._theirs = _by_effort(child, resampled), _by_effort(baseline, resampled)
        self._rounds = (child.output_tokens_per_s.rounds, baseline.output_tokens_per_s.rounds)
        self._baseline_stream = 0 if child.was_measured_in_turn_with(baseline) else 1

    def speedup_interval(self) -> Interval:
        if min(map(len, self._rounds)) < 2:
            return Interval(reason="throughput was measured in a single round")
        return percentile_interval(self._speedup())

    def rate(self, effort: str, baseline_effort: str) -> Array:
        return self._speedup() * self.shortening(effort, baseline_effort)

    def retention(self, effort: str) -> Array:
        return ratio_of(self._ours[effort].accuracy, self._theirs[effort].accuracy)

    def shortening(self, effort: str, baseline_effort: str) -> Array:
        """Baseline's tokens / child's."""
        return ratio_of(self._theirs[baseline_effort].mean_output_tokens, self._ours[effort].mean_output_tokens)

    @staticmethod
    def with_interval(ratio: Ratio, replicates: Callable[[], Array]) -> Ratio:
        """`ratio`, if it exists, with the interval of its resamples."""
        if ratio.value is None:
            return ratio
        try:
            return replace(ratio, interval=percentile_interval(replicates()))
        except KeyError:
            return replace(ratio, interval=Interval(reason=NO_OUTCOMES))

    def _speedup(self) -> Array:
        ours, theirs = self._rounds
        return ratio_of(resampled_medians(ours), resampled_medians(theirs, stream=self._baseline_stream))


def _by_effort(
    engine: EngineMeasurement, resampled: Mapping[tuple[str, str], ResampledEffort]
) -> dict[str, ResampledEffort]:
    return {effort: resampled[name, effort] for name, effort in resampled if name == engine.name}


def _speedup(child: Spread, baseline: Spread, zero_reason: str) -> Ratio:
    return Ratio.of(child.median, baseline.median, zero_reason=zero_reason)


def _per_gpu_speedup(child: EngineMeasurement, baseline: EngineMeasurement, silent: str) -> Ratio | None:
    if child.total_ranks == baseline.total_ranks:
        return None
    ours, theirs = (engine.output_tokens_per_s.median / engine.total_ranks for engine in (child, baseline))
    return Ratio.of(ours, theirs, zero_reason=silent)


def paired_range(child: EngineMeasurement, baseline: EngineMeasurement) -> tuple[float, float] | None:
    """Lowest and highest throughput ratio of rounds measured in turn; None when they were not, or a baseline's is 0."""
    ours, theirs = child.output_tokens_per_s.rounds, baseline.output_tokens_per_s.rounds
    if not child.was_measured_in_turn_with(baseline) or 0 in theirs:
        return None
    ratios = [our / their for our, their in zip(ours, theirs, strict=True)]
    return min(ratios), max(ratios)


def check_comparable(child: EngineMeasurement, baseline: EngineMeasurement) -> None:
    """Raises BenchError in one line when a comparison would mislead."""
    for engine in (baseline, child):
        if not engine.requests.answered:
            raise BenchError(f"zero successful requests ({engine.requests})", file=engine.name)
    if not same_load(child.scenario, baseline.scenario):
        raise BenchError(
            f"measured under another scenario than {baseline.name}",
            file=child.name,
            key="scenario",
            found=describe_load(child.scenario),
            expected=describe_load(baseline.scenario),
        )
    if child.kv_sequence_tokens != baseline.kv_sequence_tokens:
        raise BenchError(
            f"KV bytes are stated at another length than {baseline.name}'s",
            file=child.name,
            key="kv_sequence_tokens",
            found=child.kv_sequence_tokens,
            expected=baseline.kv_sequence_tokens,
        )
    _check_evaluations(child, baseline)
    _check_roles(child, baseline)


def _check_evaluations(child: EngineMeasurement, baseline: EngineMeasurement) -> None:
    missing = [effort for effort in child.efforts if effort not in baseline.efforts]
    lost = [effort for effort in baseline.efforts if effort not in child.efforts]
    for engine, efforts in ((baseline, missing), (child, lost)):
        if efforts:
            raise BenchError("missing metric: not evaluated at this effort", file=engine.name, key=efforts[0])
    if child.evaluation is None or baseline.evaluation is None:
        return
    for key in ("problems_fingerprint", "grader", "max_tokens", "decoding"):
        found, expected = getattr(child.evaluation, key), getattr(baseline.evaluation, key)
        if found != expected:
            raise BenchError(
                f"evaluated differently from {baseline.name}", file=child.name, key=key, found=found, expected=expected
            )


def _check_roles(child: EngineMeasurement, baseline: EngineMeasurement) -> None:
    """A Puzzle child never has more experts than its parent in any layer."""
    if len(child.blocks) != len(baseline.blocks):
        raise BenchError(
            f"not a child of {baseline.name}: another number of layers",
            file=child.name,
            found=len(child.blocks),
            expected=len(baseline.blocks),
        )
    for layer, (ours, theirs) in enumerate(zip(child.blocks, baseline.blocks, strict=True)):
        if ours.num_local_experts > theirs.num_local_experts:
            raise BenchError(
                f"more experts than in {baseline.name}: are child and baseline swapped?",
                file=child.name,
                key=f"layer {layer}",
                found=ours.num_local_experts,
                expected=f"at most {theirs.num_local_experts}",
            )
