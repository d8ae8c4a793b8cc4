"""Decode attention on a GPU: reads the paged cache in place, BF16, float32 or E4M3, and only the keys in the window.

Flash decoding: a program per (sequence, KV head, share of the keys) keeps a running maximum, sum and output in float32;
a second kernel joins the shares of a head and adds its sink, which takes part in the softmax and adds nothing to the
output. The query heads that share a KV head are the rows of one product. Nothing that is launched depends on the
lengths, so a CUDA graph may hold it: a program finds its own range of keys and returns at once when there is none.

E4M3 is expanded by moving bits, as `kv_storage.expand_e4m3` does: exact, and on GPUs that know no FP8 too.

Legend: S sequences, H query heads, K KV heads, G = H / K, Dh head dim, N blocks of the pool, B tokens a block, M blocks
of the longest sequence, W shares of the keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from puzzle_trtllm.models.reference.kernels.reads import GroupReads

KEYS_AT_ONCE = 64
KEYS_OF_A_SHARE = 1024
MAX_SHARES = 32
"""At 131,072 keys every program still has 4,096 of them, and a batch of one fills a GPU with 8 KV heads x 32."""
MIN_ROWS = 16
"""tl.dot wants at least so many rows; fewer query heads are padded."""


def decode_attention(q: Tensor, sinks: Tensor, storage: Tensor, reads: GroupReads) -> Tensor:
    """One query a sequence: q `[S, H, Dh]`, storage `[2, N * K, B, Dh]`; gives `[S, H * Dh]`."""
    sequences, num_heads, head_dim = q.shape
    kv_heads, block_tokens = reads.num_kv_heads, storage.shape[2]
    most_keys = reads.blocks.shape[1] * block_tokens
    shares = max(1, min(MAX_SHARES, triton.cdiv(most_keys, KEYS_OF_A_SHARE)))
    outputs = q.new_empty((sequences, num_heads, shares, head_dim), dtype=torch.float32)
    maxima = q.new_empty((sequences, num_heads, shares), dtype=torch.float32)
    sums = torch.empty_like(maxima)
    is_e4m3 = storage.dtype == torch.float8_e4m3fn
    rows = triton.next_power_of_2(num_heads // kv_heads)
    _attend_share[(sequences, kv_heads, shares)](
        q.contiguous(),
        storage.view(torch.uint8) if is_e4m3 else storage,
        reads.blocks,
        reads.first_keys,
        reads.positions,
        outputs,
        maxima,
        sums,
        head_dim**-0.5,
        storage.stride(0),
        reads.blocks.shape[1],
        HEADS=num_heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        PADDED_DIM=triton.next_power_of_2(head_dim),
        ROWS=max(MIN_ROWS, rows),
        BLOCK_TOKENS=block_tokens,
        WINDOW=reads.window or 0,
        SHARES=shares,
        KEYS=KEYS_AT_ONCE,
        IS_E4M3=is_e4m3,
    )
    result = torch.empty((sequences, num_heads, head_dim), dtype=q.dtype, device=q.device)
    _join_shares[(sequences, num_heads)](
        outputs,
        maxima,
        sums,
        sinks,
        result,
        HEADS=num_heads,
        HEAD_DIM=head_dim,
        PADDED_DIM=triton.next_power_of_2(head_dim),
        SHARES=shares,
        PADDED_SHARES=triton.next_power_of_2(shares),
    )
    return result.view(sequences, num_heads * head_dim)


@triton.jit
def _attend_share(
    q_ptr,
    storage_ptr,
    blocks_ptr,
    first_keys_ptr,
    positions_ptr,
    outputs_ptr,
    maxima_ptr,
    sums_ptr,
    scale,
    values_offset,
    num_blocks,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,
    SHARES: tl.constexpr,
    KEYS: tl.constexpr,
    IS_E4M3: tl.constexpr,
):
    """Partial softmax and output of one sequence, KV head and share of the keys."""
    sequence, kv_head, share = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    group: tl.constexpr = HEADS // KV_HEADS
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, PADDED_DIM)
    heads = kv_head * group + rows
    row_is_real = rows < group
    dim_is_real = dims < HEAD_DIM

    position = tl.load(positions_ptr + sequence)
    first_key = tl.load(first_keys_ptr + sequence)
    first_visible = first_key
    if WINDOW > 0:
        first_visible = tl.maximum(first_key, position - WINDOW + 1)
    num_tiles = tl.cdiv(position + 1 - first_visible, KEYS)
    tiles_a_share = tl.cdiv(num_tiles, SHARES)
    begin = first_visible + share * tiles_a_share * KEYS
    end = tl.minimum(begin + tiles_a_share * KEYS, position + 1)

    q_RD = tl.load(
        q_ptr + (sequence * HEADS + heads)[:, None] * HEAD_DIM + dims[None, :],
        mask=row_is_real[:, None] & dim_is_real[None, :],
        other=0.0,
    )
    maximum = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    output = tl.zeros((ROWS, PADDED_DIM), tl.float32)
    for start in range(begin, end, KEYS):
        keys = start + tl.arange(0, KEYS)
        visible = keys < end
        places = keys - first_key
        table = blocks_ptr + sequence * num_blocks
        k_LD = read_paged(storage_ptr, table, places, visible, kv_head, dims, HEAD_DIM, KV_HEADS, BLOCK_TOKENS)
        v_LD = read_paged(
            storage_ptr + values_offset, table, places, visible, kv_head, dims, HEAD_DIM, KV_HEADS, BLOCK_TOKENS
        )
        k_LD, v_LD = widen(k_LD, q_RD.dtype, IS_E4M3), widen(v_LD, q_RD.dtype, IS_E4M3)
        maximum, total, output = attend_to(q_RD, k_LD, v_LD, visible[None, :], scale, maximum, total, output)

    slot = (sequence * HEADS + heads) * SHARES + share
    tl.store(maxima_ptr + slot, maximum, mask=row_is_real)
    tl.store(sums_ptr + slot, total, mask=row_is_real)
    tl.store(
        outputs_ptr + slot[:, None] * HEAD_DIM + dims[None, :],
        output,
        mask=row_is_real[:, None] & dim_is_real[None, :],
    )


@triton.jit
def _join_shares(
    outputs_ptr,
    maxima_ptr,
    sums_ptr,
    sinks_ptr,
    result_ptr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    SHARES: tl.constexpr,
    PADDED_SHARES: tl.constexpr,
):
    """The output of one sequence and query head from its shares; the sink counts in the sum alone."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    shares = tl.arange(0, PADDED_SHARES)
    dims = tl.arange(0, PADDED_DIM)
    is_real = shares < SHARES
    slot = (sequence * HEADS + head) * SHARES + shares
    maxima = tl.load(maxima_ptr + slot, mask=is_real, other=float("-inf"))
    sums = tl.load(sums_ptr + slot, mask=is_real, other=0.0)
    sink = tl.load(sinks_ptr + head)
    maximum = tl.maximum(tl.max(maxima, axis=0), sink)
    weights = tl.exp(maxima - maximum)
    total = tl.sum(weights * sums, axis=0) + tl.exp(sink - maximum)
    outputs = tl.load(
        outputs_ptr + slot[:, None] * HEAD_DIM + dims[None, :],
        mask=is_real[:, None] & (dims < HEAD_DIM)[None, :],
        other=0.0,
    )
    joined = tl.sum(outputs * weights[:, None], axis=0) / total
    result = result_ptr + (sequence * HEADS + head) * HEAD_DIM + dims
    tl.store(result, joined.to(result_ptr.dtype.element_ty), mask=dims < HEAD_DIM)


