"""Decode attention in plain PyTorch: gather the blocks, one batched product, softmax with sinks.

Query heads that share a KV head are the rows of one matrix product. Softmax runs in float32.

Legend: S sequences, H query heads, K KV heads, Dh head dim, L keys, M blocks, B tokens a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from puzzle_trtllm.models.reference.kv_cache import pool_rows, read_rows
from puzzle_trtllm.models.reference.step import DecodeGroup


def decode_attention(q: Tensor, sinks: Tensor, storage: Tensor, group: DecodeGroup) -> Tensor:
    """One query a sequence: q `[S, H, Dh]`, storage `[2, N * K, B, Dh]`; gives `[S, H * Dh]`."""
    sequences, num_heads, head_dim = q.shape
    kv_heads = group.num_kv_heads
    if "rows" not in group.derived:
        group.derived["rows"] = pool_rows(group.blocks, kv_heads, storage.shape[1])
        group.derived["mask"] = _mask(group, storage.shape[2], kv_heads, q.dtype)
    keys, values = read_rows(storage, group.derived["rows"], q.dtype)
    num_keys = keys.shape[2]
    scores = torch.baddbmm(
        group.derived["mask"],
        q.reshape(sequences * kv_heads, -1, head_dim),
        keys.view(-1, num_keys, head_dim).transpose(1, 2),
        alpha=head_dim**-0.5,
    )
    weights = softmax_with_sink(scores.view(sequences, num_heads, num_keys), sinks[:, None]).to(values.dtype)
    output = torch.bmm(weights.view(sequences * kv_heads, -1, num_keys), values.view(-1, num_keys, head_dim))
    return output.view(sequences, num_heads * head_dim)


def softmax_with_sink(scores: Tensor, sinks: Tensor) -> Tensor:
    """float32 softmax over the last axis with one more logit (`sinks`, broadcast) whose share is dropped."""
    sink = sinks.expand(*scores.shape[:-1], 1)
    return torch.cat([scores.float(), sink], dim=-1).softmax(dim=-1)[..., :-1]


def _mask(group: DecodeGroup, block_tokens: int, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """`[S * K, 1, L]`: 0 where a key is visible, -inf elsewhere."""
    offsets = torch.arange(group.blocks.shape[1] * block_tokens, device=group.blocks.device)
    keys, queries = group.first_keys[:, None] + offsets, group.positions[:, None]
    hidden = keys > queries
    if group.window is not None:
        hidden |= keys <= queries - group.window
    mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
    return mask.repeat_interleave(kv_heads, dim=0)[:, None, :]
