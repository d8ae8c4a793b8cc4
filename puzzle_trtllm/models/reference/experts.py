"""The mixture of experts: router, clamped SwiGLU, and three ways to multiply.

gpt-oss routes each token to the top k of its layer's router logits and softmaxes over those k. An expert computes
`down((up + 1) * gate * sigmoid(1.702 gate))` with gate clamped from above and up on both sides at `swiglu_limit`.

- *dense*: every expert on every token in one batched product, unrouted results weighted by zero. More arithmetic, least
  overhead: right for few experts, or many tokens an expert.
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
DENSE_MAX_WASTE = 8
"""Dense wins up to about this many times the routed arithmetic (tests/bench/experts_paths.py measures it)."""


def mixture(x: Tensor, layer: LayerWeights, experts_per_token: int, limit: float) -> Tensor:
    """The layer's MoE output for x `[T, D]`."""
    logits = F.linear(x, layer.router, layer.router_bias)
    top, chosen = logits.topk(experts_per_token, dim=-1)
    weights = top.softmax(dim=-1)
    experts = layer.experts
    num_experts = layer.block.num_local_experts
    if isinstance(experts.gate_up, Tensor) and num_experts <= DENSE_MAX_WASTE * experts_per_token and len(x) > 1:
        return _dense(x, experts, weights, chosen, limit)
    return _by_expert(x, experts, weights, chosen, limit)


def _dense(x: Tensor, experts: ExpertWeights, weights: Tensor, chosen: Tensor, limit: float) -> Tensor:
    assert isinstance(experts.gate_up, Tensor) and isinstance(experts.down, Tensor)
    num_experts = experts.gate_up_bias.shape[0]
    share_TE = x.new_zeros(len(x), num_experts).scatter_(1, chosen, weights)
    inputs_ETD = x.expand(num_experts, *x.shape)
    gate_up_ETF = torch.baddbmm(experts.gate_up_bias[:, None], inputs_ETD, experts.gate_up.transpose(1, 2))
    hidden_ETF = _swiglu(gate_up_ETF, limit)
    output_ETD = torch.baddbmm(experts.down_bias[:, None], hidden_ETF, experts.down.transpose(1, 2))
    # [T, D, E] @ [T, E, 1]: the weighted sum over experts, one small product a token.
    return torch.bmm(output_ETD.permute(1, 2, 0), share_TE[:, :, None]).squeeze(-1)


def _by_expert(x: Tensor, experts: ExpertWeights, weights: Tensor, chosen: Tensor, limit: float) -> Tensor:
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
        hidden = F.linear(x[rows], _expert(experts.gate_up, expert, x.dtype), experts.gate_up_bias[expert])
        result = F.linear(_swiglu(hidden, limit), _expert(experts.down, expert, x.dtype), experts.down_bias[expert])
        output.index_add_(0, rows, result * shares[start:end, None])
    return output


def _expert(matrix: Tensor | Mxfp4Matrix, expert: int, dtype: torch.dtype) -> Tensor:
    if isinstance(matrix, Tensor):
        return matrix[expert]
    return Mxfp4Matrix(blocks=matrix.blocks[expert], scales=matrix.scales[expert]).dequantize(dtype)


def _swiglu(gate_up: Tensor, limit: float) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(gate * SWIGLU_ALPHA))
