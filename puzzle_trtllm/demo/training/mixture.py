"""gpt-oss mixture of experts: the router's softmax runs over the chosen experts only.

An expert is down((up + 1) * gate * sigmoid(1.702 gate)) with gate clamped from above and up from both sides, gate and
up interleaved on one axis. Rows are sorted by expert, so that each expert does one matrix product over its own tokens.

Legend: N tokens, D hidden, F intermediate, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from puzzle_trtllm.demo.training import rounding
from puzzle_trtllm.demo.training.dimensions import Dimensions
from puzzle_trtllm.demo.training.layers import RoundedLinear

_RUN = 128
"""Rows of an expert are padded to a multiple of this."""


class _Gather(torch.autograd.Function):
    """Pick rows by index where every row is picked once, and some twice as padding that gets no gradient.

    The gradient is a gather too (by `inverse`, masked where padding was filled), far cheaper than a scatter.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor, real: Tensor | None) -> Tensor:
        ctx.inverse, ctx.real = inverse, real
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        rows = grads[0].index_select(0, ctx.inverse)
        return (rows if ctx.real is None else rows * ctx.real.to(rows.dtype)), None, None, None


class Experts(nn.Module):
    """The expert matrices, `[E, 2F, D]` and `[E, D, F]` as stored, gate on even and up on odd rows."""

    rounded = False

    def __init__(self, dims: Dimensions) -> None:
        super().__init__()
        experts, hidden, width = dims.num_experts, dims.hidden, dims.intermediate
        self.limit = dims.swiglu_limit
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * width, hidden) * hidden**-0.5)
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(experts, 2 * width))
        self.down_proj = nn.Parameter(torch.randn(experts, hidden, width) * width**-0.5 * 0.3)
        self.down_proj_bias = nn.Parameter(torch.zeros(experts, hidden))

    def _weights(self) -> tuple[Tensor, ...]:
        tensors = (self.gate_up_proj, self.gate_up_proj_bias, self.down_proj, self.down_proj_bias)
        if self.rounded:
            kinds = (rounding.mxfp4, rounding.bfloat16, rounding.mxfp4, rounding.bfloat16)
            tensors = tuple(kind(tensor) for kind, tensor in zip(kinds, tensors, strict=True))  # type: ignore[assignment]
        gate_up, gate_up_bias, down, down_bias = tensors
        halves = (torch.cat([t[:, 0::2], t[:, 1::2]], 1) for t in (gate_up, gate_up_bias))
        return (*halves, down, down_bias)

    def forward(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Rows `[N, D]` sorted by expert, `counts[e]` of them for expert e."""
        weights = zip(torch.split(rows, counts), *(tensor.unbind(0) for tensor in self._weights()), strict=True)
        outputs = []
        for x, gate_up, gate_up_bias, down, down_bias in weights:
            gate, up = functional.linear(x, gate_up, gate_up_bias).chunk(2, -1)
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
            outputs.append(functional.linear((up + 1) * gate * torch.sigmoid(1.702 * gate), down, down_bias))
        return torch.cat(outputs)


class MixtureOfExperts(nn.Module):
    """Router and experts: the top k logits choose, their softmax weighs."""

    def __init__(self, dims: Dimensions) -> None:
        super().__init__()
        self.top_k, self.num_experts = dims.top_k, dims.num_experts
        self.router = RoundedLinear(dims.hidden, dims.num_experts)
        self.experts = Experts(dims)

    def forward(self, x: Tensor, expert_bias: Tensor | None, routing: list[Tensor] | None) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            logits = self.router(x.float())
        if routing is not None:
            routing.append(logits.flatten(0, 1))
        if expert_bias is not None:
            logits = logits + expert_bias.unsqueeze(1)
        top, chosen = logits.flatten(0, 1).topk(self.top_k, -1)
        slots = _Slots.of(chosen.flatten(), self.num_experts)
        copies = x.flatten(0, 1).unsqueeze(1).expand(-1, self.top_k, -1).flatten(0, 1)
        rows: Tensor = _Gather.apply(copies, slots.source, slots.target, None)  # type: ignore[no-untyped-call]
        rows = self.experts(rows, slots.counts)
        rows = _Gather.apply(rows, slots.target, slots.source, slots.real)  # type: ignore[no-untyped-call]
        weighted = rows.float().view(-1, self.top_k, rows.shape[1]) * top.softmax(-1).unsqueeze(-1)
        mixed: Tensor = weighted.sum(1).view_as(x)
        return mixed


@dataclass(frozen=True, kw_only=True)
class _Slots:
    """Where each (token, choice) row goes when rows are sorted by expert.

    Each expert's run is padded to a multiple of _RUN rows: the CPU's bfloat16 kernels are compiled per shape, and a
    new row count for every expert at every step would compile for ever.
    """

    source: Tensor  # [slots] row that fills each slot; 0 in padding
    target: Tensor  # [rows] slot of each row
    real: Tensor  # [slots, 1] false in padding
    counts: list[int]  # [E] slots of each expert

    @classmethod
    def of(cls, experts: Tensor, num_experts: int) -> _Slots:
        order = experts.argsort(stable=True)
        counts = torch.bincount(experts, minlength=num_experts)
        padded = (counts + _RUN - 1) // _RUN * _RUN
        shift = (padded - counts).cumsum(0) - (padded - counts)
        target = torch.empty_like(order)
        target[order] = torch.arange(len(order)) + shift[experts[order]]
        source = torch.zeros(int(padded.sum()), dtype=torch.int64)
        source[target] = torch.arange(len(order))
        real = torch.zeros(len(source), 1, dtype=torch.bool)
        real[target] = True
        return cls(source=source, target=target, real=real, counts=padded.tolist())
