"""Attention with sinks over a paged cache: prompt chunks here, decoding rows by the kernel.

Each query head has a sink: one more logit in the softmax that adds nothing to the output, so a head can attend to
nothing. Softmax runs in float32. Query heads that share a KV head are folded into the rows of one matrix product.

Legend: T rows, P chunks, C longest chunk, H query heads, K KV heads, Dh head dim, L keys, Q queries of a tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from puzzle_trtllm.models.reference.kernels import Kernels
from puzzle_trtllm.models.reference.kernels.torch_attention import softmax_with_sink
from puzzle_trtllm.models.reference.kv_cache import bits_of, read_rows
from puzzle_trtllm.models.reference.step import GroupStep, Step

MAX_SCORES = 1 << 24
"""Scores computed at a time in prefill; longer prompts are cut into tiles of queries."""


def attend(
    kernels: Kernels, q: Tensor, stored: Tensor, sinks: Tensor, step: Step, group: GroupStep, storage: Tensor
) -> Tensor:
    """Write the new K and V `[2, T, K, Dh]` and attend with q `[T, H, Dh]`; gives `[T, H * Dh]`."""
    prefill = None
    if step.num_decodes < len(q):
        # Before the write: the past may lie in blocks that the chunk is about to take over.
        prefill = _attend_chunks(q, stored, sinks, step, group, storage)
    kept = stored if group.write_tokens is None else _take(stored, group.write_tokens)
    kernels.write(storage, group.write_rows, group.write_offsets, kept)
    if group.decode is None:
        assert prefill is not None
        return prefill
    decoded = kernels.decode_attention(q[: step.num_decodes], sinks, storage, group.decode)
    return decoded if prefill is None else torch.cat([decoded, prefill])


def _attend_chunks(q: Tensor, stored: Tensor, sinks: Tensor, step: Step, group: GroupStep, storage: Tensor) -> Tensor:
    """All prompt chunks with K and V as stored, `[2, T, K, Dh]`, padded to `[P, C]`; gives `[T - S, H * Dh]`."""
    assert step.chunk_rows is not None and step.chunk_positions is not None and step.chunk_valid is not None
    assert group.prefill is not None
    queries = q[step.chunk_rows]
    keys, values = _take(stored, step.chunk_rows).to(q.dtype).transpose(2, 3)
    if group.prefill.past_rows is not None:
        past_k, past_v = read_rows(storage, group.prefill.past_rows, q.dtype)
        keys, values = torch.cat([past_k, keys], dim=2), torch.cat([past_v, values], dim=2)
    chunks, longest, num_heads, head_dim = queries.shape
    tile = max(1, MAX_SCORES // (chunks * num_heads * keys.shape[2]))
    tiles = [
        _attend_tile(
            queries[:, i : i + tile],
            keys,
            values,
            step.chunk_positions[:, i : i + tile],
            group.prefill.key_positions,
            group.window,
            sinks,
        )
        for i in range(0, longest, tile)
    ]
    output = torch.cat(tiles, dim=1) if len(tiles) > 1 else tiles[0]
    return output.reshape(chunks * longest, num_heads * head_dim)[step.chunk_valid]


def _attend_tile(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    window: int | None,
    sinks: Tensor,
) -> Tensor:
    """q `[P, Q, H, Dh]`, keys and values `[P, K, L, Dh]`, positions `[P, Q]` and `[P, L]`; gives `[P, Q, H, Dh]`."""
    chunks, num_queries, num_heads, head_dim = q.shape
    kv_heads = keys.shape[1]
    hidden = key_positions[:, None, :] > query_positions[:, :, None]
    if window is not None:
        hidden |= key_positions[:, None, :] <= query_positions[:, :, None] - window
    grouped = q.view(chunks, num_queries, kv_heads, -1, head_dim).permute(0, 2, 3, 1, 4)
    scores = torch.matmul(grouped, keys[:, :, None].transpose(-1, -2)) * head_dim**-0.5
    scores = scores.masked_fill_(hidden[:, None, None], float("-inf"))
    weights = softmax_with_sink(scores, sinks.view(kv_heads, -1, 1, 1)).to(values.dtype)
    output = torch.matmul(weights, values[:, :, None])
    return output.permute(0, 3, 1, 2, 4).reshape(chunks, num_queries, num_heads, head_dim)


def _take(kv: Tensor, index: Tensor) -> Tensor:
    """`kv[:, index]` for a dtype that may have no indexing kernel (float8)."""
    return bits_of(kv)[:, index].view(kv.dtype)
