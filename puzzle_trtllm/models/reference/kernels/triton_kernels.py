"""The kernels of a GPU: Triton for attention and experts, PyTorch for the rest, which CUDA graphs replay."""

from __future__ import annotations

from puzzle_trtllm.models.reference.kernels import ExpertMixture
from puzzle_trtllm.models.reference.kernels.expert_weights import ExpertWeights
from puzzle_trtllm.models.reference.kernels.torch_kernels import TorchKernels
from puzzle_trtllm.models.reference.kernels.triton_attention import decode_attention
from puzzle_trtllm.models.reference.kernels.triton_experts import hold_mxfp4
from puzzle_trtllm.models.reference.kernels.triton_prefill import prefill_attention


class TritonKernels(TorchKernels):
    """MXFP4 experts stay MXFP4, and the cache is read where it lies."""

    name = "triton"

    def __init__(self) -> None:
        super().__init__(dequantize_experts=False)

    def prepare_experts(self, experts: ExpertWeights, *, limit: float) -> ExpertMixture:
        return hold_mxfp4(experts, limit=limit)

    decode_attention = staticmethod(decode_attention)
    prefill_attention = staticmethod(prefill_attention)
