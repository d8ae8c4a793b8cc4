"""Both operations in plain PyTorch: on every device, in every dtype; the oracle of the other implementations."""

from __future__ import annotations

from puzzle_trtllm.models.reference.kernels import Kernels
from puzzle_trtllm.models.reference.kernels.torch_attention import decode_attention
from puzzle_trtllm.models.reference.kernels.torch_experts import hold_as_loaded, hold_dequantized


def torch_kernels(*, dequantize_experts: bool) -> Kernels:
    """`dequantize_experts` holds MXFP4 experts in the compute dtype instead of expanding them as they are used."""
    return Kernels(
        name="torch",
        decode_attention=decode_attention,
        prepare_experts=hold_dequantized if dequantize_experts else hold_as_loaded,
    )
