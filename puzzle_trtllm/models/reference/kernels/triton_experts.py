"""Experts on a GPU, in MXFP4 as they are stored: packed values are expanded in registers, tile by tile.

The tokens of an expert are gathered into tiles of a few rows (`_tiles_by_expert`, on the device: no count ever comes
back to the CPU, so a CUDA graph may hold it all). One kernel multiplies a tile by gate and up and applies the clamped
SwiGLU; a second multiplies by down and weighs by the router's share into a row of its own for each (token, choice), and
the sum over choices is taken in a fixed order: results do not depend on which program comes first.

A packed byte holds two neighbours of the contracted axis, so x is read as its even and its odd columns and each half
is multiplied by one nibble: nothing has to be interleaved. e2m1 times a power of two is exact in BF16.

Legend: T tokens, k experts a token, E experts held here, D hidden, F expert intermediate; R rows of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from puzzle_trtllm.architecture import SWIGLU_ALPHA
from puzzle_trtllm.models.reference.kernels import ExpertMixture
from puzzle_trtllm.models.reference.kernels.expert_weights import ExpertWeights, Mxfp4Matrix
from puzzle_trtllm.models.reference.kernels.torch_experts import hold_as_loaded

OUTPUTS_AT_ONCE = 64
BYTES_AT_ONCE = 64
"""Packed bytes of the contracted axis in one step: 128 values."""
LARGEST_SCALE = 240
"""Scale bytes above it stand for more than 2^113; the kernel's arithmetic on exponents ends there."""


