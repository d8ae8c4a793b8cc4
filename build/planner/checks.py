"""The planner held against what others measured: each check returns rows of (published, predicted, error).

    check_bytes         sizes and parameter counts, to the printed digit
    check_allocators    two vLLM logs: is there a pool that prints as the log's and gives the log's tokens exactly?
    check_throughputs   NVIDIA's rows for the parent, one efficiency fitted on half of them
    check_speedups      the paper's ratios under every combination of what the paper leaves open

`fit_efficiency` is the only fit: the geometric mean of measured / roofline over the fitting rows, so that being twice
too fast and twice too slow weigh the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from puzzle_trtllm.architecture import KvDtype, PuzzleArchitecture
from puzzle_trtllm.build.planner.allocators import vllm_blocks_per_sequence, vllm_grouping
from puzzle_trtllm.build.planner.assumptions import GIB, Assumptions
from puzzle_trtllm.build.planner.kv_cache import KvGeometry
from puzzle_trtllm.build.planner.layout import Layout
from puzzle_trtllm.build.planner.planning import NoRoomError, Plan, plan
from puzzle_trtllm.build.planner.published import (
    ALLOCATOR_LOGS,
    BYTES,
    LOG_SEQUENCE_TOKENS,
    PUBLISHED_CONFIG,
    SPEEDUP_GPU,
    SPEEDUPS,
    THROUGHPUTS,
    AllocatorLog,
    Speedup,
    Throughput,
)
from puzzle_trtllm.build.planner.weights import active_parameters
from puzzle_trtllm.gpus import load_gpu, load_gpus
from puzzle_trtllm.tensors import count_parameters, count_weight_bytes, tensor_table

REPRODUCED = 0.05
"""A ratio within this relative distance of the published one counts as reproduced."""
ONE_GPU = Layout(kind="tp", gpus_per_replica=1)


@dataclass(frozen=True, kw_only=True)
class Models:
    """gpt-oss-120b and gpt-oss-puzzle-88B."""

    parent: PuzzleArchitecture
    child: PuzzleArchitecture

    def get(self, name: str) -> PuzzleArchitecture:
        return self.parent if name == "parent" else self.child


@dataclass(frozen=True, kw_only=True)
class Row:
    """One published figure and ours."""

    what: str
    published: str
    predicted: str
    agrees: bool


def check_bytes(models: Models) -> Iterator[Row]:
    """Sizes, printed with two decimals as published."""
    for row in BYTES:
        a = models.get(row.model)
        scales = sum(spec.num_elements for name, spec in tensor_table(a).items() if name.endswith("_scales"))
        value = {
            "weights GiB": count_weight_bytes(a) / GIB,
            "parameters B": count_parameters(a) / 1e9,
            "parameters with scales B": (count_parameters(a) + scales) / 1e9,
            "active parameters B": active_parameters(a) / 1e9,
        }[row.what]
        ours = f"{value:.2f}"
        yield Row(what=f"{row.model}: {row.what}", published=row.printed, predicted=ours, agrees=ours == row.printed)


@dataclass(frozen=True, kw_only=True)
class AllocatorCheck:
    """A log, and the whole number of blocks that explains all three of its figures (None: there is none)."""

    log: AllocatorLog
    num_blocks: int | None
    pool_bytes: int | None
    num_tokens: int | None
    concurrency: float | None
    ideal_concurrency: float
    """The same pool without blocks or padding, window layers still holding the tokens in flight."""
    by_window_concurrency: float
    """Under the grouping of vLLM's released sources."""


def check_allocators(models: Models) -> Iterator[AllocatorCheck]:
    """Search every whole block count whose pool prints as the log's two decimals for the log's token count."""
    assumptions = Assumptions()
    for log in ALLOCATOR_LOGS:
        kv = KvGeometry.of(models.get(log.model), "fp8", ONE_GPU)
        grouping = vllm_grouping(kv, by="kind")
        per_sequence = vllm_blocks_per_sequence(grouping, LOG_SEQUENCE_TOKENS, assumptions)
        block = assumptions.vllm_tokens_per_block * kv.bytes_per_token_and_layer * grouping.layers_per_group
        low, high = (math.ceil((log.pool_gib + side * 0.005) * GIB / block) for side in (-1, 1))
        counts = [n for n in range(low, high) if int(n / per_sequence * LOG_SEQUENCE_TOKENS) == log.num_tokens]
        found = counts[0] if len(counts) == 1 else None
        by_window = vllm_grouping(kv, by="window")
        other = vllm_blocks_per_sequence(by_window, LOG_SEQUENCE_TOKENS, assumptions) * by_window.layers_per_group
        yield AllocatorCheck(
            log=log,
            num_blocks=found,
            pool_bytes=None if found is None else found * block,
            num_tokens=None if found is None else int(found / per_sequence * LOG_SEQUENCE_TOKENS),
            concurrency=None if found is None else round(found / per_sequence, 2),
            ideal_concurrency=log.pool_gib * GIB / _bytes_in_flight(kv, assumptions),
            by_window_concurrency=log.pool_gib * GIB / block * grouping.layers_per_group / other,
        )


