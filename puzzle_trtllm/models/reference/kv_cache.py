"""A paged KV cache with one pool per distinct attention window.

Layers with the same window form a group and share block tables; a block holds `tokens_per_block` tokens of all layers
of its group. A full-attention sequence keeps all its blocks; a sequence in a window group gives a block back as soon as
no future query can see it, so it holds at most ceil(w / block) + 1.

Sequences that begin alike share blocks (prefix_cache.py). A prompt may start at token R, the end of a block, when every
group still has what the query at R sees: the whole prefix without a window, the blocks of the last w - 1 tokens with
one. So that a window group has them at every R, and not only where some sequence ended, a prompt chunk also writes what
no later chunk will see, as long as blocks are free.

K and V are stored in one dtype for all layers: the compute dtype, or `float8_e4m3fn` at unit scale. Attention always
reads K and V as stored. A pool is `[layers, 2, N * K, B, Dh]` (kernels/kv_storage.py).

Legend: N blocks, B tokens a block, K KV heads, Dh head dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from puzzle_trtllm.kv_layout import KvLayout, blocks_of_a_sequence
from puzzle_trtllm.models.reference.prefix_cache import BlockTable, extend_keys, first_visible_block


@dataclass(kw_only=True)
class SequenceBlocks:
    """One sequence's blocks in one group: `blocks[i]` holds tokens from `(first_block + i) * tokens_per_block` on."""

    first_block: int = 0
    blocks: list[int] = field(default_factory=list)
    num_shared: int = 0
    """Blocks found in the cache when the sequence was admitted."""
    num_taken: int = 0
    """Blocks taken since, for K and V of its own."""


BlocksByWindow: TypeAlias = dict[int | None, SequenceBlocks]
"""One sequence's blocks in every group."""


