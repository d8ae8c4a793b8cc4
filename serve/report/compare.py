"""A child against one baseline: the ratios, and the refusal to form them where they would mean nothing.

    per_token_speedup       child tok/s / baseline tok/s (medians)
    requests_per_s          tok/s / mean tokens generated per request, at one reasoning effort
    relative_request_rate   child requests_per_s / baseline requests_per_s, at the same effort
    accuracy_retention      child accuracy / baseline accuracy, at the same effort

The second pair is what users pay for: a child that is 2x faster per token and writes 2x longer traces answers no more
requests than its parent. A ratio over 0 is None, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from puzzle_trtllm.errors import BenchError
from puzzle_trtllm.serve.metrics.statistics import Ratio, Spread
from puzzle_trtllm.serve.report.assemble import same_load
from puzzle_trtllm.serve.report.measurement import EngineMeasurement


@dataclass(frozen=True, kw_only=True)
class EffortComparison:
    """One reasoning effort."""

    relative_request_rate: Ratio
    accuracy_retention: Ratio
    relative_output_tokens: Ratio
    """Child's mean tokens / baseline's: how much longer (or shorter) its answers are."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A child against one baseline."""

    baseline: str
    per_token_speedup: Ratio
    per_token_speedup_range: tuple[float, float] | None
    """Lowest and highest ratio of rounds measured in turn; None when the rounds do not pair up."""
    uncapped_per_token_speedup: Ratio | None
    """Without the memory cap; None when either was not measured so."""
    weight_bytes_ratio: Ratio
    kv_bytes_per_sequence_ratio: Ratio
    efforts: Mapping[str, EffortComparison]


def compare(child: EngineMeasurement, baseline: EngineMeasurement) -> Comparison:
    """Form every ratio of `child` to `baseline`. Raises BenchError when the two cannot be compared."""
    check_comparable(child, baseline)
    silent = f"{baseline.name} generated no tokens"
    return Comparison(
        baseline=baseline.name,
        per_token_speedup=_speedup(child.output_tokens_per_s, baseline.output_tokens_per_s, silent),
        per_token_speedup_range=_paired_range(child.output_tokens_per_s, baseline.output_tokens_per_s),
        uncapped_per_token_speedup=(
            _speedup(child.uncapped_output_tokens_per_s, baseline.uncapped_output_tokens_per_s, silent)
            if child.uncapped_output_tokens_per_s and baseline.uncapped_output_tokens_per_s
            else None
        ),
        weight_bytes_ratio=Ratio.of(child.weight_bytes, baseline.weight_bytes, zero_reason="no weights"),
        kv_bytes_per_sequence_ratio=Ratio.of(
            child.kv_bytes_per_sequence, baseline.kv_bytes_per_sequence, zero_reason="no KV cache"
        ),
        efforts={effort: _compare_effort(child, baseline, effort, silent) for effort in child.efforts},
    )


def _compare_effort(
    child: EngineMeasurement, baseline: EngineMeasurement, effort: str, silent: str
) -> EffortComparison:
    ours, theirs = child.efforts[effort], baseline.efforts[effort]
    return EffortComparison(
        relative_request_rate=Ratio.of(
            child.requests_per_s(effort), baseline.requests_per_s(effort), zero_reason=silent
        ),
        accuracy_retention=Ratio.of(
            ours.accuracy, theirs.accuracy, zero_reason=f"{baseline.name} solved no problem at {effort} effort"
        ),
        relative_output_tokens=Ratio.of(ours.mean_output_tokens, theirs.mean_output_tokens, zero_reason=silent),
    )


def _speedup(child: Spread, baseline: Spread, zero_reason: str) -> Ratio:
    return Ratio.of(child.median, baseline.median, zero_reason=zero_reason)


def _paired_range(child: Spread, baseline: Spread) -> tuple[float, float] | None:
    if len(child.rounds) != len(baseline.rounds) or 0 in baseline.rounds:
        return None
    ratios = [ours / theirs for ours, theirs in zip(child.rounds, baseline.rounds, strict=True)]
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
            found=_describe(child),
            expected=_describe(baseline),
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


def _describe(engine: EngineMeasurement) -> str:
    s = engine.scenario
    return f"{s.name} {s.input_tokens}/{s.output_tokens} at {s.concurrency}, {s.num_requests} requests"


def _check_evaluations(child: EngineMeasurement, baseline: EngineMeasurement) -> None:
    missing = [effort for effort in child.efforts if effort not in baseline.efforts]
    lost = [effort for effort in baseline.efforts if effort not in child.efforts]
    for engine, efforts in ((baseline, missing), (child, lost)):
        if efforts:
            raise BenchError("missing metric: not evaluated at this effort", file=engine.name, key=efforts[0])
    if child.evaluation is None or baseline.evaluation is None:
        return
    for key in ("problems_fingerprint", "grader", "max_tokens"):
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
