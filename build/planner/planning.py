"""One plan: a model on GPUs under a load, from bytes to tokens a second.

    memory      what each GPU holds, and the KV pool that is left
    capacities  sequences that fit, by allocator                    -> the most that can be in flight
    best, knee  the fastest number in flight, and the smallest within 10% of it
    bound       what takes most of a request's time; "KV capacity" is said beside it when more sequences would help

Without a layout every legal one is tried, and the fastest is the plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from puzzle_trtllm.architecture import KvDtype, PuzzleArchitecture
from puzzle_trtllm.build.planner.allocators import ALLOCATORS, DEFAULT_ALLOCATOR, Capacity, find_allocator
from puzzle_trtllm.build.planner.assumptions import Assumptions
from puzzle_trtllm.build.planner.layout import Layout, parse_layout, possible_layouts
from puzzle_trtllm.build.planner.memory import MemoryPlan, plan_memory
from puzzle_trtllm.build.planner.roofline import Setup
from puzzle_trtllm.build.planner.throughput import Estimate, Load, best_batch, estimate
from puzzle_trtllm.build.planner.weights import weights_by_split
from puzzle_trtllm.errors import ConfigError
from puzzle_trtllm.gpus import Gpu

GAIN_FROM_MORE = 1.02
"""Twice the sequences must gain at least this much for KV capacity to count as a bound."""


class NoRoomError(ConfigError):
    """The model fits, but not one sequence (or not the asked batch) beside it; or not even the model."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What was planned, for one layout."""

    setup: Setup
    load: Load
    allocator: str
    memory: MemoryPlan
    capacities: Mapping[str, Capacity]
    """By allocator: sequences on ONE GPU (under tpN the same sequences live on all GPUs of the replica)."""
    max_batch: int
    """Sequences in flight that one replica can hold with `allocator`."""
    best: Estimate
    """At the best batch, or at the one that was asked for."""
    knee: Estimate | None
    """None for a batch that was asked for: of others nothing is said."""
    alternatives: tuple[tuple[str, float | None], ...]
    """Other layouts tried: name, expected output tok/s of all GPUs; None where not even one sequence fits."""

    @property
    def num_in_flight(self) -> int:
        """Sequences in flight of the batch, all replicas together."""
        return self.best.batch * self.setup.layout.num_replicas

    @property
    def tokens_per_s(self) -> float:
        """Expected output tok/s of all GPUs."""
        return self.best.expected_tokens_per_s * self.setup.layout.num_replicas

    @property
    def tokens_per_s_per_gpu(self) -> float:
        return self.tokens_per_s / self.setup.layout.num_gpus

    @property
    def is_capacity_bound(self) -> bool:
        """True when the cache is full and twice as many sequences would be faster."""
        if self.best.batch < self.max_batch or self.max_batch >= batch_limit(self.setup):
            return False
        more = estimate(self.setup, self.load, 2 * self.max_batch)
        return more.roofline_tokens_per_s > GAIN_FROM_MORE * self.best.roofline_tokens_per_s

    def sequences(self, allocator: str) -> int:
        """Sequences in flight that all GPUs together can hold under an allocator."""
        return whole_sequences(self.setup, self.capacities[allocator]) * self.setup.layout.num_replicas


def plan(
    architecture: PuzzleArchitecture,
    *,
    gpu: Gpu,
    num_gpus: int,
    load: Load,
    kv_dtype: KvDtype = "fp8",
    layout: str | None = None,
    allocator: str = DEFAULT_ALLOCATOR,
    batch: int | None = None,
    assumptions: Assumptions | None = None,
) -> Plan:
    """Plan a deployment.

    Args:
        gpu: from `puzzle_trtllm.gpus.load_gpu`.
        layout: `tpN` or `depN`; the fastest of all legal ones when None.
        allocator: a name in `ALLOCATORS`; it decides how many sequences are in flight at most.
        batch: sequences in flight a replica, instead of the best number.

    Raises ConfigError in one line for sequences longer than the model, an FP8 cache on a GPU without FP8, an unknown
    allocator or layout; NoRoomError for a model that leaves no room for one sequence.
    """
    assumptions = assumptions or Assumptions()
    check_request(architecture, gpu, num_gpus, load, kv_dtype, batch)
    find_allocator(allocator)
    layouts = (
        (parse_layout(layout, num_gpus, architecture),)
        if layout is not None
        else possible_layouts(num_gpus, architecture)
    )
    whole = weights_by_split(architecture)
    plans, tried = [], []
    for candidate in layouts:
        setup = Setup(architecture=architecture, gpu=gpu, layout=candidate, kv_dtype=kv_dtype, assumptions=assumptions)
        memory = plan_memory(architecture, gpu, candidate, assumptions, whole)
        one = _plan_layout(setup, memory, load, allocator, batch)
        tried.append((candidate.name, one.tokens_per_s if one else None))
        plans += [one] if one else []
    if not plans:
        raise _no_room(architecture, gpu, layouts, load, kv_dtype, allocator, assumptions, batch)
    best = max(plans, key=lambda p: p.tokens_per_s)
    return replace(best, alternatives=tuple(entry for entry in tried if entry[0] != best.setup.layout.name))


