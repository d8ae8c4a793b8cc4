"""What fits on named GPUs: weights and KV pool of each GPU, and how many sequences, for every layout of the model.

The memory side of the planner alone, without its rates: for `inspect`, which knows no load.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from puzzle_trtllm.architecture import KvDtype, PuzzleArchitecture
from puzzle_trtllm.build.planner.allocators import DEFAULT_ALLOCATOR, find_allocator
from puzzle_trtllm.build.planner.assumptions import Assumptions
from puzzle_trtllm.build.planner.layout import Layout, possible_layouts
from puzzle_trtllm.build.planner.memory import plan_memory
from puzzle_trtllm.build.planner.planning import whole_sequences
from puzzle_trtllm.build.planner.roofline import Setup
from puzzle_trtllm.errors import ConfigError
from puzzle_trtllm.gpus import Gpu


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A model under one layout; bytes are those of one GPU."""

    gpu: Gpu
    layout: Layout
    weight_bytes_per_gpu: int
    kv_pool_bytes_per_gpu: int
    """0 when the weights leave nothing."""
    max_sequences: tuple[tuple[int, int], ...]
    """(tokens of a sequence, sequences of that length on all GPUs together), as TensorRT-LLM would cut its pool."""

    def to_json(self) -> dict[str, Any]:
        return {
            "gpu": self.gpu.name,
            "num_gpus": self.layout.num_gpus,
            "layout": self.layout.name,
            "weight_bytes_per_gpu": self.weight_bytes_per_gpu,
            "kv_pool_bytes_per_gpu": self.kv_pool_bytes_per_gpu,
            "max_sequences": [
                {"kv_sequence_tokens": tokens, "max_sequences": sequences} for tokens, sequences in self.max_sequences
            ],
        }


def fit(
    architecture: PuzzleArchitecture, *, gpu: Gpu, num_gpus: int, kv_dtype: KvDtype, seq_lens: Sequence[int]
) -> tuple[Fit, ...]:
    """One entry a layout that the model can have on `num_gpus`, smallest replica first.

    Raises ConfigError for no GPUs, or an FP8 cache on a GPU without FP8.
    """
    if num_gpus < 1:
        raise ConfigError("must be at least 1", key="--gpus", found=num_gpus)
    if kv_dtype == "fp8" and gpu.fp8_flops_per_s is None:
        raise ConfigError(f"{gpu.name} has no FP8", key="--kv", found="fp8", expected="bf16")
    assumptions = Assumptions()
    return tuple(
        _fit_layout(
            Setup(architecture=architecture, gpu=gpu, layout=layout, kv_dtype=kv_dtype, assumptions=assumptions),
            seq_lens,
        )
        for layout in possible_layouts(num_gpus, architecture)
    )


def _fit_layout(setup: Setup, seq_lens: Sequence[int]) -> Fit:
    memory = plan_memory(setup.architecture, setup.gpu, setup.layout, setup.assumptions)
    allocate = find_allocator(DEFAULT_ALLOCATOR)
    return Fit(
        gpu=setup.gpu,
        layout=setup.layout,
        weight_bytes_per_gpu=memory.weights.total,
        kv_pool_bytes_per_gpu=memory.kv_pool,
        max_sequences=tuple(
            (
                tokens,
                whole_sequences(setup, allocate(setup.kv, memory.kv_pool, tokens, setup.assumptions))
                * setup.layout.num_replicas,
            )
            for tokens in seq_lens
        ),
    )
