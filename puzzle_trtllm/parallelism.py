"""How many ranks share a model, and how: TensorRT-LLM's three sizes.

`tensor_parallel_size` ranks in all. Attention heads are dealt out to all of them. The experts of a layer are dealt out
to groups: `moe_expert_parallel_size` groups of whole experts, and inside a group `moe_tensor_parallel_size` ranks share
the width of each; their product is the number of ranks. One of the two given, the other follows; neither given, experts
are cut by width alone, as TensorRT-LLM does.

- Expert parallelism deals each layer's experts out evenly, so its size must divide the expert count of every layer: the
  smallest layer of the 88B child has 64 experts, and EP above 64 is impossible whatever the others have.
- Tensor parallelism deals out attention heads; KV heads may be repeated when there are fewer of them than ranks, but
  then the ranks must be a multiple of the heads. Attention data parallelism keeps all heads on every rank.
- The reference runtime cuts an expert's width between MXFP4 blocks of 32 values: every rank gets at least one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from puzzle_trtllm.architecture import PuzzleArchitecture
from puzzle_trtllm.mxfp4 import BLOCK_SIZE


@dataclass(frozen=True, kw_only=True)
class Parallelism:
    """Sizes that may be impossible; `problems` says whether they are."""

    tensor: int = 1
    """Ranks in all."""
    moe_expert: int = 1
    moe_tensor: int = 1

    @classmethod
    def from_llm_args(cls, llm_args: Mapping[str, Any]) -> Parallelism:
        """The sizes that arguments of TensorRT-LLM's `LLM` ask for."""
        tensor = int(llm_args.get("tensor_parallel_size") or 1)
        expert = llm_args.get("moe_expert_parallel_size")
        width = llm_args.get("moe_tensor_parallel_size")
        # -1 is TensorRT-LLM's own word for "not given".
        expert, width = (int(size) if size and size > 0 else None for size in (expert, width))
        if expert is None:
            expert = max(1, tensor // width) if width else 1
        return cls(tensor=tensor, moe_expert=expert, moe_tensor=width or max(1, tensor // expert))

    def problems(self, a: PuzzleArchitecture, *, attention_dp: bool = False) -> Iterator[tuple[str, int, str]]:
        """(llm_args key, found, expected) of everything that this model cannot have, gravest first."""
        if self.moe_expert * self.moe_tensor != self.tensor:
            if self.tensor % self.moe_expert:
                expected = f"a divisor of tensor_parallel_size, {self.tensor}"
                yield "moe_expert_parallel_size", self.moe_expert, expected
            else:
                expected = f"tensor_parallel_size / moe_expert_parallel_size, {self.tensor} / {self.moe_expert}"
                yield "moe_tensor_parallel_size", self.moe_tensor, expected
        for layer, block in enumerate(a.blocks):
            if block.num_local_experts % self.moe_expert:
                expected = f"a divisor of the {block.num_local_experts} experts of layer {layer}"
                yield "moe_expert_parallel_size", self.moe_expert, expected
        if not attention_dp:
            yield from self._head_problems(a)

    def width_problems(self, a: PuzzleArchitecture) -> Iterator[tuple[str, int, str]]:
        """The same, of ranks that would get no block of an expert's width."""
        unit = width_unit(a)
        if self.moe_tensor * unit > a.intermediate_size:
            expected = f"at most {a.intermediate_size // unit}: the experts' {a.intermediate_size} in blocks of {unit}"
            yield "moe_tensor_parallel_size", self.moe_tensor, expected

    def _head_problems(self, a: PuzzleArchitecture) -> Iterator[tuple[str, int, str]]:
        heads, kv_heads = a.num_attention_heads, a.num_key_value_heads
        if heads % self.tensor:
            yield "tensor_parallel_size", self.tensor, f"a divisor of the {heads} attention heads"
        if kv_heads % self.tensor and self.tensor % kv_heads:
            yield "tensor_parallel_size", self.tensor, f"a divisor or a multiple of the {kv_heads} KV heads"


ONE_RANK = Parallelism()


def width_unit(a: PuzzleArchitecture) -> int:
    """Values of an expert's width that stay together: an MXFP4 block, or 1 in BF16."""
    return BLOCK_SIZE if a.experts_format == "mxfp4" else 1
