"""How many sequences a KV pool holds, as each allocator would cut it. The same bytes, 21 or 15 or 7 sequences.

    ideal          no blocks, no padding: pool / sum of min(window, n) over the layers
    trtllm_v1_equal   TensorRT-LLM's V1 manager as it comes: one pool a window, all of EQUAL size; the hungriest window
                   decides and the other pools stay half empty. It counts a window layer with window + max_num_tokens,
                   and lays prompts out whole (build/window_shares.py)
    trtllm_v1_tuned   V1 with TRTLLM_WINDOW_SIZE_SHARES in proportion to what sequences need (`tuned_shares`)
    trtllm_v2      V2: one pool for all windows, plus the prompt chunk in flight in window layers; modelled from its
                   description, not checked against a run
    vllm           vLLM's hybrid manager: layers in groups of equal size, so that all blocks are of one size; a window
                   layer keeps ceil(min(w - 1 + tokens in flight, n) / block) + 1 blocks. Group size: the number of
                   layers of the rarer KIND (full or sliding). It fits both public logs to the printed digit
    vllm_by_window the same with the rarest WINDOW instead, the rule in vLLM's released sources (kv_cache_utils.py,
                   `_get_kv_cache_groups_uniform_page_size`); equal for the parent, 30% worse for the child

Reservations are to a sequence's last token (GUARANTEED_NO_EVICT), so these are sequences that never get preempted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from puzzle_trtllm.build.planner.assumptions import Assumptions
from puzzle_trtllm.build.planner.kv_cache import KvGeometry
from puzzle_trtllm.build.window_shares import V1Load
from puzzle_trtllm.errors import ConfigError
from puzzle_trtllm.kv_layout import blocks_of_a_sequence

V2_IN_FLIGHT_SEQUENCES = 1
"""Prompts that are being processed at any moment; more than one only when they share a chunk."""


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What an allocator makes of a pool."""

    sequences: float
    """Sequences of the asked length that fit at once; a fraction is room for a shorter one."""
    num_tokens: int
    """sequences x length, as vLLM's log prints it."""


@dataclass(frozen=True, kw_only=True)
class VllmGrouping:
    """vLLM's layout: groups of `layers_per_group` layers, padded where a kind does not divide."""

    layers_per_group: int
    groups_by_window: tuple[tuple[int | None, int], ...]
    """(window, groups)."""


def ideal(kv: KvGeometry, pool_bytes: int, num_tokens: int, assumptions: Assumptions) -> Capacity:
    """Bytes over bytes."""
    return _capacity(pool_bytes / kv.bytes_per_sequence(num_tokens), num_tokens)


def trtllm_v1_equal(kv: KvGeometry, pool_bytes: int, num_tokens: int, assumptions: Assumptions) -> Capacity:
    """One pool a distinct window, equal parts."""
    load, layer_blocks = _v1_load(kv, num_tokens, assumptions), _layer_blocks(kv, pool_bytes, assumptions)
    shares = [1 / len(load.layers)] * len(load.layers)
    return _capacity(load.sequences(layer_blocks, shares), num_tokens)


def trtllm_v1_tuned(kv: KvGeometry, pool_bytes: int, num_tokens: int, assumptions: Assumptions) -> Capacity:
    """One pool a distinct window, sized by `tuned_shares`."""
    load, layer_blocks = _v1_load(kv, num_tokens, assumptions), _layer_blocks(kv, pool_bytes, assumptions)
    return _capacity(load.sequences(layer_blocks, load.shares(layer_blocks)), num_tokens)


def trtllm_v2(kv: KvGeometry, pool_bytes: int, num_tokens: int, assumptions: Assumptions) -> Capacity:
    """One pool for all windows; a window layer holds the chunk in flight beside its window."""
    size = assumptions.trtllm_tokens_per_block
    per_token = kv.bytes_per_token_and_layer
    in_flight = sum(
        layers * (min(kept + assumptions.max_num_tokens, num_tokens) - kept) for kept, layers in kv.clamped(num_tokens)
    )
    whole = sum(layers * blocks_of_a_sequence(kept, num_tokens, size) for kept, layers in kv.clamped(num_tokens)) * size
    left = pool_bytes - V2_IN_FLIGHT_SEQUENCES * in_flight * per_token
    return _capacity(max(0.0, left / (whole * per_token)), num_tokens)


