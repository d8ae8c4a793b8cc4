"""Which kernels an engine gets, and which dtype they compute in; decided once, when it is loaded."""

from __future__ import annotations

import logging

import torch

from puzzle_trtllm.errors import EngineError
from puzzle_trtllm.models.reference.kernels import Kernels
from puzzle_trtllm.models.reference.kernels.compiler import CompileError
from puzzle_trtllm.models.reference.kernels.cpu import cpu_flags
from puzzle_trtllm.models.reference.kernels.native_kernels import NativeKernels
from puzzle_trtllm.models.reference.kernels.torch_kernels import TorchKernels

NAMES = ("auto", "native", "triton", "torch")

_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
"""CPU features that multiply bfloat16 in hardware."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_log = logging.getLogger(__name__)


def choose_kernels(name: str, device: torch.device, *, dequantize_experts: bool) -> Kernels:
    """`auto` is native on a CPU and triton on a GPU where they can be had, else torch, which alone heeds
    `dequantize_experts`.

    Raises EngineError for an unknown name, or for kernels that were asked for by name and cannot be had.
    """
    if name not in NAMES:
        raise EngineError("unknown", key="kernels", found=name, expected=", ".join(NAMES))
    own = "native" if device.type == "cpu" else "triton"
    if name != "torch":
        try:
            if name not in ("auto", own):
                raise CompileError(f"the engine runs on {device}, whose kernels are {own} or torch")
            return NativeKernels() if own == "native" else _triton_kernels()
        except CompileError as error:
            if name != "auto":
                raise EngineError(f"these kernels cannot be had: {error}", key="kernels", found=name) from None
            _log.warning("%s kernels cannot be had (%s); PyTorch takes their place, more slowly", own, error)
    return TorchKernels(dequantize_experts=dequantize_experts)


def _triton_kernels() -> Kernels:
    try:
        from puzzle_trtllm.models.reference.kernels.triton_kernels import TritonKernels
    except ImportError as error:  # builds of torch without CUDA, or for systems that Triton does not support
        raise CompileError(str(error)) from None
    return TritonKernels()


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that `name` (auto | float32 | bfloat16) means here. Raises EngineError for another name."""
    if name != "auto":
        if name not in _DTYPES:
            raise EngineError("unknown", key="dtype", found=name, expected=f"auto, {', '.join(_DTYPES)}")
        return _DTYPES[name]
    return torch.bfloat16 if device.type == "cuda" or cpu_flags() & _BF16_FLAGS else torch.float32


def explain_compute_dtype(name: str, device: torch.device) -> str:
    """The compute dtype and why: `bfloat16 (the CPU has avx512_bf16)`."""
    dtype = str(compute_dtype(name, device)).removeprefix("torch.")
    if name != "auto":
        return f"{dtype} (as asked for)"
    if device.type == "cuda":
        return f"{dtype} (on a GPU)"
    found = sorted(cpu_flags() & _BF16_FLAGS)
    missing = " nor ".join(sorted(_BF16_FLAGS))
    return f"{dtype} (the CPU has {', '.join(found)})" if found else f"{dtype} (the CPU has neither {missing})"
