"""What one GPU can do at best, from its data sheet: memory, bandwidth, FLOPs, links.

The table is `gpus.yaml`, in the units that data sheets print and with the sheet named; this module turns it into bytes
and seconds. The traps: data sheets print FLOPs with 2:4 sparsity, which no dense model reaches (halve them), and link
bandwidth as the sum of both directions (halve it); and "80 GB" is neither 80e9 bytes nor 80 GiB of usable memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from puzzle_trtllm.errors import ConfigError
from puzzle_trtllm.yaml_files import load_model

GPU_FILE = Path(__file__).parent / "gpus.yaml"


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Peak figures of one GPU, dense, in bytes, seconds and floating-point operations."""

    name: str
    product: str
    memory_bytes: int
    memory_bytes_per_s: float
    bf16_flops_per_s: float
    fp8_flops_per_s: float | None
    """None: no FP8 tensor cores, and no FP8 KV cache in TensorRT-LLM."""
    link: str
    link_bytes_per_s: float
    """To the other GPUs of the node, one direction."""
    expert_math: Literal["bf16", "fp8"]
    """Precision in which MXFP4 experts are multiplied."""
    source: str
    """The data sheet, and what was derived from it."""

    @property
    def expert_flops_per_s(self) -> float:
        """Peak of the precision that the experts are multiplied in."""
        if self.expert_math == "fp8" and self.fp8_flops_per_s is not None:
            return self.fp8_flops_per_s
        return self.bf16_flops_per_s


class _Entry(BaseModel):
    """One GPU as gpus.yaml writes it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    product: str
    memory_mib: int = Field(gt=0)
    memory_gb_per_s: float = Field(gt=0)
    bf16_tflops: float = Field(gt=0)
    fp8_tflops: float | None = Field(gt=0)
    link: str
    link_gb_per_s: float = Field(gt=0)
    expert_math: Literal["bf16", "fp8"]
    source: str = Field(min_length=1)

    def to_gpu(self, name: str) -> Gpu:
        return Gpu(
            name=name,
            product=self.product,
            memory_bytes=self.memory_mib * 2**20,
            memory_bytes_per_s=self.memory_gb_per_s * 1e9,
            bf16_flops_per_s=self.bf16_tflops * 1e12,
            fp8_flops_per_s=None if self.fp8_tflops is None else self.fp8_tflops * 1e12,
            link=self.link,
            link_bytes_per_s=self.link_gb_per_s * 1e9,
            expert_math=self.expert_math,
            source=self.source,
        )


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    gpus: dict[str, _Entry]


def load_gpus(file: Path = GPU_FILE) -> Mapping[str, Gpu]:
    """Every GPU of the table by name, in the file's order. Raises ConfigError naming file and key."""
    return {name: entry.to_gpu(name) for name, entry in load_model(file, _Table).gpus.items()}


def load_gpu(name: str) -> Gpu:
    """One GPU. Raises ConfigError that lists the known names."""
    gpus = load_gpus()
    if name not in gpus:
        raise ConfigError("unknown GPU", key="gpu", found=name, expected=f"one of: {', '.join(gpus)}")
    return gpus[name]
