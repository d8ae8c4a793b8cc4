"""From an engine folder, its bench rounds and its evaluation to the one record that reports compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from puzzle_trtllm.engine import Engine
from puzzle_trtllm.errors import BenchError
from puzzle_trtllm.parallelism import Parallelism
from puzzle_trtllm.scenario import Scenario
from puzzle_trtllm.scenario import Spread as LengthSpread
from puzzle_trtllm.serve.bench.result import BenchResult, Turn
from puzzle_trtllm.serve.evaluate.result import EffortResult, EvaluationResult
from puzzle_trtllm.serve.metrics.provenance import EngineProvenance, Provenance, differing_versions
from puzzle_trtllm.serve.metrics.records import RequestCounts
from puzzle_trtllm.serve.metrics.statistics import Spread
from puzzle_trtllm.serve.report.measurement import EffortMeasurement, EngineMeasurement, EvaluationFacts, LayerBlock

LOAD_FIELDS = (
    "input_tokens",
    "output_tokens",
    "input_spread",
    "output_spread",
    "concurrency",
    "num_requests",
    "trace",
)


def assemble_measurement(
    name: str,
    *,
    engine: str | Path | Engine,
    rounds: Sequence[BenchResult],
    evaluation: EvaluationResult | None = None,
    uncapped_rounds: Sequence[BenchResult] | None = None,
) -> EngineMeasurement:
    """Put together what is known of one engine.

    rounds: the bench results of the engine itself; uncapped_rounds: of the same model without a memory cap.
    Raises EngineError for a bad engine folder, BenchError for no rounds, rounds of different scenarios, or results
    that say they were measured on another engine.
    """
    rounds, turns = _in_turn(rounds)
    opened = engine if isinstance(engine, Engine) else Engine.open(engine)
    results: dict[str, BenchResult | EvaluationResult] = {f"{name}, round {i}": r for i, r in enumerate(rounds, 1)}
    check_engine(opened, results if evaluation is None else results | {f"{name}, evaluation": evaluation})
    scenario = _one_scenario(name, [*rounds, *(uncapped_rounds or [])])
    manifest, architecture = opened.manifest, opened.architecture
    tokens = scenario.sequence_tokens
    median_round = sorted(rounds, key=lambda r: r.output_tokens_per_s)[len(rounds) // 2]
    return EngineMeasurement(
        name=name,
        runtime=manifest.runtime,
        kv_dtype=manifest.kv_dtype,
        kv_fold=manifest.kv_fold.mode,
        blocks=[LayerBlock.model_validate(block.to_json()) for block in architecture.blocks],
        weight_bytes=manifest.weight_bytes,
        memory_bytes=manifest.memory_bytes,
        num_ranks=Parallelism.from_llm_args(opened.llm_args).tensor,
        num_instances=median_round.num_instances or 1,
        kv_bytes_per_sequence=architecture.kv_bytes_per_sequence(tokens, manifest.kv_dtype),
        kv_sequence_tokens=tokens,
        scenario=scenario,
        output_tokens_per_s=Spread.of(r.output_tokens_per_s for r in rounds),
        turns=turns,
        repeats_prompts=_repeats_prompts(opened, rounds),
        mixed_rounds=_mixed_rounds([r.provenance for r in rounds]),
        uncapped_output_tokens_per_s=(
            Spread.of(r.output_tokens_per_s for r in uncapped_rounds) if uncapped_rounds else None
        ),
        latencies=dict(median_round.distributions),
        requests=_sum_counts([r.requests for r in rounds]),
        busiest_client_cpu=max((r.client.busiest_cpu for r in rounds if r.client is not None), default=None),
        lengths=median_round.lengths,
        token_counts=median_round.token_counts,
        evaluation=_evaluation_facts(evaluation) if evaluation else None,
        efforts=_efforts(evaluation) if evaluation else {},
        provenance=median_round.provenance,
    )


def _in_turn(rounds: Sequence[BenchResult]) -> tuple[Sequence[BenchResult], list[Turn] | None]:
    """The rounds in the order of their turns, however their files were given; as they are if one had no turn."""
    by_turn = {(r.turn.comparison, r.turn.round): r for r in rounds if r.turn is not None}
    if not rounds or len(by_turn) != len(rounds):
        return rounds, None
    ordered = [by_turn[key] for key in sorted(by_turn)]
    return ordered, [r.turn for r in ordered if r.turn is not None]


def _repeats_prompts(engine: Engine, rounds: Sequence[BenchResult]) -> bool:
    reuses_prefixes = (engine.llm_args.get("kv_cache_config") or {}).get("enable_block_reuse", True)
    return bool(reuses_prefixes) and len({r.seed for r in rounds}) < len(rounds)


def _mixed_rounds(runs: Sequence[Provenance]) -> list[str]:
    machines = dict.fromkeys(str(run.hardware) for run in runs)
    return [*(machines if len(machines) > 1 else []), *differing_versions(runs)]


def check_engine(engine: Engine, results: Mapping[str, BenchResult | EvaluationResult]) -> None:
    """Raises BenchError naming the first result (its key: what to call it) of another engine than `engine`.

    A result made without naming its engine is believed.
    """
    held = EngineProvenance.of(engine)
    for source, result in results.items():
        measured = result.provenance.engine
        if measured is None:
            continue
        fields = {"manifest"} if measured.llm_args is None else {"manifest", "llm_args"}
        then, now = (each.model_dump(mode="json", include=fields) for each in (measured, held))
        difference = _first_difference(then, now)
        if difference is not None:
            key, found, wanted = difference
            raise BenchError(
                f"measured on another engine than {engine.path} now holds",
                file=source,
                key=f"provenance.engine.{key}",
                found=_shorten(found),
                expected=_shorten(wanted),
            )


def _first_difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """(dotted key, value in a, value in b) of the first key that differs; None when all are equal."""
    for key in {**b, **a}:
        found, expected = a.get(key), b.get(key)
        if isinstance(found, Mapping) and isinstance(expected, Mapping):
            inner = _first_difference(found, expected)
            if inner is not None:
                return f"{key}.{inner[0]}", *inner[1:]
        elif found != expected:
            return key, found, expected
    return None


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _one_scenario(name: str, rounds: Sequence[BenchResult]) -> Scenario:
    if not rounds:
        raise BenchError("no bench results", file=name, expected="at least one round")
    first = rounds[0].scenario
    for result in rounds[1:]:
        if not same_load(first, result.scenario):
            found, expected = describe_load(result.scenario), describe_load(first)
            raise BenchError("rounds of different scenarios", file=name, found=found, expected=expected)
    return first


def same_load(a: Scenario, b: Scenario) -> bool:
    """True when two scenarios put the same load on a server; names, descriptions and warm-ups may differ."""
    return all(getattr(a, field) == getattr(b, field) for field in LOAD_FIELDS)


def describe_load(scenario: Scenario) -> str:
    """Everything that `same_load` looks at, in one line."""
    ways = ((scenario.input_tokens, scenario.input_spread), (scenario.output_tokens, scenario.output_spread))
    lengths = "/".join(_describe_length(mean, spread) for mean, spread in ways)
    line = f"{scenario.name} {lengths} at {scenario.concurrency}, {scenario.num_requests} requests"
    trace = scenario.trace
    if trace is None:
        return line
    blocks = "shared" if trace.shared_blocks else "separate"
    return f"{line} of trace {trace.file} (sha256 {trace.sha256[:12]}, {blocks} blocks)"


def _describe_length(mean: int, spread: LengthSpread | None) -> str:
    if spread is None:
        return str(mean)
    return (
        f"{mean} (uniform {spread.uniform:g})" if spread.uniform is not None else f"{mean} (normal {spread.normal:g})"
    )


def _sum_counts(counts: Sequence[RequestCounts]) -> RequestCounts:
    return RequestCounts(
        completed=sum(c.completed for c in counts),
        truncated=sum(c.truncated for c in counts),
        failed=sum(c.failed for c in counts),
        cancelled=sum(c.cancelled for c in counts),
    )


def _evaluation_facts(evaluation: EvaluationResult) -> EvaluationFacts:
    return EvaluationFacts.model_validate(evaluation.model_dump(include=set(EvaluationFacts.model_fields)))


def _efforts(evaluation: EvaluationResult) -> dict[str, EffortMeasurement]:
    return {effort: _effort(result) for effort, result in evaluation.efforts.items()}


def _effort(result: EffortResult) -> EffortMeasurement:
    facts = result.model_dump(include=set(EffortMeasurement.model_fields))
    outcomes = {
        answer.id: (answer.correct, answer.num_output_tokens)
        for answer in result.answers
        if answer.status in ("completed", "truncated")
    }
    return EffortMeasurement.model_validate(facts | {"outcomes": outcomes})
