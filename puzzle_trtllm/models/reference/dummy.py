"""Random weights of any architecture, made where they are used: speed can be measured without 60 GB on disk.

TensorRT-LLM's `load_format: dummy`. Every tensor depends only on its name, so all ranks cut their parts from one model.
Values are of a size at which hidden states stay finite: norms are one, matrices have a standard deviation of 0.02.
"""

from __future__ import annotations

from dataclasses import dataclass
from zlib import crc32

import torch
from torch import Tensor

from puzzle_trtllm.architecture import PuzzleArchitecture
from puzzle_trtllm.mxfp4 import SCALE_BIAS
from puzzle_trtllm.tensors import tensor_table

STANDARD_DEVIATION = 0.02
_SCALE_BYTES = (SCALE_BIAS - 9, SCALE_BIAS - 6)
"""Scales 2^-9 to 2^-7: an e2m1 value is 2.6 (root mean square over the sixteen codes), so the product is about 0.01."""


@dataclass(frozen=True)
class DummyCheckpoint:
    """Answers for a checkpoint as `WeightLoader` asks it."""

    architecture: PuzzleArchitecture
    device: torch.device

    def validate(self) -> None:
        """Nothing can be missing."""

    def torch(self, name: str, part: tuple[slice, ...] = ()) -> Tensor:
        """The tensor, or `part` of it, on the device: uint8 for MXFP4, else bfloat16."""
        spec = tensor_table(self.architecture)[name]
        generator = torch.Generator(self.device).manual_seed(crc32(name.encode()))
        if name.endswith("norm.weight"):
            whole = torch.ones(spec.shape, dtype=torch.bfloat16, device=self.device)
        elif spec.dtype == "U8":
            low, high = _SCALE_BYTES if name.endswith("_scales") else (0, 256)
            whole = torch.randint(low, high, spec.shape, dtype=torch.uint8, device=self.device, generator=generator)
        else:
            whole = torch.empty(spec.shape, dtype=torch.bfloat16, device=self.device)
            whole.normal_(std=STANDARD_DEVIATION, generator=generator)
        return whole[part].clone() if part else whole
