"""The experts of a layer in the form in which kernels are handed them: that of the disk, BF16 or MXFP4.

Legend: D hidden, F expert intermediate, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from puzzle_trtllm.mxfp4 import E2M1_VALUES, SCALE_BIAS


@dataclass(frozen=True, kw_only=True)
class Mxfp4Matrix:
    """One projection of all experts of a layer as MXFP4 bytes."""

    blocks: Tensor
    """uint8 [E, rows, cols / 32, 16]"""
    scales: Tensor
    """uint8 [E, rows, cols / 32]"""

    def expert(self, index: int) -> Mxfp4Matrix:
        """One expert's `[rows, cols]`."""
        return Mxfp4Matrix(blocks=self.blocks[index], scales=self.scales[index])

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """`[E, rows, cols]`; exact in float32 and bfloat16."""
        values = torch.tensor(E2M1_VALUES, dtype=dtype, device=self.blocks.device)
        codes = torch.stack([self.blocks & 0x0F, self.blocks >> 4], dim=-1).flatten(-2)
        exponents = (self.scales.to(torch.int32) - SCALE_BIAS).unsqueeze(-1)
        return torch.ldexp(values[codes.int()], exponents).to(dtype).flatten(-2)


@dataclass(frozen=True, kw_only=True)
class ExpertWeights:
    """The experts of one layer, as loaded."""

    gate_up: Tensor | Mxfp4Matrix
    """`[E, 2F, D]`, gate rows first, then up rows."""
    gate_up_bias: Tensor
    """`[E, 2F]`"""
    down: Tensor | Mxfp4Matrix
    """`[E, D, F]`"""
    down_bias: Tensor
    """`[E, D]`"""
