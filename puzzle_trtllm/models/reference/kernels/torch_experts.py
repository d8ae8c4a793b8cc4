"""The mixture of experts in plain PyTorch: clamped SwiGLU, and two ways to multiply.

An expert computes `down((up + 1) * gate * sigmoid(1.702 gate))` with gate clamped from above and up on both sides at
`swiglu_limit`.

- *dense*: every expert on every token, as two linear layers E times as wide, with the hidden values of unrouted experts
  weighted by zero in between (the second layer then sums over experts by itself). More arithmetic, least overhead:
  right for few experts, or many tokens an expert.
- *by expert*: each active expert on its own tokens, one after another. Right when experts are large, and the only way
  for experts that stay in MXFP4, which are expanded while they are used.

Legend: T tokens, D hidden, F expert intermediate, E experts held here, k experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F  # noqa: N812 (the customary name)
from torch import Tensor

from puzzle_trtllm.architecture import SWIGLU_ALPHA
from puzzle_trtllm.models.reference.kernels.expert_weights import ExpertWeights, Mxfp4Matrix

DENSE_MAX_WORK = {torch.bfloat16: 3_000_000, torch.float32: 600_000}
"""Dense wins while tokens x D x F is at most this: then the idle products of an expert cost less than calling it
(tests/bench/experts_paths.py measures the crossover)."""


@dataclass(frozen=True, kw_only=True)
class TorchExperts:
    """Experts dequantized in the compute dtype, or as MXFP4."""

    weights: ExpertWeights
    """Dequantized `down` lies as `[D, E, F]`, so that all experts together are one matrix of a linear layer."""
    limit: float

    def __call__(self, x: Tensor, shares: Tensor, chosen: Tensor) -> Tensor:
        down = self.weights.down
        small = isinstance(down, Tensor) and x.numel() * down.shape[-1] <= DENSE_MAX_WORK.get(x.dtype, 0)
        multiply = dense if small else by_expert
        return multiply(x, self.weights, shares, chosen, self.limit)


def hold_dequantized(experts: ExpertWeights, *, limit: float) -> TorchExperts:
    """Experts in the dtype of their biases, which is the compute dtype."""
    gate_up, down = (
        matrix if isinstance(matrix, Tensor) else matrix.dequantize(experts.down_bias.dtype)
        for matrix in (experts.gate_up, experts.down)
    )
    return TorchExperts(weights=replace(experts, gate_up=gate_up, down=down.transpose(0, 1).contiguous()), limit=limit)


def hold_as_loaded(experts: ExpertWeights, *, limit: float) -> TorchExperts:
    """MXFP4 stays MXFP4."""
    if isinstance(experts.down, Tensor):
        return hold_dequantized(experts, limit=limit)
    return TorchExperts(weights=experts, limit=limit)


def dense(x: Tensor, experts: ExpertWeights, weights: Tensor, chosen: Tensor, limit: float) -> Tensor:
    """All experts on all of x `[T, D]`; weights and chosen `[T, k]`. Needs dequantized experts."""
    assert isinstance(experts.gate_up, Tensor) and isinstance(experts.down, Tensor)
    num_experts = experts.gate_up_bias.shape[0]
    share_TE = x.new_zeros(len(x), num_experts + 1).scatter_(1, chosen, weights)[:, :num_experts]
    gate_up = F.linear(x, experts.gate_up.flatten(0, 1), experts.gate_up_bias.flatten())
    hidden_TEF = _swiglu(gate_up.view(len(x), num_experts, -1), limit) * share_TE[:, :, None]
    return torch.addmm(share_TE @ experts.down_bias, hidden_TEF.flatten(1), experts.down.flatten(1).t())


def by_expert(x: Tensor, experts: ExpertWeights, weights: Tensor, chosen: Tensor, limit: float) -> Tensor:
    """Every active expert on its own rows of x `[T, D]`; weights and chosen `[T, k]`."""
    output = torch.zeros_like(x)
    order = chosen.flatten().argsort(stable=True)
    tokens, shares = order // chosen.shape[1], weights.flatten()[order]
    num_experts = experts.gate_up_bias.shape[0]
    counts = torch.bincount(chosen.flatten(), minlength=num_experts).tolist()
    end = 0
    for expert, count in enumerate(counts[:num_experts]):
        if count == 0:
            continue
        start, end = end, end + count
        rows = tokens[start:end]
        gate_up, down = _expert_matrices(experts, expert, x.dtype)
        hidden = F.linear(x[rows], gate_up, experts.gate_up_bias[expert])
        result = F.linear(_swiglu(hidden, limit), down, experts.down_bias[expert])
        output.index_add_(0, rows, result * shares[start:end, None])
    return output


def _expert_matrices(experts: ExpertWeights, expert: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`([2F, D], [D, F])` of one expert, expanded from MXFP4 where it is held so."""
    if isinstance(experts.gate_up, Tensor) and isinstance(experts.down, Tensor):
        return experts.gate_up[expert], experts.down[:, expert]
    assert isinstance(experts.gate_up, Mxfp4Matrix) and isinstance(experts.down, Mxfp4Matrix)
    return experts.gate_up.expert(expert).dequantize(dtype), experts.down.expert(expert).dequantize(dtype)


def _swiglu(gate_up: Tensor, limit: float) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(gate * SWIGLU_ALPHA))
