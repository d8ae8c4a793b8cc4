"""Straight-through rounding: compute with the values that will be stored, learn as if they were not rounded.

    forward: round(w)        backward: d round(w) / dw := 1

In the last phase of training every expert matrix passes through MXFP4 and every other tensor through bfloat16, so the
shipped bytes are the trained model and nothing is lost at export. `mxfp4` gives bit for bit the values that
`puzzle_trtllm.mxfp4` stores: shared exponent floor(log2(amax)) - 2 for 32 values along the last axis, e2m1 rounded to
nearest with ties to even, saturated at 6.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_SIZE = 32


def _mxfp4_values(weight: Tensor) -> Tensor:
    grouped = weight.view(*weight.shape[:-1], -1, BLOCK_SIZE)
    amax = grouped.abs().amax(-1, keepdim=True)
    exponent = torch.frexp(amax).exponent - 1 - 2
    exponent = torch.where(amax > 0, exponent, torch.zeros_like(exponent)).clamp(-127, 127)
    scaled = torch.ldexp(grouped, -exponent)
    magnitude = scaled.abs()
    # Spacing of e2m1: 0.5 below 2, 1 in [2, 4), 2 from 4 on. torch.round ties to even, and an even multiple of the
    # spacing is an even code, because 2, 4 and 6 continue the count where the spacing changes.
    spacing = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    rounded = (torch.round(magnitude / spacing) * spacing).clamp(max=6.0).copysign(scaled)
    return torch.ldexp(rounded, exponent).flatten(-2)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, weight: Tensor, kind: str) -> Tensor:
        return _mxfp4_values(weight) if kind == "mxfp4" else weight.bfloat16().to(weight.dtype)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def mxfp4(weight: Tensor) -> Tensor:
    """Round float32 `[..., K]` to MXFP4 values along K (a multiple of 32); the gradient passes unchanged."""
    result: Tensor = _StraightThrough.apply(weight, "mxfp4")  # type: ignore[no-untyped-call]
    return result


def bfloat16(weight: Tensor) -> Tensor:
    """Round float32 to bfloat16 values, kept in float32; the gradient passes unchanged."""
    result: Tensor = _StraightThrough.apply(weight, "bfloat16")  # type: ignore[no-untyped-call]
    return result
