"""A paged KV cache with one pool per distinct attention window.

Layers with the same window form a group and share block tables; a block holds `tokens_per_block` tokens of all layers
of its group. A full-attention sequence keeps all its blocks; a sequence in a window group gives a block back as soon as
no future query can see it, so it holds at most ceil(w / block) + 1.

K and V are stored in one dtype for all layers: the compute dtype, or `float8_e4m3fn` at unit scale. An E4M3 store
saturates at +-448 (torch's own cast would give NaN). Attention always reads K and V as stored.

Legend: N blocks, B tokens a block, K KV heads, Dh head dim. A pool is `[layers, 2, N * K, B, Dh]`: the rows of one
block and head lie together, so that a gather of a sequence's blocks gives `[K, tokens, Dh]` without a transpose.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from puzzle_trtllm.architecture import PuzzleArchitecture

E4M3_MAX = 448.0


@dataclass(frozen=True, kw_only=True)
class KvLayout:
    """Everything about the cache that does not change: groups, sizes, dtype."""

    architecture: PuzzleArchitecture
    tokens_per_block: int
    num_blocks: dict[int | None, int]
    """Blocks of each window's pool."""
    dtype: torch.dtype

    def block_bytes(self, window: int | None) -> int:
        """Bytes of one block of a group, all its layers, K and V."""
        return self.group_size(window) * block_bytes_per_layer(self.architecture, self.tokens_per_block, self.dtype)

    def group_size(self, window: int | None) -> int:
        return sum(block.sliding_window == window for block in self.architecture.blocks)

    @property
    def num_bytes(self) -> int:
        return sum(count * self.block_bytes(window) for window, count in self.num_blocks.items())


def block_bytes_per_layer(architecture: PuzzleArchitecture, tokens_per_block: int, dtype: torch.dtype) -> int:
    """Bytes of one block in one layer, K and V."""
    return 2 * tokens_per_block * architecture.num_key_value_heads * architecture.head_dim * dtype.itemsize


