"""The kernels in plain PyTorch: on every device, in every dtype; the oracle of the other implementations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (the customary name)
from torch import Tensor

from puzzle_trtllm.models.reference.kernels import ExpertMixture
from puzzle_trtllm.models.reference.kernels.expert_weights import ExpertWeights
from puzzle_trtllm.models.reference.kernels.kv_storage import bits_of, store
from puzzle_trtllm.models.reference.kernels.torch_attention import decode_attention, prefill_attention
from puzzle_trtllm.models.reference.kernels.torch_experts import hold_as_loaded, hold_dequantized


@dataclass(frozen=True, kw_only=True)
class TorchLinear:
    """`[outputs, inputs]` and `[outputs]`."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class TorchKernels:
    """`dequantize_experts` holds MXFP4 experts in the compute dtype instead of expanding them as they are used."""

    name = "torch"

    def __init__(self, *, dequantize_experts: bool) -> None:
        self._hold_experts = hold_dequantized if dequantize_experts else hold_as_loaded

    def prepare_linear(self, weight: Tensor, bias: Tensor | None) -> TorchLinear:
        return TorchLinear(weight=weight, bias=bias)

    def prepare_experts(self, experts: ExpertWeights, *, limit: float) -> ExpertMixture:
        return self._hold_experts(experts, limit=limit)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x.float(), weight.shape, weight, eps).to(x.dtype)

    def rotate(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, kv_heads: int, kv_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Pairs are (i, i + Dh / 2)."""
        cos, sin = cos[positions][:, None], sin[positions][:, None]
        first, second = qkv[:, :-kv_heads].chunk(2, dim=-1)
        rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        kv = torch.stack([rotated[:, -kv_heads:], qkv[:, -kv_heads:]])
        return rotated[:, :-kv_heads], store(kv, kv_dtype)

    def write(self, storage: Tensor, rows: Tensor, offsets: Tensor, kv: Tensor) -> None:
        halves = torch.arange(2, device=storage.device)[:, None, None]
        bits_of(storage)[halves, rows, offsets] = bits_of(kv)

    decode_attention = staticmethod(decode_attention)
    prefill_attention = staticmethod(prefill_attention)

    def route(self, logits: Tensor, top: int) -> tuple[Tensor, Tensor]:
        values, chosen = logits.topk(top, dim=-1)
        return values.softmax(dim=-1), chosen
