"""Attention with sinks over a paged cache in plain PyTorch: gather the blocks, one batched product, softmax.

Each query head has a sink: one more logit in the softmax that adds nothing to the output, so a head can attend to
nothing. Softmax runs in float32. Query heads that share a KV head are the rows of one matrix product.

Legend: S sequences, P chunks, C longest chunk, R rows of all chunks, H query heads, K KV heads, Dh head dim, L keys, N
blocks of the pool, M blocks of the longest sequence, B tokens a block, Q queries of a tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from puzzle_trtllm.models.reference.kernels.kv_storage import pool_rows, read_rows, take
from puzzle_trtllm.models.reference.kernels.reads import Chunks, GroupReads

MAX_SCORES = 1 << 24
"""Scores computed at a time in prefill; longer prompts are cut into tiles of queries."""
_NEVER_VISIBLE = torch.iinfo(torch.int64).max
"""Position of a padding key: after every query."""


def decode_attention(q: Tensor, sinks: Tensor, storage: Tensor, reads: GroupReads) -> Tensor:
    """One query a sequence: q `[S, H, Dh]`, storage `[2, N * K, B, Dh]`; gives `[S, H * Dh]`."""
    sequences, num_heads, head_dim = q.shape
    kv_heads = reads.num_kv_heads
    if "rows" not in reads.derived:
        reads.derived["rows"] = pool_rows(reads.blocks, kv_heads, storage.shape[1])
        hidden = _is_hidden(_stored_positions(reads, storage.shape[2]), reads.positions[:, None], reads.window)
        reads.derived["hidden"] = hidden.repeat_interleave(kv_heads, dim=0)
    keys, values = read_rows(storage, reads.derived["rows"], q.dtype)
    hidden, num_keys = reads.derived["hidden"], keys.shape[2]
    scores = torch.bmm(
        q.reshape(sequences * kv_heads, -1, head_dim), keys.view(-1, num_keys, head_dim).transpose(1, 2)
    ).mul_(head_dim**-0.5)
    scores.masked_fill_(hidden, float("-inf"))
    weights = softmax_with_sink(scores.view(sequences, num_heads, num_keys), sinks[:, None]).to(values.dtype)
    values = _without_garbage(values.view(-1, num_keys, head_dim), hidden.transpose(1, 2))
    output = torch.bmm(weights.view(sequences * kv_heads, -1, num_keys), values)
    return output.view(sequences, num_heads * head_dim)


def softmax_with_sink(scores: Tensor, sinks: Tensor) -> Tensor:
    """float32 softmax over the last axis with one more logit (`sinks`, broadcast) whose share is dropped."""
    sink = sinks.expand(*scores.shape[:-1], 1)
    return torch.cat([scores.float(), sink], dim=-1).softmax(dim=-1)[..., :-1]


def _without_garbage(values: Tensor, hidden: Tensor) -> Tensor:
    """Zeros where nobody may look: a freed block keeps what was written to it, and no weight makes a NaN zero."""
    return values.masked_fill(hidden, 0)


def _stored_positions(reads: GroupReads, block_tokens: int) -> Tensor:
    """`[S, M * B]`: of every key that the blocks have room for."""
    places = torch.arange(reads.blocks.shape[1] * block_tokens, device=reads.blocks.device)
    return reads.first_keys[:, None] + places


def _is_hidden(keys: Tensor, queries: Tensor, window: int | None) -> Tensor:
    """`[S, Q, L]` of positions `[S, L]` and `[S, Q]`."""
    keys, queries = keys[:, None, :], queries[:, :, None]
    hidden = keys > queries
    if window is not None:
        hidden |= keys <= queries - window
    return hidden


def prefill_attention(
    q: Tensor, kv: Tensor, sinks: Tensor, storage: Tensor, reads: GroupReads, chunks: Chunks
) -> Tensor:
    """All chunks, padded to `[P, C]`: q `[R, H, Dh]`, their own K and V as stored `[2, R, K, Dh]`, and the past from
    storage `[2, N * K, B, Dh]`; gives `[R, H * Dh]`."""
    rows, valid = _pad(chunks)
    queries, keys_at = _chunk_positions(reads, chunks, storage.shape[2])
    keys, values = take(kv, rows).to(q.dtype).transpose(2, 3)
    if reads.blocks.shape[1]:
        if "rows" not in reads.derived:
            reads.derived["rows"] = pool_rows(reads.blocks, reads.num_kv_heads, storage.shape[1])
        past_k, past_v = read_rows(storage, reads.derived["rows"], q.dtype)
        unused = keys_at[:, : past_k.shape[2]] == _NEVER_VISIBLE
        past_v = _without_garbage(past_v, unused[:, None, :, None])
        keys, values = torch.cat([past_k, keys], dim=2), torch.cat([past_v, values], dim=2)
    tile = max(1, MAX_SCORES // (len(rows) * q.shape[1] * keys.shape[2]))
    padded = q[rows]
    tiles = [
        _attend_tile(
            padded[:, i : i + tile], keys, values, sinks, _is_hidden(keys_at, queries[:, i : i + tile], reads.window)
        )
        for i in range(0, chunks.longest, tile)
    ]
    output = torch.cat(tiles, dim=1) if len(tiles) > 1 else tiles[0]
    return output.view(rows.numel(), -1)[valid]


def _attend_tile(q: Tensor, keys: Tensor, values: Tensor, sinks: Tensor, hidden: Tensor) -> Tensor:
    """q `[P, Q, H, Dh]`, keys and values `[P, K, L, Dh]`, hidden `[P, Q, L]`; gives `[P, Q, H * Dh]`."""
    chunks, num_queries, _, head_dim = q.shape
    kv_heads = keys.shape[1]
    grouped = q.view(chunks, num_queries, kv_heads, -1, head_dim).permute(0, 2, 3, 1, 4)
    scores = torch.matmul(grouped, keys[:, :, None].transpose(-1, -2)) * head_dim**-0.5
    scores = scores.masked_fill_(hidden[:, None, None], float("-inf"))
    weights = softmax_with_sink(scores, sinks.view(kv_heads, -1, 1, 1)).to(values.dtype)
    output = torch.matmul(weights, values[:, :, None])
    return output.permute(0, 3, 1, 2, 4).reshape(chunks, num_queries, -1)


def _pad(chunks: Chunks) -> tuple[Tensor, Tensor]:
    """`[P, C]`: the row of each padded token, 0 for padding; `[R]`: where in it each row is."""
    if "rows" not in chunks.derived:
        offsets, lengths = torch.arange(chunks.longest, device=chunks.lengths.device), chunks.lengths[:, None]
        is_token = offsets < lengths
        chunks.derived["rows"] = torch.where(is_token, lengths.cumsum(0) - lengths + offsets, 0)
        chunks.derived["valid"] = is_token.flatten().nonzero()[:, 0]
    return chunks.derived["rows"], chunks.derived["valid"]


def _chunk_positions(reads: GroupReads, chunks: Chunks, block_tokens: int) -> tuple[Tensor, Tensor]:
    """Of queries `[P, C]`, -1 for padding, which sees nothing; of keys `[P, M * B + C]`, the past first."""
    if "queries" not in reads.derived:
        offsets, starts = torch.arange(chunks.longest, device=reads.positions.device), reads.positions[:, None]
        own = torch.where(offsets < chunks.lengths[:, None], starts + offsets, -1)
        past = _stored_positions(reads, block_tokens)
        keys = torch.cat([torch.where(past < starts, past, -1), own], dim=1)
        reads.derived["queries"], reads.derived["keys"] = own, keys.masked_fill(keys < 0, _NEVER_VISIBLE)
    return reads.derived["queries"], reads.derived["keys"]