def blocks_needed(window: int | None, num_tokens: int, tokens_per_block: int) -> int:
    """Blocks that a sequence of up to `num_tokens` holds at most in a group."""
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
) -> KvLayout:
    """Split `budget_bytes` among the pools so that as many sequences of `sequence_tokens` as possible fit.

    Every pool gets blocks for the same number of sequences (at most `max_sequences`). What is left would not hold
    another one of full length, but a shorter one: the smallest windows are served first, the full-attention pool takes
    the rest.
    """
    per_block = block_bytes_per_layer(architecture, tokens_per_block, dtype)
    sizes = {w: sum(b.sliding_window == w for b in architecture.blocks) * per_block for w in architecture.windows}
    needs = {w: blocks_needed(w, sequence_tokens, tokens_per_block) for w in architecture.windows}
    sequence_bytes = sum(sizes[w] * needs[w] for w in sizes)
    sequences = min(budget_bytes // sequence_bytes, max_sequences)
    num_blocks = {w: sequences * needs[w] for w in sizes}
    left = budget_bytes - sequences * sequence_bytes
    if 0 < sequences < max_sequences:
        for window in architecture.windows:
            extra = min(left // sizes[window], needs[window])
            num_blocks[window] += extra
            left -= extra * sizes[window]
    return KvLayout(architecture=architecture, tokens_per_block=tokens_per_block, num_blocks=num_blocks, dtype=dtype)


@dataclass(kw_only=True)
class SequenceBlocks:
    """One sequence's blocks in one group: `blocks[i]` holds tokens from `(first_block + i) * tokens_per_block` on."""

    first_block: int = 0
    blocks: list[int] = field(default_factory=list)


class WindowPool:
    """The blocks of one group: storage, the free list, and what admitted sequences may still claim."""

    def __init__(self, layout: KvLayout, window: int | None, device: torch.device) -> None:
        a = layout.architecture
        self.window = window
        self.tokens_per_block = layout.tokens_per_block
        self.num_blocks = layout.num_blocks[window]
        self.layers = [i for i, block in enumerate(a.blocks) if block.sliding_window == window]
        shape = (len(self.layers), 2, self.num_blocks * a.num_key_value_heads, layout.tokens_per_block, a.head_dim)
        self.storage = torch.zeros(shape, dtype=layout.dtype, device=device)
        self._free = list(range(self.num_blocks - 1, -1, -1))
        self._reserved = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_unreserved(self) -> int:
        """Blocks that no admitted sequence can claim."""
        return self.num_blocks - self._reserved

    def reserve(self, count: int) -> None:
        self._reserved += count

    def unreserve(self, count: int) -> None:
        self._reserved -= count

    def extend(self, sequence: SequenceBlocks, start: int, end: int) -> None:
        """Make `sequence` hold tokens `start..end`; blocks before the one of `start` are given back.

        The caller has reserved enough blocks, so the free list cannot run dry.
        """
        self._drop_before(sequence, start // self.tokens_per_block)
        last = (end - 1) // self.tokens_per_block
        while sequence.first_block + len(sequence.blocks) <= last:
            sequence.blocks.append(self._free.pop())

    def release(self, sequence: SequenceBlocks) -> None:
        self._free.extend(sequence.blocks)
        sequence.blocks.clear()

    def _drop_before(self, sequence: SequenceBlocks, block: int) -> None:
        stale = block - sequence.first_block
        if stale <= 0:
            return
        self._free.extend(sequence.blocks[:stale])
        del sequence.blocks[:stale]
        sequence.first_block = block


class PagedKvCache:
    """All pools of a model."""

    def __init__(self, layout: KvLayout, device: torch.device) -> None:
        self.layout = layout
        self.device = device
        self.pools = {window: WindowPool(layout, window, device) for window in layout.num_blocks}
        self._of_layer = {layer: (pool, i) for pool in self.pools.values() for i, layer in enumerate(pool.layers)}

    @property
    def num_blocks(self) -> int:
        return sum(pool.num_blocks for pool in self.pools.values())

    @property
    def num_free(self) -> int:
        return sum(pool.num_free for pool in self.pools.values())

    def demand(self, num_tokens: int) -> dict[int | None, int]:
        """Blocks that a sequence of up to `num_tokens` claims of each pool."""
        block = self.layout.tokens_per_block
        return {window: blocks_needed(window, num_tokens, block) for window in self.pools}

    def can_ever_hold(self, num_tokens: int) -> bool:
        return all(self.pools[w].num_blocks >= need for w, need in self.demand(num_tokens).items())

    def can_admit(self, num_tokens: int) -> bool:
        return all(self.pools[w].num_unreserved >= need for w, need in self.demand(num_tokens).items())

    def admit(self, num_tokens: int) -> dict[int | None, SequenceBlocks]:
        """Reserve for a sequence that may grow to `num_tokens`; give its (empty) block lists."""
        for window, need in self.demand(num_tokens).items():
            self.pools[window].reserve(need)
        return {window: SequenceBlocks() for window in self.pools}

    def release(self, blocks: dict[int | None, SequenceBlocks], num_tokens: int) -> None:
        """Give back all blocks and the reservation of a sequence admitted with `num_tokens`."""
        for window, need in self.demand(num_tokens).items():
            self.pools[window].release(blocks[window])
            self.pools[window].unreserve(need)

    def storage(self, layer: int) -> Tensor:
        """Of one layer, `[2, N * K, B, Dh]`."""
        pool, index = self._of_layer[layer]
        return pool.storage[index]

    def store(self, values: Tensor) -> Tensor:
        """`values` as the cache stores them (saturating cast)."""
        dtype = self.layout.dtype
        if dtype == torch.float8_e4m3fn:
            return values.clamp(-E4M3_MAX, E4M3_MAX).to(dtype)
        return values.to(dtype)

    def write(self, layer: int, rows: Tensor, offsets: Tensor, kv: Tensor) -> None:
        """Write stored K and V `[2, W, K, Dh]` at pool rows `[W, K]` and offsets in their blocks `[W, 1]`."""
        halves = torch.arange(2, device=self.device)[:, None, None]
        _bits(self.storage(layer))[halves, rows, offsets] = _bits(kv)

    def read(self, layer: int, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """K and V of the pool rows `[2, S, K, M]` (`pool_rows`), each as `[S, K, M * B, Dh]` in `dtype`."""
        return read_rows(self.storage(layer), rows, dtype)


def read_rows(storage: Tensor, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """K and V at `rows` `[2, S, K, M]` of one layer's storage `[2, N * K, B, Dh]`, each as `[S, K, M * B, Dh]`."""
    _, sequences, heads, _ = rows.shape
    picked = _bits(storage).flatten(0, 1).index_select(0, rows.flatten())
    wide = expand_e4m3(picked, dtype) if picked.dtype == torch.uint8 else picked.to(dtype)
    keys, values = wide.view(2, sequences, heads, -1, wide.shape[-1])
    return keys, values


def block_table(blocks: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Block lists of several sequences, int64 `[S, M]`, padded with block 0."""
    longest = max((len(own) for own in blocks), default=1)
    return torch.tensor([[*own, *[0] * (longest - len(own))] for own in blocks], dtype=torch.int64, device=device)


def pool_rows(table: Tensor, num_heads: int, rows_of_keys: int) -> Tensor:
    """A block table as rows of K and of V, `[2, S, K, M]`; V's follow the `rows_of_keys` = N * K rows of K."""
    keys = table[:, None, :] * num_heads + torch.arange(num_heads, device=table.device)[None, :, None]
    return torch.stack([keys, keys + rows_of_keys])


def expand_e4m3(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """E4M3 codes (uint8, any shape) as bfloat16 or float32: exact, and several times faster than torch's cast on a CPU.

    Both wide types start with sign and exponent as E4M3 does, so the bits are moved into place (sign-extended, shifted,
    masked) and the difference of the exponent biases, 2^(127 - 7), is multiplied in; this is right for subnormals too.
    The two NaN codes come out as +-480: NaN never reaches a cache whose hidden states are finite.
    """
    if dtype == torch.bfloat16:
        wide, shift, mask = torch.int16, 4, -0x7810
    elif dtype == torch.float32:
        wide, shift, mask = torch.int32, 20, -0x78100000
    else:
        return codes.view(torch.float8_e4m3fn).to(dtype)
    bits = codes.view(torch.int8).to(wide).bitwise_left_shift_(shift).bitwise_and_(mask)
    return bits.view(dtype).mul_(2.0**120)


def _bits(tensor: Tensor) -> Tensor:
    """The same memory as bytes where the dtype has no indexing kernels (float8)."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