@triton.jit
def read_paged(
    storage_ptr,
    table_ptr,
    places,
    exists,
    kv_head,
    dims,
    HEAD_DIM: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """K or V of one head as stored, `[places, dims]`; places count from the first token of a sequence's first block."""
    block = tl.load(table_ptr + places // BLOCK_TOKENS, mask=exists, other=0)
    row = (block * KV_HEADS + kv_head) * BLOCK_TOKENS + places % BLOCK_TOKENS
    there = exists[:, None] & (dims < HEAD_DIM)[None, :]
    return tl.load(storage_ptr + row[:, None] * HEAD_DIM + dims[None, :], mask=there, other=0)


@triton.jit
def attend_to(q_RD, k_LD, v_LD, visible_RL, scale, maximum, total, output):
    """Running maximum, sum and output of a softmax after more keys."""
    scores = tl.dot(q_RD, tl.trans(k_LD), input_precision="ieee") * scale
    scores = tl.where(visible_RL, scores, float("-inf"))
    larger = tl.maximum(maximum, tl.max(scores, axis=1))
    weights = tl.exp(scores - larger[:, None])
    shrink = tl.exp(maximum - larger)
    product = tl.dot(weights.to(q_RD.dtype), v_LD, input_precision="ieee")
    return larger, total * shrink + tl.sum(weights, axis=1), output * shrink[:, None] + product


@triton.jit
def widen(stored, dtype: tl.constexpr, IS_E4M3: tl.constexpr):
    """K or V as stored, in the queries' dtype; E4M3 bits become the upper bits of a float32 and are rescaled by 2^120,
    with the subnormals (which a GPU may flush in between) computed from their three bits instead."""
    if IS_E4M3:
        code = stored.to(tl.int32)
        magnitude = code & 0x7F
        normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
        subnormal = magnitude.to(tl.float32) * 0.001953125  # 2^-9
        value = tl.where(magnitude < 8, subnormal, normal)
        return tl.where(code > 0x7F, -value, value).to(dtype)
    return stored.to(dtype)
