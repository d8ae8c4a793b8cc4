"""One step of the model on one GPU, as the seconds that each resource needs.

    attention projections   max(weight bytes / bandwidth, 2 x parameters x tokens / FLOPs)
    attention               max(KV bytes / bandwidth, 4 x query heads x head_dim x keys / FLOPs)
    experts                 max(distinct experts x expert bytes / bandwidth, 2 x parameters x k x tokens / FLOPs)
    links                   tpN: two all-reduces a layer, 2(N-1)/N x tokens x D x 2 bytes each (ring)
                            depN: all-gather before and reduce-scatter after the experts, (N-1)/N x tokens x D x 2 each
    launches                a constant a layer

The phases of a layer run one after the other, so their times add up; within a phase memory and arithmetic overlap, so
the larger one counts, and the phase is booked under its name ("KV reads" or "attention FLOPs"). Roofline: Williams et
al., CACM 2009. Activations are taken to stay in cache: left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from puzzle_trtllm.architecture import BlockConfig, KvDtype, PuzzleArchitecture
from puzzle_trtllm.build.planner.assumptions import Assumptions
from puzzle_trtllm.build.planner.kv_cache import KvGeometry, mean_keys
from puzzle_trtllm.build.planner.layout import Layout
from puzzle_trtllm.build.planner.memory import BF16_BYTES
from puzzle_trtllm.build.planner.routing import expected_distinct_experts
from puzzle_trtllm.gpus import Gpu
from puzzle_trtllm.tensors import expert_table

RESOURCES = (
    "expert weights",
    "other weights",
    "KV reads",
    "expert FLOPs",
    "other FLOPs",
    "attention FLOPs",
    "links",
    "launches",
)
_NAMES = {
    "experts": ("expert weights", "expert FLOPs"),
    "weights": ("other weights", "other FLOPs"),
    "KV": ("KV reads", "attention FLOPs"),
}
"""A phase's name when memory is slower, and when arithmetic is."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What runs where: everything a step's cost depends on besides the tokens in it."""

    architecture: PuzzleArchitecture
    gpu: Gpu
    layout: Layout
    kv_dtype: KvDtype
    assumptions: Assumptions

    @cached_property
    def kv(self) -> KvGeometry:
        """KV cache of one GPU."""
        return KvGeometry.of(self.architecture, self.kv_dtype, self.layout)

    @cached_property
    def layers_by_block(self) -> tuple[tuple[BlockConfig, int], ...]:
        """Distinct layers, and how many there are of each: equal layers cost the same."""
        return tuple(Counter(self.architecture.blocks).items())

    @cached_property
    def expert_bytes(self) -> int:
        """Bytes of one expert: blocks, scales and biases."""
        a = self.architecture
        return sum(spec.num_bytes for _, spec in expert_table(a, 1, a.experts_format))


@dataclass(frozen=True, kw_only=True)
class Step:
    """The tokens of one step of one replica."""

    tokens: float
    """Tokens that pass through the layers, all GPUs of the replica together."""
    start: int
    stop: int
    """Their positions lie in [start, stop), evenly."""
    sequences: float
    """Sequences whose keys are read, all GPUs of the replica together."""
    logits: float
    """Tokens whose logits are computed."""


Seconds = dict[str, float]
"""Seconds by resource."""


def step_seconds(setup: Setup, step: Step) -> Seconds:
    """Seconds of one step by resource; their sum is its duration at the data sheet's peaks."""
    result: Seconds = dict.fromkeys(RESOURCES, 0.0)
    for block, layers in setup.layers_by_block:
        for resource, seconds in _layer_seconds(setup, step, block):
            result[resource] += layers * seconds
    resource, seconds = _vocabulary(setup, step)
    result[resource] += seconds
    return result


def _layer_seconds(setup: Setup, step: Step, block: BlockConfig) -> Iterator[tuple[str, float]]:
    yield _projections(setup, step)
    yield _attention(setup, step, block)
    router_bytes = block.num_local_experts * setup.architecture.hidden_size * BF16_BYTES
    yield "other weights", router_bytes / setup.gpu.memory_bytes_per_s
    yield _experts(setup, step, block)
    yield "links", _links(setup, step)
    yield "launches", setup.assumptions.launch_us_per_layer * 1e-6


def _projections(setup: Setup, step: Step) -> tuple[str, float]:
    a, layout = setup.architecture, setup.layout
    heads = 2 * a.num_attention_heads / layout.attention_split + 2 * layout.kv_heads_per_gpu(a)
    parameters = heads * a.head_dim * a.hidden_size
    flops = 2 * parameters * step.tokens / layout.sequence_split
    return _slower(setup, "weights", parameters * BF16_BYTES, flops, setup.gpu.bf16_flops_per_s)


def _attention(setup: Setup, step: Step, block: BlockConfig) -> tuple[str, float]:
    a, layout = setup.architecture, setup.layout
    keys = mean_keys(step.start, step.stop, block.sliding_window)
    read = step.sequences / layout.sequence_split * keys * setup.kv.bytes_per_token_and_layer
    heads = a.num_attention_heads / layout.attention_split
    flops = 4 * heads * a.head_dim * keys * step.tokens / layout.sequence_split
    return _slower(setup, "KV", read, flops, setup.gpu.bf16_flops_per_s)


def _experts(setup: Setup, step: Step, block: BlockConfig) -> tuple[str, float]:
    a, assumptions = setup.architecture, setup.assumptions
    touched = expected_distinct_experts(block.num_local_experts, a.experts_per_token, step.tokens)
    share = assumptions.expert_imbalance / setup.layout.gpus_per_replica
    read = touched * assumptions.distinct_expert_factor * share * setup.expert_bytes
    flops = 2 * 3 * a.hidden_size * a.intermediate_size * a.experts_per_token * step.tokens * share
    return _slower(setup, "experts", read, flops, setup.gpu.expert_flops_per_s)


def _links(setup: Setup, step: Step) -> float:
    """Seconds of the two collectives of a layer."""
    n = setup.layout.gpus_per_replica
    if n == 1:
        return 0.0
    moved = (n - 1) / n * step.tokens * setup.architecture.hidden_size * BF16_BYTES
    rounds = 4 if setup.layout.kind == "tp" else 2  # an all-reduce is a reduce-scatter and an all-gather
    return rounds * moved / setup.gpu.link_bytes_per_s + 2 * setup.assumptions.collective_latency_us * 1e-6


def _vocabulary(setup: Setup, step: Step) -> tuple[str, float]:
    a, layout = setup.architecture, setup.layout
    parameters = a.vocab_size * a.hidden_size / layout.attention_split
    flops = 2 * parameters * step.logits / layout.sequence_split
    return _slower(setup, "weights", parameters * BF16_BYTES, flops, setup.gpu.bf16_flops_per_s)


def _slower(setup: Setup, what: str, read_bytes: float, flops: float, flops_per_s: float) -> tuple[str, float]:
    """The slower of reading and multiplying, under its name."""
    reading, multiplying = _NAMES[what]
    read_s, math_s = read_bytes / setup.gpu.memory_bytes_per_s, flops / flops_per_s
    return (reading, read_s) if read_s >= math_s else (multiplying, math_s)
