"""What a derivation will write, decided for every tensor of the parent before the first byte.

The conversion is total: each tensor of the parent is cut to the kept experts, converted with them, copied, or (before
it gets here) dropped by name with a reason; what comes out is exactly the table of tensors of the child's architecture.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from puzzle_trtllm.architecture import PuzzleArchitecture
from puzzle_trtllm.build.expert_formats import converted_experts
from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.checkpoint_writer import PlannedTensor, copy_of, rows_of

CUT_TENSOR = re.compile(r"^model\.layers\.(\d+)\.mlp\.(?:experts\..+|router\.(?:weight|bias))$")
"""Tensors whose first axis counts the experts of a layer."""

_MATRIX = re.compile(r"\.mlp\.experts\.(?:gate_up|down)_proj(?:_blocks|_scales)?$")
"""Those of them that MXFP4 and BF16 store differently; biases are BF16 in both."""


@dataclass(frozen=True, kw_only=True)
class DerivationPlan:
    """What a derivation will write, known before the first byte."""

    architecture: PuzzleArchitecture
    """The child's."""
    kept_experts: tuple[tuple[int, ...], ...]
    tensors: tuple[PlannedTensor, ...]
    dropped_tensors: dict[str, str]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.spec.num_bytes for tensor in self.tensors)


def plan_child(
    parent: Checkpoint,
    architecture: PuzzleArchitecture,
    kept_experts: Sequence[tuple[int, ...]],
    dropped_tensors: dict[str, str] | None = None,
) -> DerivationPlan:
    """Plan the child that `architecture` (blocks and experts format) describes and that keeps `kept_experts`."""
    converts = architecture.experts_format != parent.architecture.experts_format

    def planned(name: str) -> list[PlannedTensor]:
        cut = CUT_TENSOR.match(name)
        if cut is None:
            return [copy_of(parent.entry(name))]
        kept = kept_experts[int(cut[1])]
        if converts and _MATRIX.search(name):
            return converted_experts(parent, name, kept, architecture.experts_format)
        return [rows_of(parent.entry(name), kept)]

    return DerivationPlan(
        architecture=architecture,
        kept_experts=tuple(kept_experts),
        tensors=tuple(tensor for name in parent.tensors for tensor in planned(name)),
        dropped_tensors=dropped_tensors or {},
    )