def _bytes_in_flight(kv: KvGeometry, assumptions: Assumptions) -> int:
    kept = (
        layers
        * (
            LOG_SEQUENCE_TOKENS
            if window is None
            else min(window - 1 + assumptions.vllm_tokens_in_flight, LOG_SEQUENCE_TOKENS)
        )
        for window, layers in kv.layers_by_window
    )
    return sum(kept) * kv.bytes_per_token_and_layer


@dataclass(frozen=True, kw_only=True)
class ThroughputCheck:
    """A published row, the roofline, and the prediction: roofline x efficiency."""

    row: Throughput
    is_fitted: bool
    roofline: float
    """Output tok/s a GPU at the data sheets' peaks."""
    predicted: float
    batch_per_gpu: float
    bound: str

    @property
    def error(self) -> float:
        """Predicted over published, minus 1."""
        return self.predicted / self.row.tokens_per_s_per_gpu - 1


def fit_efficiency(checks: Sequence[ThroughputCheck]) -> float:
    """Geometric mean of measured / roofline over the fitting rows."""
    logs = [math.log(c.row.tokens_per_s_per_gpu / c.roofline) for c in checks if c.is_fitted]
    return math.exp(sum(logs) / len(logs))


def check_throughputs(models: Models) -> tuple[ThroughputCheck, ...]:
    """All published rows of the parent, predicted with NVIDIA's limits."""
    assumptions, gpus = PUBLISHED_CONFIG, load_gpus()
    checks = []
    for index, row in enumerate(THROUGHPUTS):
        p = plan(
            models.parent,
            gpu=gpus[row.gpu],
            num_gpus=int(row.layout.lstrip("tpde")),
            load=row.load,
            kv_dtype=row.kv_dtype,
            layout=row.layout,
            assumptions=assumptions,
        )
        checks.append(
            ThroughputCheck(
                row=row,
                is_fitted=index % 2 == 0,
                roofline=p.tokens_per_s_per_gpu / assumptions.efficiency,
                predicted=p.tokens_per_s_per_gpu,
                batch_per_gpu=p.best.batch / p.setup.layout.gpus_per_replica,
                bound=p.best.bound,
            )
        )
    return tuple(checks)


@dataclass(frozen=True, kw_only=True)
class SpeedupCheck:
    """A headline under one combination of what the paper leaves open."""

    headline: Speedup
    parent_kv_dtype: KvDtype
    layout: str
    allocator: str
    memory_rule: str
    sequences: str
    """"full": each model as many as fit; "parent's": both as many as the parent holds; a number: both so many."""
    ratio: float | None
    """None: one of them does not fit so many."""

    @property
    def reproduces(self) -> bool:
        return self.ratio is not None and abs(self.ratio / self.headline.ratio - 1) <= REPRODUCED


SPEEDUP_ALLOCATORS = ("ideal", "trtllm_v1_equal", "trtllm_v1_tuned", "vllm", "vllm_by_window")
LAYOUTS_8 = ("tp8", "dep8", "tp1")
SEQUENCES = ("full", "parent's", "64", "256")


def check_speedups(models: Models) -> Iterator[SpeedupCheck]:
    """Every combination for every headline; the child's cache is FP8 throughout, as published."""
    for headline in SPEEDUPS:
        for layout in LAYOUTS_8 if headline.num_gpus == 8 else ("tp1",):
            for rule in ("free", "total"):
                for allocator in SPEEDUP_ALLOCATORS:
                    assumptions = replace(Assumptions(), memory_rule=rule)
                    yield from _speedups(models, headline, layout, allocator, assumptions)


def _speedups(
    models: Models, headline: Speedup, layout: str, allocator: str, assumptions: Assumptions
) -> Iterator[SpeedupCheck]:
    def attempt(a: PuzzleArchitecture, dtype: KvDtype, batch: int | None) -> Plan | None:
        try:
            return plan(
                a,
                gpu=gpu,
                num_gpus=headline.num_gpus,
                load=headline.load,
                kv_dtype=dtype,
                layout=layout,
                allocator=allocator,
                batch=batch,
                assumptions=assumptions,
            )
        except NoRoomError:
            return None

    gpu = load_gpu(SPEEDUP_GPU)
    replicas = headline.num_gpus // int(layout.lstrip("tpde"))
    for parent_dtype in ("bf16", "fp8"):
        full = attempt(models.parent, parent_dtype, None)
        for sequences in SEQUENCES:
            batch = None if sequences == "full" else _batch(sequences, full, replicas)
            parent = full if batch is None else attempt(models.parent, parent_dtype, batch)
            child = attempt(models.child, "fp8", batch)
            yield SpeedupCheck(
                headline=headline,
                parent_kv_dtype=parent_dtype,
                layout=layout if replicas == 1 or headline.num_gpus == 1 else f"{replicas} x {layout}",
                allocator=allocator,
                memory_rule=assumptions.memory_rule,
                sequences=sequences,
                ratio=child.tokens_per_s / parent.tokens_per_s if child and parent else None,
            )


def _batch(sequences: str, full: Plan | None, replicas: int) -> int:
    """Sequences in flight a replica; 0-sized ones are never planned."""
    if sequences == "parent's":
        return full.best.batch if full else 1
    return max(1, int(sequences) // replicas)
