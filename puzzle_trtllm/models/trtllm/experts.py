"""The experts of one layer, from the checkpoint's layout to what TensorRT-LLM's fused MoE modules read.

Legend: E experts, D hidden, F expert intermediate. The checkpoint interleaves gate and up rows on the 2F axis (even
gate, odd up); the fused modules want all gate rows, then all up rows, and every matrix as [in, out]:

    gate_up_proj              E x [D, 2F]     (MXFP4: bytes [D/2, 2F])
    down_proj                 E x [F, D]      (MXFP4: bytes [F/2, D])
    gate_up_proj.bias         E x [2F]        down_proj.bias  E x [D]
    *_weight_scale            E x [in/32, out] (MXFP4 only)
    {e}.w1|w3|w2.weight_scale_inv  [out, in/32], gate | up | down, where the quantization is W4A16_MXFP4

The modules index these lists by global expert number and read their own experts only, so other ranks' experts are left
out (None): de-interleaving copies, and at expert parallelism 8 seven eighths of it would be for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from puzzle_trtllm.errors import CheckpointError
from puzzle_trtllm.models.trtllm.layers import W4A16_MXFP4


def num_experts_of(tensors: Mapping[str, Any]) -> int:
    """The expert count that the tensors themselves have. Raises CheckpointError when they disagree."""
    counts = {name: int(tensor.shape[0]) for name, tensor in tensors.items()}
    if len(set(counts.values())) != 1:
        raise CheckpointError("expert tensors of one layer disagree on their number", found=counts)
    return next(iter(counts.values()))


def moe_weights(
    tensors: Mapping[str, torch.Tensor],
    *,
    local_experts: Collection[int] | None,
    dtype: torch.dtype,
    quant_algo: object = None,
) -> dict[str, Any]:
    """The dictionary for `MoE.load_weights(weights=[...])`, format and expert count taken from the tensors.

    Args:
        tensors: the layer's expert tensors by their name after `mlp.experts.`.
        local_experts: global numbers of this rank's experts; None means all.
        dtype: of BF16 experts on the GPU.
        quant_algo: the model's weight quantization; only W4A16_MXFP4 wants more entries.
    """
    count = num_experts_of(tensors)
    wanted = range(count) if local_experts is None else frozenset(local_experts)

    def each(make: Callable[[int], torch.Tensor]) -> list[torch.Tensor | None]:
        return [make(e) if e in wanted else None for e in range(count)]

    weights: dict[str, Any] = {
        "gate_up_proj.bias": each(lambda e: gate_then_up(tensors["gate_up_proj_bias"][e], dim=0)),
        "down_proj.bias": each(lambda e: tensors["down_proj_bias"][e]),
    }
    if "gate_up_proj_blocks" not in tensors:
        weights["gate_up_proj"] = each(lambda e: gate_then_up(tensors["gate_up_proj"][e].to(dtype), dim=1))
        weights["down_proj"] = each(lambda e: tensors["down_proj"][e].to(dtype))
        return weights
    gate_up, down = tensors["gate_up_proj_blocks"], tensors["down_proj_blocks"]
    gate_up_scales, down_scales = tensors["gate_up_proj_scales"], tensors["down_proj_scales"]
    weights["gate_up_proj"] = each(lambda e: gate_then_up(gate_up[e].flatten(-2, -1), dim=0).transpose(0, 1))
    weights["down_proj"] = each(lambda e: down[e].flatten(-2, -1).transpose(0, 1))
    weights["gate_up_proj_weight_scale"] = each(lambda e: gate_then_up(gate_up_scales[e], dim=0).transpose(0, 1))
    weights["down_proj_weight_scale"] = each(lambda e: down_scales[e].transpose(0, 1))
    if quant_algo == W4A16_MXFP4:
        for e in sorted(wanted):
            weights[f"{e}.w1.weight_scale_inv"] = gate_up_scales[e, 0::2]
            weights[f"{e}.w3.weight_scale_inv"] = gate_up_scales[e, 1::2]
            weights[f"{e}.w2.weight_scale_inv"] = down_scales[e]
    return weights


def gate_then_up(tensor: torch.Tensor, *, dim: int) -> torch.Tensor:
    """Interleaved gate and up along `dim` -> gate first, then up; copies."""
    index = torch.arange(tensor.shape[dim], device=tensor.device)
    return tensor.index_select(dim, torch.cat([index[0::2], index[1::2]]))
