"""The mixture of experts: router, clamped SwiGLU, and three ways to multiply.

gpt-oss routes each token to the top k of its layer's router logits and softmaxes over those k. An expert computes
`down((up + 1) * gate * sigmoid(1.702 gate))` with gate clamped from above and up on both sides at `swiglu_limit`.

- *dense*: every expert on every token, as two linear layers E times as wide, with the hidden values of unrouted experts
  weighted by zero in between (the second layer then sums over experts by itself). More arithmetic, least overhead:
  right for few experts, or many tokens an expert.
- *by expert*: each active expert on its own tokens, one after another. Right when experts are large, and the only way
  for experts that stay in MXFP4, which are expanded while they are used.

Legend: T tokens, D hidden, F expert intermediate, E experts of the layer, k experts a token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (the customary name)
from torch import Tensor

from puzzle_trtllm.models.reference.weights import ExpertWeights, LayerWeights, Mxfp4Matrix

SWIGLU_ALPHA = 1.702
DENSE_MAX_WORK = {torch.bfloat16: 3_000_000, torch.float32: 600_000}
"""Dense wins while tokens x D x F is at most this: then the idle products of an expert cost less than calling it
(tests/bench/experts_paths.py measures the crossover)."""


def mixture(x: Tensor, layer: LayerWeights, experts_per_token: int, limit: float) -> Tensor:
    """The layer's MoE output for x `[T, D]`."""
    logits = F.linear(x, layer.router, layer.router_bias)
    top, chosen = logits.topk(experts_per_token, dim=-1)
    weights = top.softmax(dim=-1)
    experts = layer.experts
    if isinstance(experts.down, Tensor) and x.numel() * experts.down.shape[-1] <= DENSE_MAX_WORK.get(x.dtype, 0):
        return dense(x, experts, weights, chosen, limit)
    return by_expert(x, experts, weights, chosen, limit)


def dense(x: Tensor, experts: ExpertWeights, weights: Tensor, chosen: Tensor, limit: float) -> Tensor:
    """All experts on all of x `[T, D]`; weights and chosen `[T, k]`. Needs dequantized experts."""
    assert isinstance(experts.gate_up, Tensor) and isinstance(experts.down, Tensor)
    num_experts = experts.gate_up_bias.shape[0]
    share_TE = x.new_zeros(len(x), num_experts).scatter_(1, chosen, weights)
    gate_up = F.linear(x, experts.gate_up.flatten(0, 1), experts.gate_up_bias.flatten())
    hidden_TEF = _swiglu(gate_up.view(len(x), num_experts, -1), limit) * share_TE[:, :, None]
    return torch.addmm(share_TE @ experts.down_bias, hidden_TEF.flatten(1), experts.down.flatten(1).t())


def by_expert(x: Tensor, experts: ExpertWeights, weights: Tensor, chosen: Tensor, limit: float) -> Tensor:
    """Every active expert on its own rows of x `[T, D]`; weights and chosen `[T, k]`."""
    output = torch.zeros_like(x)
    order = chosen.flatten().argsort(stable=True)
    tokens, shares = order // chosen.shape[1], weights.flatten()[order]
    counts = torch.bincount(chosen.flatten(), minlength=experts.gate_up_bias.shape[0]).tolist()
    end = 0
    for expert, count in enumerate(counts):
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
