"""One step of in-flight batching, laid out for the forward pass.

The tokens of all sequences are flattened into one row axis T: first the decoding sequences, one row each, then the
prompt chunks one after another. Everything that all layers of a window group share (block tables, masks, where new
K and V go) is computed here, once a step.

A decoding row reads its own key from the cache like any other. A prompt chunk reads the past from the cache and itself
from the chunk's own K and V (rounded to the stored dtype first), so a window layer needs room only for what outlives
the chunk.

Legend: T rows, S sequences, P prompt chunks, K KV heads, M blocks of the longest sequence, W rows that are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from puzzle_trtllm.models.reference.kernels.reads import Chunks, GroupReads
from puzzle_trtllm.models.reference.kv_cache import BlocksByWindow, PagedKvCache, WindowPool


@dataclass(frozen=True, kw_only=True)
class SequenceStep:
    """What one sequence contributes: `tokens` at positions `start`, `start + 1`, ..."""

    tokens: Sequence[int]
    start: int
    blocks: BlocksByWindow
    wants_logits: bool
    """True when the last of `tokens` is the last known one, so that the next can be sampled."""


@dataclass(frozen=True, kw_only=True)
class GroupStep:
    """One window group in this step."""

    write_tokens: Tensor | None
    """int64 [W]: which of the T rows are kept; None when all are"""
    write_rows: Tensor
    """int64 [W, K]"""
    write_offsets: Tensor
    """int64 [W, 1]"""
    decode: GroupReads | None
    prefill: GroupReads | None


@dataclass(frozen=True, kw_only=True)
class Step:
    """A whole step."""

    token_ids: Tensor
    """int64 [T]"""
    positions: Tensor
    """int64 [T]"""
    num_decodes: int
    chunks: Chunks | None
    logit_rows: Tensor
    """int64 [R]: rows whose logits are wanted, in the order of the sequences"""
    groups: dict[int | None, GroupStep]


def plan_step(sequences: Sequence[SequenceStep], cache: PagedKvCache) -> Step:
    """Claim blocks for what outlives this step and lay it out. Decoding sequences (one token, a past) come first."""
    num_decodes = sum(len(s.tokens) == 1 and s.start > 0 for s in sequences)
    if any(len(s.tokens) != 1 or s.start == 0 for s in sequences[:num_decodes]):
        raise ValueError("decoding sequences must come before prompt chunks")
    device = cache.device
    lengths = [len(s.tokens) for s in sequences]
    ends = np.cumsum(lengths)
    chunk_lengths = lengths[num_decodes:]
    return Step(
        token_ids=torch.tensor([token for s in sequences for token in s.tokens], device=device),
        positions=torch.tensor([p for s in sequences for p in range(s.start, s.start + len(s.tokens))], device=device),
        num_decodes=num_decodes,
        chunks=Chunks(lengths=torch.tensor(chunk_lengths, device=device), longest=max(chunk_lengths))
        if chunk_lengths
        else None,
        logit_rows=_to(np.asarray([e - 1 for s, e in zip(sequences, ends, strict=True) if s.wants_logits]), device),
        groups={
            window: _plan_group(pool, sequences, num_decodes, reuse=cache.reuse) for window, pool in cache.pools.items()
        },
    )


def _plan_group(pool: WindowPool, sequences: Sequence[SequenceStep], num_decodes: int, *, reuse: bool) -> GroupStep:
    decodes, chunks = sequences[:num_decodes], sequences[num_decodes:]
    # Before the claim, which may give back what a chunk still reads.
    prefill = _plan_reads(pool, chunks) if chunks else None
    _claim(pool, sequences, reuse=reuse and bool(chunks))
    tokens, blocks, offsets = _plan_writes(pool, decodes, chunks)
    rows = blocks[:, None] * pool.num_kv_heads + np.arange(pool.num_kv_heads)
    return GroupStep(
        write_tokens=None if len(tokens) == sum(len(s.tokens) for s in sequences) else _to(tokens, pool.device),
        write_rows=_to(rows, pool.device),
        write_offsets=_to(offsets[:, None], pool.device),
        decode=_plan_reads(pool, decodes) if decodes else None,
        prefill=prefill,
    )


def _plan_reads(pool: WindowPool, sequences: Sequence[SequenceStep]) -> GroupReads:
    own = [s.blocks[pool.window] for s in sequences]
    longest = max(len(o.blocks) for o in own)
    table = [[*o.blocks, *[0] * (longest - len(o.blocks))] for o in own]
    return GroupReads(
        window=pool.window,
        num_kv_heads=pool.num_kv_heads,
        blocks=torch.tensor(table, dtype=torch.int64, device=pool.device),
        first_keys=torch.tensor([o.first_block * pool.tokens_per_block for o in own], device=pool.device),
        positions=torch.tensor([s.start for s in sequences], device=pool.device),
    )


def _claim(pool: WindowPool, sequences: Sequence[SequenceStep], *, reuse: bool) -> None:
    """Claim blocks for what outlives this step.

    With `reuse`, chunks also claim blocks for what only another prompt could read, as far as the step leaves some. They
    are given back when it is committed, so it does not matter whether they are promised to somebody.
    """
    size = pool.tokens_per_block
    ends = [s.start + len(s.tokens) for s in sequences]
    firsts = [0 if pool.window is None else max(0, end - pool.window) // size for end in ends]
    spare = 0
    if reuse and pool.window is not None:
        claims = zip(sequences, firsts, ends, strict=True)
        missing = (pool.count_missing(s.blocks[pool.window], first * size, end) for s, first, end in claims)
        spare = pool.table.num_free - sum(missing)
    for s, first, end in zip(sequences, firsts, ends, strict=True):
        extra = max(0, min(first - s.start // size, spare))
        spare -= extra
        pool.extend(s.blocks[pool.window], (first - extra) * size, end)


def _plan_writes(
    pool: WindowPool, decodes: Sequence[SequenceStep], chunks: Sequence[SequenceStep]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(row, block, offset in the block) of each token that has a block."""
    size = pool.tokens_per_block
    row = len(decodes)
    rows = [np.arange(row)]
    blocks = [np.asarray([s.blocks[pool.window].blocks[-1] for s in decodes], dtype=np.int64)]
    offsets = [np.asarray([s.start % size for s in decodes], dtype=np.int64)]
    for s in chunks:
        end = s.start + len(s.tokens)
        own = s.blocks[pool.window]
        kept = np.arange(max(s.start, own.first_block * size), end)
        rows.append(kept - s.start + row)
        blocks.append(np.asarray(own.blocks, dtype=np.int64)[kept // size - own.first_block])
        offsets.append(kept % size)
        row += len(s.tokens)
    return np.concatenate(rows), np.concatenate(blocks), np.concatenate(offsets)


def _to(array: NDArray[np.int64], device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(device)
