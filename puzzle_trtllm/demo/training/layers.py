"""Linear layer and norm that can compute with the bfloat16 values that a checkpoint will store."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from puzzle_trtllm.demo.training import rounding


class RoundedLinear(nn.Linear):
    """A linear layer that can compute with bfloat16 values of its weight and bias."""

    rounded = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.rounded:
            return functional.linear(x, self.weight, self.bias)
        bias = None if self.bias is None else rounding.bfloat16(self.bias)
        return functional.linear(x, rounding.bfloat16(self.weight), bias)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in float32."""

    rounded = False

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        weight = rounding.bfloat16(self.weight) if self.rounded else self.weight
        return functional.rms_norm(x.float(), weight.shape, weight, self.eps)