@dataclass(frozen=True, kw_only=True)
class TritonExperts:
    """The experts of one layer as MXFP4."""

    weights: ExpertWeights
    limit: float

    def __call__(self, x: Tensor, shares: Tensor, chosen: Tensor) -> Tensor:
        gate_up, down = self.weights.gate_up, self.weights.down
        assert isinstance(gate_up, Mxfp4Matrix) and isinstance(down, Mxfp4Matrix)
        tokens, choices = chosen.shape
        num_experts, outputs, groups, _ = gate_up.blocks.shape
        ffn = outputs // 2
        rows = rows_of_a_tile(tokens * choices, num_experts)
        slots, experts = tiles_by_expert(chosen, num_experts, rows)
        hidden = torch.empty((tokens * choices, ffn), dtype=x.dtype, device=x.device)
        _gate_up[(len(experts), -(-ffn // OUTPUTS_AT_ONCE))](
            x.contiguous(),
            gate_up.blocks,
            gate_up.scales,
            self.weights.gate_up_bias,
            slots,
            experts,
            hidden,
            self.limit,
            CHOICES=choices,
            FFN=ffn,
            GROUPS=groups,
            ROWS=rows,
            OUTPUTS=OUTPUTS_AT_ONCE,
            BYTES=BYTES_AT_ONCE,
            ALPHA=SWIGLU_ALPHA,
        )
        each = torch.zeros((tokens * choices, x.shape[1]), dtype=torch.float32, device=x.device)
        _down[(len(experts), -(-x.shape[1] // OUTPUTS_AT_ONCE))](
            hidden,
            down.blocks,
            down.scales,
            self.weights.down_bias,
            shares.contiguous(),
            slots,
            experts,
            each,
            HIDDEN=x.shape[1],
            GROUPS=down.blocks.shape[2],
            ROWS=rows,
            OUTPUTS=OUTPUTS_AT_ONCE,
            BYTES=BYTES_AT_ONCE,
        )
        return each.view(tokens, choices, -1).sum(dim=1).to(x.dtype)


def hold_mxfp4(experts: ExpertWeights, *, limit: float) -> ExpertMixture:
    """MXFP4 stays MXFP4; BF16 experts are multiplied by torch.

    Raises ValueError for scales above 2^113, which no trained model has.
    """
    if not (isinstance(experts.gate_up, Mxfp4Matrix) and isinstance(experts.down, Mxfp4Matrix)):
        return hold_as_loaded(experts, limit=limit)
    for matrix in (experts.gate_up, experts.down):
        if matrix.scales.numel() and int(matrix.scales.max()) > LARGEST_SCALE:
            raise ValueError(f"an MXFP4 scale byte above {LARGEST_SCALE}: found {int(matrix.scales.max())}")
    return TritonExperts(weights=experts, limit=limit)


def rows_of_a_tile(pairs: int, num_experts: int) -> int:
    """Rows so that an evenly used expert fills one tile, within what tensor cores take: 16, 32 or 64."""
    per_expert = -(-pairs // max(1, num_experts))
    return min(64, max(16, 1 << (per_expert - 1).bit_length()))


def tiles_by_expert(chosen: Tensor, num_experts: int, rows: int) -> tuple[Tensor, Tensor]:
    """The (token, choice) pairs sorted by expert and cut into tiles of `rows`, without a word to the CPU.

    Gives `(slots int32 [tiles * rows], experts int32 [tiles])`: the flat index of a pair in `chosen` `[T, k]`, or -1
    for padding; and the expert of a tile, or -1 for a tile that is not used. Pairs whose expert is not held here
    (numbered `num_experts`) are in no tile. There are as many tiles as could ever be needed: each expert leaves at most
    one tile part empty.
    """
    pairs, device = chosen.numel(), chosen.device
    flat = chosen.flatten()
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=device).scatter_add_(0, flat, torch.ones_like(flat))
    tiles_of = (counts + rows - 1) // rows
    last_tile = tiles_of.cumsum(0)
    num_tiles = min(pairs, num_experts + pairs // rows)
    expert = torch.searchsorted(last_tile[:-1], torch.arange(num_tiles, device=device), right=True)
    experts = torch.where(expert < num_experts, expert, -1)

    order = flat.argsort(stable=True)
    owner = flat[order]
    rank = torch.arange(pairs, device=device) - (counts.cumsum(0) - counts)[owner]
    place = (last_tile - tiles_of)[owner] * rows + rank
    slots = torch.full((num_tiles * rows + 1,), -1, dtype=torch.int32, device=device)
    slots[torch.where(owner < num_experts, place, num_tiles * rows)] = order.int()
    return slots[:-1], experts.int()


@triton.jit
def _gate_up(
    x_ptr,
    blocks_ptr,
    scales_ptr,
    bias_ptr,
    slots_ptr,
    experts_ptr,
    hidden_ptr,
    limit,
    CHOICES: tl.constexpr,
    FFN: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BYTES: tl.constexpr,
    ALPHA: tl.constexpr,
):
    """hidden[slot] = swiglu(x[token] . gate, x[token] . up) of one tile of rows and `OUTPUTS` hidden values."""
    tile = tl.program_id(0)
    expert = tl.load(experts_ptr + tile)
    if expert < 0:
        return
    slots = tl.load(slots_ptr + tile * ROWS + tl.arange(0, ROWS))
    outputs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    x_rows = x_ptr + (slots // CHOICES).to(tl.int64) * (GROUPS * 32)
    gate_rows = expert.to(tl.int64) * (2 * FFN) + outputs
    inside = outputs < FFN
    gate = tl.zeros((ROWS, OUTPUTS), tl.float32)
    up = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for start in range(0, GROUPS * 16, BYTES):
        places = start + tl.arange(0, BYTES)
        there = places < GROUPS * 16
        even = tl.load(x_rows[:, None] + 2 * places[None, :], mask=(slots >= 0)[:, None] & there[None, :], other=0.0)
        odd = tl.load(x_rows[:, None] + 2 * places[None, :] + 1, mask=(slots >= 0)[:, None] & there[None, :], other=0.0)
        gate = _multiply(gate, even, odd, blocks_ptr, scales_ptr, gate_rows, inside, places, there, GROUPS)
        up = _multiply(up, even, odd, blocks_ptr, scales_ptr, gate_rows + FFN, inside, places, there, GROUPS)
    gate += tl.load(bias_ptr + gate_rows, mask=inside, other=0.0).to(tl.float32)[None, :]
    up += tl.load(bias_ptr + gate_rows + FFN, mask=inside, other=0.0).to(tl.float32)[None, :]
    gate = tl.minimum(gate, limit)
    up = tl.minimum(tl.maximum(up, -limit), limit)
    value = (up + 1.0) * gate / (1.0 + tl.exp(-ALPHA * gate))
    where = hidden_ptr + slots.to(tl.int64)[:, None] * FFN + outputs[None, :]
    tl.store(where, value.to(hidden_ptr.dtype.element_ty), mask=(slots >= 0)[:, None] & inside[None, :])


@triton.jit
def _down(
    hidden_ptr,
    blocks_ptr,
    scales_ptr,
    bias_ptr,
    shares_ptr,
    slots_ptr,
    experts_ptr,
    each_ptr,
    HIDDEN: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """each[slot] = share[slot] * (hidden[slot] . down + bias) of one tile of rows and `OUTPUTS` columns of D."""
    tile = tl.program_id(0)
    expert = tl.load(experts_ptr + tile)
    if expert < 0:
        return
    slots = tl.load(slots_ptr + tile * ROWS + tl.arange(0, ROWS))
    outputs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = outputs < HIDDEN
    hidden_rows = hidden_ptr + slots.to(tl.int64) * (GROUPS * 32)
    down_rows = expert.to(tl.int64) * HIDDEN + outputs
    result = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for start in range(0, GROUPS * 16, BYTES):
        places = start + tl.arange(0, BYTES)
        there = places < GROUPS * 16
        mask = (slots >= 0)[:, None] & there[None, :]
        even = tl.load(hidden_rows[:, None] + 2 * places[None, :], mask=mask, other=0.0)
        odd = tl.load(hidden_rows[:, None] + 2 * places[None, :] + 1, mask=mask, other=0.0)
        result = _multiply(result, even, odd, blocks_ptr, scales_ptr, down_rows, inside, places, there, GROUPS)
    result += tl.load(bias_ptr + down_rows, mask=inside, other=0.0).to(tl.float32)[None, :]
    result *= tl.load(shares_ptr + slots, mask=slots >= 0, other=0.0).to(tl.float32)[:, None]
    where = each_ptr + slots.to(tl.int64)[:, None] * HIDDEN + outputs[None, :]
    tl.store(where, result, mask=(slots >= 0)[:, None] & inside[None, :])


@triton.jit
def _multiply(total, even, odd, blocks_ptr, scales_ptr, rows, inside, places, there, GROUPS: tl.constexpr):
    """total `[R, N]` + x `[R, 2 * bytes]` (even and odd columns) times the packed weight rows `[N]` at `places`."""
    mask = inside[:, None] & there[None, :]
    packed = tl.load(blocks_ptr + rows[:, None] * (GROUPS * 16) + places[None, :], mask=mask, other=0).to(tl.int32)
    scale = tl.load(scales_ptr + rows[:, None] * GROUPS + (places // 16)[None, :], mask=mask, other=0).to(tl.int32)
    # 2^(scale - 127), and 2^14 for the exponent bias of float16 (15) against e2m1's (1)
    factor = ((scale + 14) << 23).to(tl.float32, bitcast=True)
    low = (_e2m1_as_half(packed & 0xF) * factor).to(even.dtype)
    high = (_e2m1_as_half(packed >> 4) * factor).to(even.dtype)
    total = tl.dot(even, tl.trans(low), total, input_precision="ieee")
    return tl.dot(odd, tl.trans(high), total, input_precision="ieee")


@triton.jit
def _e2m1_as_half(code):
    """The value of a nibble times 2^-14: its bits are the upper bits of a float16, 0.5 becoming a subnormal one."""
    bits = ((code & 0x7) << 9) | ((code & 0x8) << 12)
    return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
