"""One step of in-flight batching, laid out for the forward pass.

The tokens of all sequences are flattened into one row axis T: first the decoding sequences, one row each, then the
prompt chunks one after another. Everything that all layers of a window group share (block tables, masks, where new
K and V go) is computed here, once a step.

A decoding row reads its own key from the cache like any other. A prompt chunk reads the past from the cache and itself
from the chunk's own K and V (rounded to the stored dtype first), so a window layer needs room only for what outlives
the chunk.

Legend: T rows, S decoding sequences, P prompt chunks, C longest chunk, K KV heads, M blocks, B tokens a block, L keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from puzzle_trtllm.models.reference.kv_cache import PagedKvCache, SequenceBlocks, WindowPool, block_table, pool_rows

NEVER_VISIBLE = np.iinfo(np.int64).max
"""Position of a padding key: after every query."""


@dataclass(frozen=True, kw_only=True)
class SequenceStep:
    """What one sequence contributes: `tokens` at positions `start`, `start + 1`, ..."""

    tokens: Sequence[int]
    start: int
    blocks: dict[int | None, SequenceBlocks]
    wants_logits: bool
    """True when the last of `tokens` is the last known one, so that the next can be sampled."""


@dataclass(frozen=True, kw_only=True)
class DecodeGroup:
    """How decoding rows read one group: keys from `first_keys` on, those in (position - window, position] visible."""

    window: int | None
    num_kv_heads: int
    blocks: Tensor
    """int64 [S, M], padded with block 0"""
    first_keys: Tensor
    """int64 [S]: position of the first key in the first block"""
    positions: Tensor
    """int64 [S]: of the query"""
    derived: dict[str, Tensor] = field(default_factory=dict)
    """What a kernel computes from the above once a step, for all layers of the group."""


@dataclass(frozen=True, kw_only=True)
class PrefillGroup:
    """How prompt chunks read one group."""

    past_rows: Tensor | None
    """int64 [2, P, K, M]; None when no chunk has a past"""
    key_positions: Tensor
    """int64 [P, M * B + C]: past first, then the chunk"""


@dataclass(frozen=True, kw_only=True)
class GroupStep:
    """One window group in this step."""

    window: int | None
    write_tokens: Tensor | None
    """int64 [W]: which of the T rows are kept; None when all are"""
    write_rows: Tensor
    """int64 [W, K]"""
    write_offsets: Tensor
    """int64 [W, 1]"""
    decode: DecodeGroup | None
    prefill: PrefillGroup | None


@dataclass(frozen=True, kw_only=True)
class Step:
    """A whole step."""

    token_ids: Tensor
    """int64 [T]"""
    positions: Tensor
    """int64 [T]"""
    num_decodes: int
    chunk_rows: Tensor | None
    """int64 [P, C]: flattened row of each padded chunk token (row 0 for padding)"""
    chunk_positions: Tensor | None
    """int64 [P, C]; -1 for padding, which sees nothing"""
    chunk_valid: Tensor | None
    """int64 [T - S]: index into the padded [P * C] of each chunk row"""
    logit_rows: Tensor
    """int64 [R]: rows whose logits are wanted, in the order of the sequences"""
    groups: dict[int | None, GroupStep]


def plan_step(sequences: Sequence[SequenceStep], cache: PagedKvCache) -> Step:
    """Claim blocks for what outlives this step and lay it out. Decoding sequences (one token, a past) come first."""
    num_decodes = sum(len(s.tokens) == 1 and s.start > 0 for s in sequences)
    if any(len(s.tokens) != 1 or s.start == 0 for s in sequences[:num_decodes]):
        raise ValueError("decoding sequences must come before prompt chunks")
    device = cache.device
    positions = np.concatenate([np.arange(s.start, s.start + len(s.tokens)) for s in sequences])
    ends = np.cumsum([len(s.tokens) for s in sequences])
    chunks = _lay_out_chunks(sequences[num_decodes:], num_decodes)
    return Step(
        token_ids=torch.tensor([token for s in sequences for token in s.tokens], device=device),
        positions=torch.from_numpy(positions).to(device),
        num_decodes=num_decodes,
        chunk_rows=_to(chunks[0], device) if chunks else None,
        chunk_positions=_to(chunks[1], device) if chunks else None,
        chunk_valid=_to(chunks[2], device) if chunks else None,
        logit_rows=_to(np.asarray([e - 1 for s, e in zip(sequences, ends, strict=True) if s.wants_logits]), device),
        groups={w: _plan_group(pool, sequences, num_decodes, chunks, cache) for w, pool in cache.pools.items()},
    )


_Chunks = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


def _lay_out_chunks(sequences: Sequence[SequenceStep], first_row: int) -> _Chunks | None:
    """(rows [P, C], positions [P, C], valid [sum of lengths]) of the padded chunks."""
    if not sequences:
        return None
    longest = max(len(s.tokens) for s in sequences)
    rows = np.zeros((len(sequences), longest), dtype=np.int64)
    positions = np.full((len(sequences), longest), -1, dtype=np.int64)
    row = first_row
    for index, s in enumerate(sequences):
        count = len(s.tokens)
        rows[index, :count] = np.arange(row, row + count)
        positions[index, :count] = np.arange(s.start, s.start + count)
        row += count
    return rows, positions, np.flatnonzero(positions.reshape(-1) >= 0)


def _plan_group(
    pool: WindowPool, sequences: Sequence[SequenceStep], num_decodes: int, chunks: _Chunks | None, cache: PagedKvCache
) -> GroupStep:
    num_heads, device = cache.layout.architecture.num_key_value_heads, cache.device
    prefill = None
    if chunks is not None:
        # Before the claim, which may give back what a chunk still reads.
        prefill = _plan_prefill(pool, sequences[num_decodes:], chunks[1], num_heads, device)
    _claim(pool, sequences, cache.reuse)
    tokens, blocks, offsets = _plan_writes(pool, sequences)
    num_rows = sum(len(s.tokens) for s in sequences)
    return GroupStep(
        window=pool.window,
        write_tokens=None if len(tokens) == num_rows else _to(tokens, device),
        write_rows=_to(blocks[:, None] * num_heads + np.arange(num_heads)[None, :], device),
        write_offsets=_to(offsets[:, None], device),
        decode=_plan_decode(pool, sequences[:num_decodes], num_heads, device) if num_decodes else None,
        prefill=prefill,
    )


def _claim(pool: WindowPool, sequences: Sequence[SequenceStep], reuse: bool) -> None:
    """Claim blocks for what outlives this step.

    With `reuse`, chunks also claim blocks for what only another prompt could read, as far as the step leaves some. They
    are given back when it is committed, so it does not matter whether they are promised to somebody.
    """
    size = pool.tokens_per_block
    ends = [s.start + len(s.tokens) for s in sequences]
    firsts = [0 if pool.window is None else max(0, end - pool.window) // size for end in ends]
    spare = _spare_blocks(pool, sequences, firsts, ends) if reuse and pool.window is not None else 0
    for s, first, end in zip(sequences, firsts, ends, strict=True):
        extra = min(max(0, first - s.start // size), spare)
        spare -= extra
        pool.extend(s.blocks[pool.window], (first - extra) * size, end)


def _plan_writes(
    pool: WindowPool, sequences: Sequence[SequenceStep]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(row, block, offset in the block) of each token that has a block."""
    size = pool.tokens_per_block
    rows, blocks, offsets = [], [], []
    row = 0
    for s in sequences:
        end = s.start + len(s.tokens)
        own = s.blocks[pool.window]
        kept = np.arange(max(s.start, own.first_block * size), end)
        rows.append(kept - s.start + row)
        blocks.append(np.asarray(own.blocks, dtype=np.int64)[kept // size - own.first_block])
        offsets.append(kept % size)
        row += len(s.tokens)
    return np.concatenate(rows), np.concatenate(blocks), np.concatenate(offsets)


def _spare_blocks(
    pool: WindowPool, sequences: Sequence[SequenceStep], firsts: Sequence[int], ends: Sequence[int]
) -> int:
    """Free blocks that the step does not need, if each sequence claims the blocks from its `firsts` to its `ends`."""
    spare = pool.num_free
    for s, first, end in zip(sequences, firsts, ends, strict=True):
        own = s.blocks[pool.window]
        held_to = own.first_block + len(own.blocks)
        spare -= max(0, (end - 1) // pool.tokens_per_block + 1 - max(held_to, first))
    return max(0, spare)


def _plan_decode(
    pool: WindowPool, sequences: Sequence[SequenceStep], num_heads: int, device: torch.device
) -> DecodeGroup:
    own = [s.blocks[pool.window] for s in sequences]
    return DecodeGroup(
        window=pool.window,
        num_kv_heads=num_heads,
        blocks=block_table([o.blocks for o in own], device),
        first_keys=torch.tensor([o.first_block * pool.tokens_per_block for o in own], device=device),
        positions=torch.tensor([s.start for s in sequences], device=device),
    )


def _plan_prefill(
    pool: WindowPool,
    sequences: Sequence[SequenceStep],
    chunk_positions: NDArray[np.int64],
    num_heads: int,
    device: torch.device,
) -> PrefillGroup:
    chunk_keys = np.where(chunk_positions < 0, NEVER_VISIBLE, chunk_positions)
    past = [s.blocks[pool.window] for s in sequences]
    longest = max(len(own.blocks) for own in past)
    if longest == 0:
        return PrefillGroup(past_rows=None, key_positions=_to(chunk_keys, device))
    size = pool.tokens_per_block
    keys = np.asarray([own.first_block for own in past])[:, None] * size + np.arange(longest * size)[None, :]
    keys[keys >= np.asarray([s.start for s in sequences])[:, None]] = NEVER_VISIBLE
    key_positions = np.concatenate([keys, chunk_keys], axis=1)
    rows = pool_rows(block_table([own.blocks for own in past], device), num_heads, pool.num_blocks * num_heads)
    return PrefillGroup(past_rows=rows, key_positions=_to(key_positions, device))


def _to(array: NDArray[np.int64], device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(device)
