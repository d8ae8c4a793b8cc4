"""Engine measurements made up for the report's tests; every number is chosen so that ratios are easy to check."""

from __future__ import annotations

from typing import Any

from puzzle_trtllm.scenario import Scenario
from puzzle_trtllm.serve.bench.result import Turn
from puzzle_trtllm.serve.evaluate.result import EvaluationResult
from puzzle_trtllm.serve.metrics.provenance import Hardware, Provenance
from puzzle_trtllm.serve.metrics.records import RequestCounts
from puzzle_trtllm.serve.metrics.statistics import Distribution, Spread
from puzzle_trtllm.serve.report import EngineMeasurement
from puzzle_trtllm.serve.report.measurement import EffortMeasurement, EvaluationFacts, LayerBlock

SCENARIO = Scenario(name="tiny", input_tokens=128, output_tokens=128, concurrency=32, num_requests=64)
MACHINE = Hardware(cpu_model="test CPU", cpu_cores=2, memory_bytes=8 * 2**30, gpus=[])
PROVENANCE = Provenance(
    created_at="2026-11-23T12:00:00+00:00",
    command_line="puzzle-trtllm demo",
    git_commit=None,
    versions={"python": "3.11"},
    hardware=MACHINE,
)
EVALUATION = EvaluationFacts(
    problems_file="problems.jsonl", problems_fingerprint="abc", grader="numeric", max_tokens=160
)
EMPTY_EVALUATION = EvaluationResult(
    name="toy",
    url="host:1",
    problems_file="problems.jsonl",
    problems_fingerprint="abc",
    grader="numeric",
    max_tokens=8,
    concurrency=1,
    efforts={},
    provenance=PROVENANCE,
)
"""What `evaluate` writes, before any effort."""
PARENT_BLOCKS = [(8, 32), (8, None), (8, 32), (8, None)]
CHILD_BLOCKS = [(8, 32), (8, 64), (4, 32), (6, None)]


def effort(accuracy: float, tokens: float, **counts: int) -> EffortMeasurement:
    return EffortMeasurement(
        accuracy=accuracy,
        accuracy_low=max(0.0, accuracy - 0.05),
        accuracy_high=min(1.0, accuracy + 0.05),
        mean_output_tokens=tokens,
        measured_requests_per_s=3.0,
        requests=RequestCounts(**(counts or {"completed": 100})),
    )


def measurement(name: str, rounds: list[float], **changes: Any) -> EngineMeasurement:
    """An engine whose rounds, measured in turn, and changed fields are given; everything else is the same for all."""
    fields: dict[str, Any] = {
        "runtime": "reference",
        "kv_dtype": "bf16",
        "kv_fold": "tensor",
        "blocks": [LayerBlock(num_local_experts=e, sliding_window=w) for e, w in PARENT_BLOCKS],
        "weight_bytes": 1000,
        "memory_bytes": 2000,
        "kv_bytes_per_sequence": 300,
        "kv_sequence_tokens": 256,
        "scenario": SCENARIO,
        "turns": [Turn(comparison="made up", round=index) for index in range(len(rounds))],
        "latencies": {"ttft_ms": Distribution.of([1.0, 2.0, 3.0])},
        "requests": RequestCounts(completed=192),
        "lengths": "exact",
        "token_counts": "server",
        "evaluation": EVALUATION,
        "efforts": {"low": effort(0.4, 10), "medium": effort(0.8, 50), "high": effort(0.9, 100)},
        "provenance": PROVENANCE,
    }
    return EngineMeasurement(name=name, output_tokens_per_s=Spread.of(rounds), **{**fields, **changes})


def family() -> list[EngineMeasurement]:
    """parent_bf16, parent_fp8 and child. The child is 2x (1.25x) as fast a token, and 1.6x longer at high effort."""
    return [
        measurement("parent_bf16", [100.0, 90.0, 110.0], uncapped_output_tokens_per_s=Spread.of([400.0])),
        measurement(
            "parent_fp8",
            [160.0, 150.0, 170.0],
            kv_dtype="fp8",
            kv_bytes_per_sequence=150,
            efforts={"low": effort(0.0, 10), "medium": effort(0.8, 50), "high": effort(0.9, 100)},
        ),
        measurement(
            "child",
            [200.0, 198.0, 220.0],
            kv_dtype="fp8",
            weight_bytes=750,
            kv_bytes_per_sequence=120,
            blocks=[LayerBlock(num_local_experts=e, sliding_window=w) for e, w in CHILD_BLOCKS],
            uncapped_output_tokens_per_s=Spread.of([420.0]),
            efforts={"low": effort(0.5, 10), "medium": effort(0.72, 40), "high": effort(0.9, 160)},
        ),
    ]