def check_request(
    a: PuzzleArchitecture, gpu: Gpu, num_gpus: int, load: Load, kv_dtype: KvDtype, batch: int | None = None
) -> None:
    """Raise ConfigError for what no layout can mend."""
    for key, value in (("gpus", num_gpus), ("isl", load.isl), ("osl", load.osl), ("batch", batch)):
        if value is not None and value < 1:
            raise ConfigError("must be at least 1", key=key, found=value)
    if load.sequence_tokens > a.max_position_embeddings:
        raise ConfigError(
            "sequences longer than the model's positions",
            key="isl + osl",
            found=load.sequence_tokens,
            expected=f"at most {a.max_position_embeddings}",
        )
    if kv_dtype == "fp8" and gpu.fp8_flops_per_s is None:
        raise ConfigError(f"{gpu.name} has no FP8", key="kv", found="fp8", expected="bf16")


def batch_limit(setup: Setup) -> int:
    """Sequences in flight that the engine's own max_batch_size allows a replica."""
    return setup.assumptions.max_batch_size * setup.layout.sequence_split


def whole_sequences(setup: Setup, capacity: Capacity) -> int:
    """Sequences in flight of one replica, from the capacity of one of its GPUs."""
    return int(capacity.sequences) * setup.layout.sequence_split


def _plan_layout(setup: Setup, memory: MemoryPlan, load: Load, allocator: str, batch: int | None) -> Plan | None:
    """None when not even one sequence (or not the asked batch) fits."""
    capacities = {
        name: scheme(setup.kv, memory.kv_pool, load.sequence_tokens, setup.assumptions)
        for name, scheme in ALLOCATORS.items()
    }
    most = min(whole_sequences(setup, capacities[allocator]), batch_limit(setup))
    if most < (batch or 1):
        return None
    best, knee = best_batch(setup, load, most) if batch is None else (estimate(setup, load, batch), None)
    return Plan(
        setup=setup,
        load=load,
        allocator=allocator,
        memory=memory,
        capacities=capacities,
        max_batch=most,
        best=best,
        knee=knee,
        alternatives=(),
    )


def _no_room(
    a: PuzzleArchitecture,
    gpu: Gpu,
    layouts: tuple[Layout, ...],
    load: Load,
    kv_dtype: KvDtype,
    allocator: str,
    assumptions: Assumptions,
    batch: int | None,
) -> NoRoomError:
    """Says how many fit, and in what, where the most do."""
    allocate, tokens = find_allocator(allocator), load.sequence_tokens

    def held(setup: Setup) -> tuple[int, int]:
        """Sequences of a replica, and the bytes of a GPU that they are in."""
        pool = plan_memory(a, gpu, setup.layout, assumptions).kv_pool
        return whole_sequences(setup, allocate(setup.kv, pool, tokens, assumptions)), pool

    setups = [
        Setup(architecture=a, gpu=gpu, layout=layout, kv_dtype=kv_dtype, assumptions=assumptions) for layout in layouts
    ]
    best = max(setups, key=held)
    sequences, pool = held(best)
    wanted = f"{batch} sequences" if batch else "one sequence"
    weights = plan_memory(a, gpu, best.layout, assumptions).weights.total
    each = f"{_size(best.kv.bytes_per_sequence(tokens))} and more"
    return NoRoomError(
        f"no room for {wanted} of {tokens} tokens beside {_size(weights)} of weights",
        key=f"{best.layout.num_gpus} x {gpu.name}, {best.layout.name}",
        found=f"{sequences} in {_size(pool)} of KV cache a GPU, cut by {allocator}",
        expected=f"{batch or 1} of {each}, at most {batch_limit(best)} at once",
    )


def _size(num_bytes: int) -> str:
    unit, name = (2**30, "GiB") if num_bytes >= 2**30 else (2**20, "MiB")
    return f"{num_bytes / unit:.2f} {name}"
