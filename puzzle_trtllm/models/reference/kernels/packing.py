"""The layout of experts that the native kernels read.

Rows (outputs) come in tiles of 16, columns one after another inside a tile, so that one load gives a vector of 16 rows
and no sum runs across lanes. Tiles come in pairs: gate and up of the same hidden values, or two neighbours. Rows are
padded with zeros to whole pairs; MXFP4 keeps its 4.25 bits a weight.

Legend: E experts, R rows, C columns, F intermediate, D hidden, P pairs of tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (the customary name)
from torch import Tensor

from puzzle_trtllm.models.reference.kernels.expert_weights import Mxfp4Matrix

LANES = 16
Arrange = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class PackedMatrix:
    """One projection of all experts."""

    weights: Tensor
    """float32 `[E, P, 2, C, 16]`, bfloat16 `[E, P, 2, C / 2, 16, 2]`, MXFP4 codes uint8 `[E, P, 2, C / 8, 16, 4]`"""
    scales: Tensor | None
    """uint8 `[E, P, 2, C / 32, 16]`, of MXFP4 only"""


def gate_up_tiles(rows: Tensor) -> Tensor:
    """`[2F, ...]`, gate rows first, as `[F / 16, 2, 16, ...]`."""
    halves = _pad(rows.view(2, -1, *rows.shape[1:]), 1, LANES)
    return halves.view(2, -1, LANES, *rows.shape[1:]).transpose(0, 1)


def down_tiles(rows: Tensor) -> Tensor:
    """`[D, ...]` as `[D / 32, 2, 16, ...]`."""
    return _pad(rows, 0, 2 * LANES).view(-1, 2, LANES, *rows.shape[1:])


def pack(matrix: Tensor | Mxfp4Matrix, arrange: Arrange, dtype: torch.dtype, *, pad_columns: int = 1) -> PackedMatrix:
    """A matrix `[E, R, C]`, C padded to a multiple of `pad_columns`; `arrange` makes tiles of one expert's rows."""
    if isinstance(matrix, Tensor):

        def values(expert: int) -> Tensor:
            return _pack_values(arrange(_pad(matrix[expert].to(dtype), 1, pad_columns)))

        return PackedMatrix(weights=_each(len(matrix), values), scales=None)
    return PackedMatrix(
        weights=_each(len(matrix.blocks), lambda e: _pack_codes(arrange(matrix.blocks[e]))),
        scales=_each(len(matrix.scales), lambda e: arrange(matrix.scales[e]).transpose(-1, -2)),
    )


def pack_linear(weight: Tensor) -> Tensor:
    """`[R, C]`, as one expert of `pack` with neighbouring tiles in pairs."""
    return _pack_values(down_tiles(weight)).contiguous()


def pack_bias(bias: Tensor, arrange: Arrange) -> Tensor:
    """`[E, R]` as float32 `[E, P, 2, 16]`."""
    return _each(len(bias), lambda e: arrange(bias[e].float()))


def _pack_values(tiles: Tensor) -> Tensor:
    """`[P, 2, 16, C]`: columns outside; bfloat16 in pairs of columns, as its dot product takes them."""
    if tiles.dtype == torch.bfloat16:
        return tiles.reshape(*tiles.shape[:3], -1, 2).transpose(2, 3)
    return tiles.transpose(2, 3)


def _pack_codes(tiles: Tensor) -> Tensor:
    """`[P, 2, 16, C / 32, 16]`: the even ones of 8 columns in a row's first half word, the odd ones in its second.

    On disk byte n holds columns 2n (low nibble) and 2n + 1 (high).
    """
    first, second = tiles.reshape(*tiles.shape[:3], -1, 2, 2).unbind(-1)
    even = (first & 0x0F) | (second << 4)
    odd = (first >> 4) | (second & 0xF0)
    return torch.stack([even, odd], dim=-2).flatten(-2).transpose(2, 3)


def _each(count: int, make: Callable[[int], Tensor]) -> Tensor:
    """`make` of every expert, one at a time: nothing but the result is ever as large as all of them."""
    first = make(0)
    packed = torch.empty(count, *first.shape, dtype=first.dtype)
    packed[0] = first
    for expert in range(1, count):
        packed[expert] = make(expert)
    return packed


def _pad(rows: Tensor, axis: int, multiple: int) -> Tensor:
    missing = -rows.shape[axis] % multiple
    return F.pad(rows, (0, 0) * (rows.dim() - 1 - axis) + (0, missing)) if missing else rows
