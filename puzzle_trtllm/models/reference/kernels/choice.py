"""Which kernels an engine gets; decided once, when it is loaded."""

from __future__ import annotations

import logging

import torch

from puzzle_trtllm.errors import EngineError
from puzzle_trtllm.models.reference.kernels import Kernels
from puzzle_trtllm.models.reference.kernels.compiler import CompileError
from puzzle_trtllm.models.reference.kernels.native_kernels import NativeKernels
from puzzle_trtllm.models.reference.kernels.torch_kernels import TorchKernels

NAMES = ("auto", "native", "torch")
_log = logging.getLogger(__name__)


def choose_kernels(name: str, device: torch.device, *, dequantize_experts: bool) -> Kernels:
    """`auto` is native on a CPU where it compiles, else torch, which alone heeds `dequantize_experts`.

    Raises EngineError for an unknown name, or for `native` where it cannot be had.
    """
    if name not in NAMES:
        raise EngineError("unknown", key="kernels", found=name, expected=", ".join(NAMES))
    if name == "native" or (name == "auto" and device.type == "cpu"):
        try:
            if device.type != "cpu":
                raise CompileError(f"they run on a CPU, the engine on {device}")
            return NativeKernels()
        except CompileError as error:
            if name == "native":
                raise EngineError(f"native kernels cannot be had: {error}", key="kernels", found=name) from None
            _log.warning("native CPU kernels cannot be had (%s); PyTorch takes their place, more slowly", error)
    return TorchKernels(dequantize_experts=dequantize_experts)