def vllm(kv: KvGeometry, pool_bytes: int, num_tokens: int, assumptions: Assumptions) -> Capacity:
    """Groups as large as the rarer kind of attention, full or sliding."""
    return vllm_capacity(kv, pool_bytes, num_tokens, assumptions, vllm_grouping(kv, by="kind"))


def vllm_by_window(kv: KvGeometry, pool_bytes: int, num_tokens: int, assumptions: Assumptions) -> Capacity:
    """Groups as large as the rarest window."""
    return vllm_capacity(kv, pool_bytes, num_tokens, assumptions, vllm_grouping(kv, by="window"))


Allocator = Callable[[KvGeometry, int, int, Assumptions], Capacity]

ALLOCATORS: Mapping[str, Allocator] = MappingProxyType(
    {
        "ideal": ideal,
        "trtllm_v1_equal": trtllm_v1_equal,
        "trtllm_v1_tuned": trtllm_v1_tuned,
        "trtllm_v2": trtllm_v2,
        "vllm": vllm,
        "vllm_by_window": vllm_by_window,
    }
)
DEFAULT_ALLOCATOR = "trtllm_v1_tuned"


def find_allocator(name: str) -> Allocator:
    """By name. Raises ConfigError that lists the known ones."""
    if name not in ALLOCATORS:
        known = ", ".join(ALLOCATORS)
        raise ConfigError("unknown cache-allocation scheme", key="allocator", found=name, expected=f"one of: {known}")
    return ALLOCATORS[name]


def tuned_shares(kv: KvGeometry, pool_bytes: int, num_tokens: int, assumptions: Assumptions) -> dict[int, float]:
    """Window (ascending): share of the pool, the very ones that `build` writes into TRTLLM_WINDOW_SIZE_SHARES."""
    load = _v1_load(kv, num_tokens, assumptions)
    return dict(zip(load.layers, load.shares(_layer_blocks(kv, pool_bytes, assumptions)), strict=True))


def vllm_grouping(kv: KvGeometry, *, by: str) -> VllmGrouping:
    """The group size is the smallest count of layers, or the largest if that is less than 1.5 times as many."""
    counts = [layers for _, layers in kv.layers_by_window]
    if by == "kind":
        full = sum(layers for window, layers in kv.layers_by_window if window is None)
        counts = [count for count in (full, sum(counts) - full) if count]
    size = max(counts) if max(counts) < 1.5 * min(counts) else min(counts)
    return VllmGrouping(
        layers_per_group=size,
        groups_by_window=tuple((window, math.ceil(layers / size)) for window, layers in kv.layers_by_window),
    )


def vllm_blocks_per_sequence(grouping: VllmGrouping, num_tokens: int, assumptions: Assumptions) -> int:
    """Blocks of one sequence, all groups together."""
    size, in_flight = assumptions.vllm_tokens_per_block, assumptions.vllm_tokens_in_flight
    return sum(
        groups
        * (
            math.ceil(num_tokens / size)
            if window is None
            else math.ceil(min(window - 1 + in_flight, num_tokens) / size) + 1
        )
        for window, groups in grouping.groups_by_window
    )


def vllm_capacity(
    kv: KvGeometry, pool_bytes: int, num_tokens: int, assumptions: Assumptions, grouping: VllmGrouping
) -> Capacity:
    """Whole blocks of one group each; the figures that vLLM logs as "GPU KV cache size" and "Maximum concurrency"."""
    block_bytes = assumptions.vllm_tokens_per_block * kv.bytes_per_token_and_layer * grouping.layers_per_group
    num_blocks = pool_bytes // block_bytes
    return _capacity(num_blocks / vllm_blocks_per_sequence(grouping, num_tokens, assumptions), num_tokens)


def _v1_load(kv: KvGeometry, num_tokens: int, assumptions: Assumptions) -> V1Load:
    return V1Load(
        windows=tuple(kept for kept, layers in kv.clamped(num_tokens) for _ in range(layers)),
        longest=num_tokens,
        held=num_tokens,
        chunk=assumptions.max_num_tokens,
        tokens_per_block=assumptions.trtllm_tokens_per_block,
    )


def _layer_blocks(kv: KvGeometry, pool_bytes: int, assumptions: Assumptions) -> int:
    return pool_bytes // (assumptions.trtllm_tokens_per_block * kv.bytes_per_token_and_layer)


def _capacity(sequences: float, num_tokens: int) -> Capacity:
    return Capacity(sequences=sequences, num_tokens=int(sequences * num_tokens))
