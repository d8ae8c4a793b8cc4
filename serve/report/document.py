"""report.json: the engines by name, each with its measurements, and the child with its ratios to every baseline.

The child's ratios to the first baseline stand directly under it (`per_token_speedup`, and in each effort
`relative_request_rate` and `accuracy_retention`); the same keys against another baseline stand under `vs_<name>`. A
ratio that does not exist is null, with the reason beside it under `<key>_reason`; its 95% interval stands under
`<key>_interval`, or null with `<key>_interval_reason`. `frontier` has every engine at every effort.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from puzzle_trtllm.serve.metrics.statistics import Ratio, Spread
from puzzle_trtllm.serve.report.compare import Comparison
from puzzle_trtllm.serve.report.frontier import FrontierPoint
from puzzle_trtllm.serve.report.measurement import EffortMeasurement, EngineMeasurement

RESERVED_KEYS = ("kind", "schema_version", "report", "scenario", "notes", "definitions", "frontier", "extra")
"""Top-level keys that no engine may be named after."""

DEFINITIONS: Mapping[str, str] = {
    "output_tokens_per_s": "generated tokens / wall time of the steady window; median over interleaved rounds",
    "per_token_speedup": "child output_tokens_per_s / baseline output_tokens_per_s",
    "per_gpu_speedup": "the same of output_tokens_per_s / (num_ranks x num_instances); only where these differ",
    "per_token_speedup_range": "lowest and highest ratio of rounds measured in turn; null for rounds that were not",
    "mean_output_tokens": "generated tokens / answered problems at one reasoning effort",
    "requests_per_s": "output_tokens_per_s / mean_output_tokens: request-level efficiency; the throughput is the "
    "scenario's, whose answers may be longer or shorter than an effort's",
    "measured_requests_per_s": "answered problems / wall time of the evaluation run",
    "relative_request_rate": "child requests_per_s / baseline requests_per_s at the same effort (same-effort "
    "normalisation)",
    "relative_request_rate_to_high": "child requests_per_s / baseline requests_per_s at its high effort (high-effort "
    "normalisation)",
    "relative_output_tokens": "child mean_output_tokens / baseline mean_output_tokens at the same effort",
    "break_even_length_ratio": "relative_output_tokens at which the request rates are equal: per_token_speedup, taking "
    "throughput as measured (longer answers also fill the KV cache, so the true limit lies below)",
    "length_headroom": "break_even_length_ratio / relative_output_tokens - 1: how much longer than now answers may get",
    "..._interval": "95%, percentiles of 4000 seeded resamples: problems in pairs for child and baseline, and rounds "
    "where throughput is part of the ratio (a single round adds nothing to the interval)",
    "frontier": "dominated: another engine or effort is at least as fast and as accurate, and better in one; "
    "dominated_share: in how many of the resamples",
    "accuracy": "right answers / answered problems, with Wilson's 95% interval",
    "accuracy_retention": "child accuracy / baseline accuracy at the same effort",
    "weight_bytes": "bytes of all tensors of the served checkpoint",
    "kv_bytes_per_sequence": "sum over layers of min(window, n) x 2 x KV heads x head size x bytes a value, "
    "at n = kv_sequence_tokens",
    "memory_bytes": "what the engine was given for weights and KV cache together, on each of its GPUs",
    "sequences_held": "(memory_bytes - weight_bytes) / kv_bytes_per_sequence, rounded down; null without a cap, and "
    "for an engine on several GPUs",
    "latencies": "of the round with the median output_tokens_per_s (of two in the middle the faster one), all requests "
    "answered in it",
    "requests": "how the requests of all rounds ended; under an effort, of its problems",
    "num_ranks": "GPUs that share one engine, or processes of the reference runtime; num_instances: such engines",
}


def report_document(
    engines: Sequence[EngineMeasurement],
    comparisons: Sequence[Comparison],
    *,
    child: str,
    notes: Sequence[str],
    extra: Mapping[str, Any],
    frontier: Sequence[FrontierPoint] = (),
) -> dict[str, Any]:
    """The content of report.json."""
    document: dict[str, Any] = {
        "kind": "report",
        "schema_version": 1,
        "report": {"child": child, "baselines": [comparison.baseline for comparison in comparisons]},
        "scenario": engines[0].scenario.model_dump(),
        "notes": list(notes),
        "definitions": dict(DEFINITIONS),
        "frontier": [_point_entry(point) for point in frontier],
        "extra": dict(extra),
    }
    for engine in engines:
        document[engine.name] = _engine_entry(engine)
    first, *others = comparisons
    _merge(document[child], comparison_entry(first))
    for comparison in others:
        document[child][f"vs_{comparison.baseline}"] = comparison_entry(comparison)
    return document


def _point_entry(point: FrontierPoint) -> dict[str, Any]:
    return {
        "engine": point.engine,
        "effort": point.effort,
        "requests_per_s": point.requests_per_s,
        "accuracy": point.accuracy,
        "on_frontier": point.is_on_frontier,
        "dominated_by": [{"engine": engine, "effort": effort} for engine, effort in point.dominated_by],
        "dominated_share": point.dominated_share,
    }


def _engine_entry(engine: EngineMeasurement) -> dict[str, Any]:
    return {
        "runtime": engine.runtime,
        "kv_dtype": engine.kv_dtype,
        "kv_fold": engine.kv_fold,
        "weight_bytes": engine.weight_bytes,
        "memory_bytes": engine.memory_bytes,
        "num_ranks": engine.num_ranks,
        "num_instances": engine.num_instances,
        "kv_bytes_per_sequence": engine.kv_bytes_per_sequence,
        "kv_sequence_tokens": engine.kv_sequence_tokens,
        "sequences_held": engine.sequences_held,
        **_spread_entry("output_tokens_per_s", engine.output_tokens_per_s),
        **_spread_entry("uncapped_output_tokens_per_s", engine.uncapped_output_tokens_per_s),
        "latencies": {tag: asdict(distribution) for tag, distribution in engine.latencies.items()},
        "requests": asdict(engine.requests),
        "busiest_client_cpu": engine.busiest_client_cpu,
        "lengths": engine.lengths,
        "token_counts": engine.token_counts,
        "evaluation": engine.evaluation.model_dump() if engine.evaluation else None,
        "efforts": {effort: _effort_entry(engine, effort, result) for effort, result in engine.efforts.items()},
        "blocks": [block.model_dump() for block in engine.blocks],
        "provenance": engine.provenance.model_dump(),
    }


def _spread_entry(key: str, spread: Spread | None) -> dict[str, Any]:
    if spread is None:
        return {}
    return {key: spread.median, f"{key}_range": [spread.low, spread.high], f"{key}_rounds": list(spread.rounds)}


def _effort_entry(engine: EngineMeasurement, effort: str, result: EffortMeasurement) -> dict[str, Any]:
    return {
        "accuracy": result.accuracy,
        "accuracy_interval": [result.accuracy_low, result.accuracy_high],
        "mean_output_tokens": result.mean_output_tokens,
        "requests_per_s": engine.requests_per_s(effort),
        "measured_requests_per_s": result.measured_requests_per_s,
        "requests": asdict(result.requests),
    }


def comparison_entry(comparison: Comparison) -> dict[str, Any]:
    """The ratios to one baseline."""
    entry: dict[str, Any] = {
        **_ratio_entry("per_token_speedup", comparison.per_token_speedup),
        "per_token_speedup_range": comparison.per_token_speedup_range and list(comparison.per_token_speedup_range),
        **_ratio_entry("break_even_length_ratio", comparison.break_even_length_ratio),
        **_ratio_entry("weight_bytes_ratio", comparison.weight_bytes_ratio),
        **_ratio_entry("kv_bytes_per_sequence_ratio", comparison.kv_bytes_per_sequence_ratio),
        "efforts": {
            effort: {
                **_ratio_entry("relative_request_rate", result.relative_request_rate),
                **_ratio_entry("relative_request_rate_to_high", result.relative_request_rate_to_high),
                **_ratio_entry("accuracy_retention", result.accuracy_retention),
                **_ratio_entry("relative_output_tokens", result.relative_output_tokens),
                "length_headroom": result.length_headroom,
            }
            for effort, result in comparison.efforts.items()
        },
    }
    if comparison.per_gpu_speedup is not None:
        entry |= _ratio_entry("per_gpu_speedup", comparison.per_gpu_speedup)
    if comparison.uncapped_per_token_speedup is not None:
        entry |= _ratio_entry("uncapped_per_token_speedup", comparison.uncapped_per_token_speedup)
    return entry


def _ratio_entry(key: str, ratio: Ratio) -> dict[str, Any]:
    if ratio.reason is not None:
        return {key: None, f"{key}_reason": ratio.reason}
    entry: dict[str, Any] = {key: ratio.value}
    if ratio.interval is None:
        return entry
    if ratio.interval.reason is not None:
        return entry | {f"{key}_interval": None, f"{key}_interval_reason": ratio.interval.reason}
    return entry | {f"{key}_interval": [ratio.interval.low, ratio.interval.high]}


def _merge(target: dict[str, Any], source: Mapping[str, Any]) -> None:
    """Add `source` to `target`, descending into objects that both have."""
    for key, value in source.items():
        if isinstance(value, Mapping) and isinstance(target.get(key), dict):
            _merge(target[key], value)
        else:
            target[key] = value
