"""Attention of prompt chunks on a GPU: reads the paged cache in place, and the chunk's own K and V as they are stored.

A program per (chunk, tile of queries, KV head) keeps a running maximum, sum and output in float32, first over the past
that its window reaches, then over the chunk up to its last query. The queries of a tile and the query heads that share
a KV head are the rows of one product. The softmax starts with the sink, so that a row which sees no key is zero.

Legend: P chunks, R rows of all chunks, H query heads, K KV heads, G = H / K, Dh head dim, N blocks of the pool, B
tokens a block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from puzzle_trtllm.models.reference.kernels.reads import Chunks, GroupReads
from puzzle_trtllm.models.reference.kernels.triton_attention import (
    KEYS_AT_ONCE,
    MIN_ROWS,
    attend_to,
    read_paged,
    widen,
)

ROWS_AT_ONCE = 128
"""Queries of a tile times heads that share a KV head."""
NUM_WARPS = 8
"""With four, a program of so many rows takes every register there is, and on a Blackwell GPU more."""


def prefill_attention(
    q: Tensor, kv: Tensor, sinks: Tensor, storage: Tensor, reads: GroupReads, chunks: Chunks
) -> Tensor:
    """q `[R, H, Dh]`, kv `[2, R, K, Dh]` and storage `[2, N * K, B, Dh]` as stored; gives `[R, H * Dh]`."""
    num_rows, num_heads, head_dim = q.shape
    group = num_heads // reads.num_kv_heads
    queries = max(1, ROWS_AT_ONCE // group)
    if "ends" not in chunks.derived:
        chunks.derived["ends"] = chunks.lengths.cumsum(0)
    is_e4m3 = storage.dtype == torch.float8_e4m3fn
    result = torch.empty((num_rows, num_heads, head_dim), dtype=q.dtype, device=q.device)
    _attend_chunk[(len(chunks.lengths), triton.cdiv(chunks.longest, queries), reads.num_kv_heads)](
        q,
        kv.view(torch.uint8) if is_e4m3 else kv,
        storage.view(torch.uint8) if is_e4m3 else storage,
        sinks,
        reads.blocks,
        reads.first_keys,
        reads.positions,
        chunks.lengths,
        chunks.derived["ends"],
        result,
        head_dim**-0.5,
        q.stride(0),
        kv.stride(0),
        storage.stride(0),
        reads.blocks.shape[1],
        HEADS=num_heads,
        KV_HEADS=reads.num_kv_heads,
        HEAD_DIM=head_dim,
        PADDED_DIM=triton.next_power_of_2(head_dim),
        QUERIES=queries,
        ROWS=max(MIN_ROWS, triton.next_power_of_2(queries * group)),
        BLOCK_TOKENS=storage.shape[2],
        WINDOW=reads.window or 0,
        KEYS=KEYS_AT_ONCE,
        IS_E4M3=is_e4m3,
        num_warps=NUM_WARPS,
    )
    return result.view(num_rows, num_heads * head_dim)


@triton.jit
def _attend_chunk(
    q_ptr,
    kv_ptr,
    storage_ptr,
    sinks_ptr,
    blocks_ptr,
    first_keys_ptr,
    starts_ptr,
    lengths_ptr,
    ends_ptr,
    result_ptr,
    scale,
    q_stride,
    own_values_offset,
    values_offset,
    num_blocks,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,
    KEYS: tl.constexpr,
    IS_E4M3: tl.constexpr,
):
    """One chunk's queries from `first_query` on, for the heads of one KV head."""
    chunk, first_query, kv_head = tl.program_id(0), tl.program_id(1) * QUERIES, tl.program_id(2)
    group: tl.constexpr = HEADS // KV_HEADS
    start, length = tl.load(starts_ptr + chunk), tl.load(lengths_ptr + chunk)
    first_key = tl.load(first_keys_ptr + chunk)
    first_row = tl.load(ends_ptr + chunk) - length

    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, PADDED_DIM)
    query = first_query + rows // group
    heads = kv_head * group + rows % group
    row_is_real = (rows < QUERIES * group) & (query < length)
    dim_is_real = dims < HEAD_DIM
    real = row_is_real[:, None] & dim_is_real[None, :]
    q_RD = tl.load(
        q_ptr + (first_row + query)[:, None] * q_stride + heads[:, None] * HEAD_DIM + dims, mask=real, other=0.0
    )
    maximum = tl.load(sinks_ptr + heads).to(tl.float32)
    total = tl.full((ROWS,), 1.0, tl.float32)
    output = tl.zeros((ROWS, PADDED_DIM), tl.float32)

    begin = first_key
    own_begin = first_query * 0
    if WINDOW > 0:
        begin = tl.maximum(first_key, start + first_query - WINDOW + 1)
        own_begin = tl.maximum(0, first_query - WINDOW + 1)
    # A tile behind a shorter chunk's end has nothing to do.
    end = tl.where(first_query < length, start, begin)
    own_end = tl.where(first_query < length, tl.minimum(first_query + QUERIES, length), own_begin)
    for tile in range(begin, end, KEYS):
        keys = tile + tl.arange(0, KEYS)
        exists = keys < end
        places = keys - first_key
        table = blocks_ptr + chunk * num_blocks
        k_LD = read_paged(storage_ptr, table, places, exists, kv_head, dims, HEAD_DIM, KV_HEADS, BLOCK_TOKENS)
        v_LD = read_paged(
            storage_ptr + values_offset, table, places, exists, kv_head, dims, HEAD_DIM, KV_HEADS, BLOCK_TOKENS
        )
        k_LD, v_LD = widen(k_LD, q_RD.dtype, IS_E4M3), widen(v_LD, q_RD.dtype, IS_E4M3)
        visible = exists[None, :] & row_is_real[:, None]
        if WINDOW > 0:
            visible &= keys[None, :] > (start + query)[:, None] - WINDOW
        maximum, total, output = attend_to(q_RD, k_LD, v_LD, visible, scale, maximum, total, output)
    for tile in range(own_begin, own_end, KEYS):
        keys = tile + tl.arange(0, KEYS)
        exists = keys < own_end
        row = (first_row + keys) * KV_HEADS + kv_head
        address = kv_ptr + row[:, None] * HEAD_DIM + dims[None, :]
        there = exists[:, None] & dim_is_real[None, :]
        k_LD = widen(tl.load(address, mask=there, other=0), q_RD.dtype, IS_E4M3)
        v_LD = widen(tl.load(address + own_values_offset, mask=there, other=0), q_RD.dtype, IS_E4M3)
        visible = exists[None, :] & (keys[None, :] <= query[:, None])
        if WINDOW > 0:
            visible &= keys[None, :] > query[:, None] - WINDOW
        maximum, total, output = attend_to(q_RD, k_LD, v_LD, visible, scale, maximum, total, output)

    place = ((first_row + query) * HEADS + heads)[:, None] * HEAD_DIM + dims[None, :]
    tl.store(result_ptr + place, (output / total[:, None]).to(result_ptr.dtype.element_ty), mask=real)
