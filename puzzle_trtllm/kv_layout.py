"""How much KV cache a sequence needs in blocks, and how the reference runtime divides its memory among window pools.

Layers with the same attention window share a pool, whose blocks hold `tokens_per_block` tokens of all of them.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from puzzle_trtllm.architecture import PuzzleArchitecture

if TYPE_CHECKING:
    import torch

PREFIX_ROOM = 4
"""Times what running sequences hold, in window pools that are to remember prefixes. On random prompts of which a third
could be reused (tests/bench/prefix_reuse.py), 1 found a sixth of that, 2 almost a half, 4 nearly three quarters."""


@dataclass(frozen=True, kw_only=True)
class KvLayout:
    """Everything about the cache that does not change: groups, sizes, dtype."""

    architecture: PuzzleArchitecture
    tokens_per_block: int
    num_blocks: dict[int | None, int]
    """Blocks of each window's pool."""
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        sizes = _block_bytes(self.architecture, self.tokens_per_block, self.dtype)
        return sum(count * sizes[window] for window, count in self.num_blocks.items())


def _block_bytes(a: PuzzleArchitecture, tokens_per_block: int, dtype: torch.dtype) -> dict[int | None, int]:
    """Bytes of one block of each window's group: all its layers, K and V."""
    layers = Counter(block.sliding_window for block in a.blocks)
    one = 2 * tokens_per_block * a.num_key_value_heads * a.head_dim * dtype.itemsize
    return {window: layers[window] * one for window in a.windows}


def blocks_of_a_sequence(window: int | None, num_tokens: int, tokens_per_block: int) -> int:
    """Blocks that a layer with this attention window (None: full) holds at most of a sequence of up to `num_tokens`.

    A window that has moved on straddles one block more than it fills.
    """
    whole = math.ceil(num_tokens / tokens_per_block)
    return whole if window is None else min(whole, math.ceil(window / tokens_per_block) + 1)


def plan_layout(
    architecture: PuzzleArchitecture,
    *,
    tokens_per_block: int,
    dtype: torch.dtype,
    budget_bytes: int,
    sequence_tokens: int,
    max_sequences: int,
    reuse: bool = False,
) -> KvLayout:
    """Split `budget_bytes` among the pools so that as many sequences of `sequence_tokens` as possible fit.

    Every pool gets blocks for the same number of sequences (at most `max_sequences`). What is left would not hold
    another one of full length, but a shorter one: the smallest windows are served first, the full-attention pool takes
    the rest. If nothing is short and prompts are to find prefixes (`reuse`), window pools get up to PREFIX_ROOM times
    that much: running sequences would leave them nothing to remember.
    """
    sizes = _block_bytes(architecture, tokens_per_block, dtype)
    needs = {w: blocks_of_a_sequence(w, sequence_tokens, tokens_per_block) for w in sizes}
    sequence_bytes = sum(sizes[w] * needs[w] for w in sizes)
    sequences = min(budget_bytes // sequence_bytes, max_sequences)
    num_blocks = {w: sequences * needs[w] for w in sizes}
    left = budget_bytes - sequences * sequence_bytes
    if 0 < sequences < max_sequences:
        wanted = needs
    else:
        whole = sequences * math.ceil(sequence_tokens / tokens_per_block) if reuse else 0
        wanted = {w: max(0, min(PREFIX_ROOM * num_blocks[w], whole) - num_blocks[w]) for w in sizes}
    for window, size in sizes.items():
        extra = min(left // size, wanted[window])
        num_blocks[window] += extra
        left -= extra * size
    return KvLayout(architecture=architecture, tokens_per_block=tokens_per_block, num_blocks=num_blocks, dtype=dtype)