class WindowPool:
    """The blocks of one group: storage, who uses them, and what admitted sequences may still claim."""

    def __init__(self, layout: KvLayout, window: int | None, device: torch.device) -> None:
        a = layout.architecture
        self.window = window
        self.tokens_per_block = layout.tokens_per_block
        self.num_blocks = layout.num_blocks[window]
        self.num_kv_heads = a.num_key_value_heads
        self.device = device
        self.layers = [i for i, block in enumerate(a.blocks) if block.sliding_window == window]
        shape = (len(self.layers), 2, self.num_blocks * self.num_kv_heads, layout.tokens_per_block, a.head_dim)
        self.storage = torch.zeros(shape, dtype=layout.dtype, device=device)
        self.table = BlockTable(self.num_blocks)
        self.num_reserved = 0
        """Blocks that admitted sequences may claim, those they have claimed included."""

    def has_room(self, count: int, shared: Sequence[int]) -> bool:
        """Whether a sequence that claims up to `count` blocks, of which it finds `shared` here, can be admitted.

        Sharing saves blocks only without a window: there a sequence keeps what it shares to its end. With one it drops
        shared blocks, which frees nothing, and takes new ones.
        """
        claims = self.num_reserved + count
        if self.window is None:
            claims -= self.table.num_shares + sum(map(self.table.is_in_use, shared))
        return claims <= self.num_blocks

    def count_missing(self, sequence: SequenceBlocks, start: int, end: int) -> int:
        """Blocks that `sequence` has to take to hold tokens `start..end`."""
        held_to = sequence.first_block + len(sequence.blocks)
        return max(0, (end - 1) // self.tokens_per_block + 1 - max(held_to, start // self.tokens_per_block))

    def extend(self, sequence: SequenceBlocks, start: int, end: int) -> None:
        """Make `sequence` hold tokens `start..end`; blocks before the one of `start` are given back.

        The caller has reserved enough blocks, so they cannot run out.
        """
        missing = self.count_missing(sequence, start, end)
        self.drop_before(sequence, start)
        sequence.blocks += [self.table.take() for _ in range(missing)]
        sequence.num_taken += missing

    def release(self, sequence: SequenceBlocks) -> None:
        self.table.give_back(sequence.blocks)
        sequence.blocks.clear()

    def drop_before(self, sequence: SequenceBlocks, start: int) -> None:
        """Give back the blocks before the one of token `start`."""
        stale = start // self.tokens_per_block - sequence.first_block
        if stale <= 0:
            return
        self.table.give_back(sequence.blocks[:stale])
        del sequence.blocks[:stale]
        sequence.first_block += stale


class PagedKvCache:
    """All pools of a model."""

    def __init__(self, layout: KvLayout, device: torch.device, *, reuse: bool = True) -> None:
        self.layout = layout
        self.device = device
        self.reuse = reuse
        """Whether prompts look for their beginning here."""
        self.pools = {window: WindowPool(layout, window, device) for window in layout.num_blocks}
        self.storage: dict[int, Tensor] = {}
        """Of each layer, `[2, N * K, B, Dh]`."""
        for pool in self.pools.values():
            self.storage |= dict(zip(pool.layers, pool.storage, strict=True))

    @property
    def num_blocks(self) -> int:
        return sum(pool.num_blocks for pool in self.pools.values())

    @property
    def num_free(self) -> int:
        return sum(pool.table.num_free for pool in self.pools.values())

    def demand(self, num_tokens: int) -> dict[int | None, int]:
        """Blocks that a sequence of up to `num_tokens` claims of each pool."""
        block = self.layout.tokens_per_block
        return {window: blocks_of_a_sequence(window, num_tokens, block) for window in self.pools}

    def can_ever_hold(self, num_tokens: int) -> bool:
        return all(self.pools[w].num_blocks >= need for w, need in self.demand(num_tokens).items())

    def keys(self, tokens: Sequence[int]) -> list[bytes]:
        """The keys of a prompt's full blocks; none without reuse."""
        keys: list[bytes] = []
        if self.reuse:
            extend_keys(keys, tokens, len(tokens), self.layout.tokens_per_block)
        return keys

    def find_prefix(self, keys: Sequence[bytes], num_tokens: int) -> int:
        """Tokens of the longest reusable beginning of a prompt of `num_tokens`. One at least is left to compute."""
        size = self.layout.tokens_per_block
        count = min(len(keys), (num_tokens - 1) // size)
        if None in self.pools:
            count = self.pools[None].table.count_leading(keys[:count])
        while count > 0:
            firsts = {window: first_visible_block(window, count * size, size) for window in self.pools}
            end = min(pool.table.longest_end(keys, firsts[window], count) for window, pool in self.pools.items())
            if end == count:
                break
            count = end
        return count * size

    def count_reuse(self, num_prompt_tokens: int, num_reused: int) -> tuple[int, int]:
        """(reused, missed): a prompt's blocks that need not be computed, and that must be, of all groups.

        A group counts whole prompts, whatever its window lets it hold, so that the shares are those of the work.
        """
        size = self.layout.tokens_per_block
        reused = num_reused // size * len(self.pools)
        return reused, math.ceil(num_prompt_tokens / size) * len(self.pools) - reused

    def admit(self, num_tokens: int, keys: Sequence[bytes] = (), num_reused: int = 0) -> BlocksByWindow | None:
        """Reserve for a sequence that may grow to `num_tokens`; None when it does not fit.

        Gives its block lists, which hold what `find_prefix` found under its keys: its first `num_reused` tokens, as far
        as the next one sees them.
        """
        size, needs = self.layout.tokens_per_block, self.demand(num_tokens)
        blocks: BlocksByWindow = {}
        for window, pool in self.pools.items():
            first = first_visible_block(window, num_reused, size)
            shared = pool.table.find(keys[first : num_reused // size])
            blocks[window] = SequenceBlocks(first_block=first, blocks=shared, num_shared=len(shared))
        if not all(pool.has_room(needs[window], blocks[window].blocks) for window, pool in self.pools.items()):
            return None
        for window, pool in self.pools.items():
            pool.num_reserved += needs[window]
            pool.table.share(blocks[window].blocks)
        return blocks

    def commit(self, blocks: BlocksByWindow, keys: list[bytes], tokens: Sequence[int], start: int, end: int) -> None:
        """After a step that wrote K and V of `tokens[start:end]`: blocks that are full now can be found, under their
        keys (appended to `keys`), and what a window group wrote for others alone is given back."""
        size = self.layout.tokens_per_block
        first, last = start // size, end // size
        if not self.reuse or first == last:
            return
        extend_keys(keys, tokens, end, size)
        for window, own in blocks.items():
            pool = self.pools[window]
            for block in range(max(first, own.first_block), last):
                pool.table.remember(own.blocks[block - own.first_block], keys[block])
            if window is not None:
                pool.drop_before(own, max(0, end - window))

    def release(self, blocks: BlocksByWindow, num_tokens: int) -> None:
        """Give back all blocks and the reservation of a sequence admitted with `num_tokens`."""
        for window, need in self.demand(num_tokens).items():
            self.pools[window].release(blocks[window])
            self.pools[window].num_reserved -= need
