"""report.json: the engines by name, each with its measurements, and the child with its ratios to every baseline.

The child's ratios to the first baseline stand directly under it (`per_token_speedup`, and in each effort
`relative_request_rate` and `accuracy_retention`); the same keys against another baseline stand under `vs_<name>`. A
ratio that does not exist is null, with the reason beside it under `<key>_reason`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from puzzle_trtllm.serve.metrics.statistics import Ratio, Spread
from puzzle_trtllm.serve.report.compare import Comparison
from puzzle_trtllm.serve.report.measurement import EffortMeasurement, EngineMeasurement

RESERVED_KEYS = ("kind", "schema_version", "report", "scenario", "notes", "definitions", "extra")
"""Top-level keys that no engine may be named after."""

DEFINITIONS: Mapping[str, str] = {
    "output_tokens_per_s": "generated tokens / wall time of the steady window; median over interleaved rounds",
    "per_token_speedup": "child output_tokens_per_s / baseline output_tokens_per_s",
    "mean_output_tokens": "generated tokens / answered problems at one reasoning effort",
    "requests_per_s": "output_tokens_per_s / mean_output_tokens: request-level efficiency",
    "measured_requests_per_s": "answered problems / wall time of the evaluation run",
    "relative_request_rate": "child requests_per_s / baseline requests_per_s at the same effort",
    "accuracy": "right answers / answered problems, with Wilson's 95% interval",
    "accuracy_retention": "child accuracy / baseline accuracy at the same effort",
    "weight_bytes": "bytes of all tensors of the served checkpoint",
    "kv_bytes_per_sequence": "sum over layers of min(window, n) x 2 x KV heads x head size x bytes a value, "
    "at n = kv_sequence_tokens",
    "memory_bytes": "what the engine was given for weights and KV cache together",
    "sequences_held": "(memory_bytes - weight_bytes) / kv_bytes_per_sequence, rounded down",
}


def report_document(
    engines: Sequence[EngineMeasurement],
    comparisons: Sequence[Comparison],
    *,
    child: str,
    notes: Sequence[str],
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of report.json."""
    document: dict[str, Any] = {
        "kind": "report",
        "schema_version": 1,
        "report": {"child": child, "baselines": [comparison.baseline for comparison in comparisons]},
        "scenario": engines[0].scenario.model_dump(),
        "notes": list(notes),
        "definitions": dict(DEFINITIONS),
        "extra": dict(extra),
    }
    for engine in engines:
        document[engine.name] = _engine_entry(engine)
    first, *others = comparisons
    _merge(document[child], comparison_entry(first))
    for comparison in others:
        document[child][f"vs_{comparison.baseline}"] = comparison_entry(comparison)
    return document


def _engine_entry(engine: EngineMeasurement) -> dict[str, Any]:
    return {
        "runtime": engine.runtime,
        "kv_dtype": engine.kv_dtype,
        "kv_fold": engine.kv_fold,
        "weight_bytes": engine.weight_bytes,
        "memory_bytes": engine.memory_bytes,
        "kv_bytes_per_sequence": engine.kv_bytes_per_sequence,
        "kv_sequence_tokens": engine.kv_sequence_tokens,
        "sequences_held": engine.sequences_held,
        **_spread_entry("output_tokens_per_s", engine.output_tokens_per_s),
        **_spread_entry("uncapped_output_tokens_per_s", engine.uncapped_output_tokens_per_s),
        "latencies": {tag: asdict(distribution) for tag, distribution in engine.latencies.items()},
        "requests": asdict(engine.requests),
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
        **_ratio_entry("weight_bytes_ratio", comparison.weight_bytes_ratio),
        **_ratio_entry("kv_bytes_per_sequence_ratio", comparison.kv_bytes_per_sequence_ratio),
        "efforts": {
            effort: {
                **_ratio_entry("relative_request_rate", result.relative_request_rate),
                **_ratio_entry("accuracy_retention", result.accuracy_retention),
                **_ratio_entry("relative_output_tokens", result.relative_output_tokens),
            }
            for effort, result in comparison.efforts.items()
        },
    }
    if comparison.uncapped_per_token_speedup is not None:
        entry |= _ratio_entry("uncapped_per_token_speedup", comparison.uncapped_per_token_speedup)
    return entry


def _ratio_entry(key: str, ratio: Ratio) -> dict[str, Any]:
    return {key: ratio.value} if ratio.reason is None else {key: None, f"{key}_reason": ratio.reason}


def _merge(target: dict[str, Any], source: Mapping[str, Any]) -> None:
    """Add `source` to `target`, descending into objects that both have."""
    for key, value in source.items():
        if isinstance(value, Mapping) and isinstance(target.get(key), dict):
            _merge(target[key], value)
        else:
            target[key] = value
