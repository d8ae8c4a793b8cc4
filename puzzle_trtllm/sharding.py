"""Which part of a model a rank holds.

Attention: a range of query heads and the KV heads that they read (repeated when there are fewer KV heads than ranks).
Experts: rank r belongs to expert group r % EP and holds, of that group's experts in every layer, the r // EP-th part of
their width: TensorRT-LLM's numbering. A width is cut between MXFP4 blocks of 32 values, and the first ranks get one
more where it does not divide: 2880 is 90 blocks, and four ranks hold 23, 23, 22, 22.
The head: a range of the vocabulary, because every step multiplies all of it. The embedding is whole on every rank: a
step reads a few rows of it, and sharing it would cost one more collective to save 1 GB of a 60 GB model.
Router, norms: whole. What is added once (the biases behind the two sums) is added by one rank.

Legend: E experts of the layer, D hidden, F expert intermediate, H query heads, K KV heads, Dh head dim, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from puzzle_trtllm.architecture import PuzzleArchitecture
from puzzle_trtllm.mxfp4 import BLOCK_SIZE
from puzzle_trtllm.parallelism import ONE_RANK, Parallelism, width_unit
from puzzle_trtllm.tensors import DTYPE_BYTES, TensorSpec, tensor_table

_ALL = slice(None)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One rank's part of a model."""

    architecture: PuzzleArchitecture
    """The whole model."""
    parallelism: Parallelism = ONE_RANK
    rank: int = 0

    @property
    def local(self) -> PuzzleArchitecture:
        """The heads and the expert width that this rank holds; expert counts stay those that the router knows."""
        if self.parallelism == ONE_RANK:
            return self.architecture
        return replace(
            self.architecture,
            num_attention_heads=_length(self.query_heads),
            num_key_value_heads=_length(self.kv_heads),
            intermediate_size=_length(self.expert_width),
        )

    @property
    def query_heads(self) -> slice:
        return _part(self.architecture.num_attention_heads, self.parallelism.tensor, self.rank)

    @property
    def kv_heads(self) -> slice:
        kv_heads, ranks = self.architecture.num_key_value_heads, self.parallelism.tensor
        if ranks <= kv_heads:
            return _part(kv_heads, ranks, self.rank)
        own = self.rank * kv_heads // ranks
        return slice(own, own + 1)

    @property
    def expert_width(self) -> slice:
        """Of the F values between an expert's two matrices."""
        unit = width_unit(self.architecture)
        blocks = self.architecture.intermediate_size // unit
        own = _part(blocks, self.parallelism.moe_tensor, self.rank // self.parallelism.moe_expert)
        return slice(own.start * unit, own.stop * unit)

    def experts(self, layer: int) -> slice:
        group = self.rank % self.parallelism.moe_expert
        return _part(self.architecture.blocks[layer].num_local_experts, self.parallelism.moe_expert, group)

    @property
    def vocabulary(self) -> slice:
        """Rows of the head."""
        return _part(self.architecture.vocab_size, self.parallelism.tensor, self.rank)

    def adds_bias(self, name: str) -> bool:
        """False for a bias behind a sum over ranks that another rank adds already."""
        if name.endswith("o_proj.bias"):
            return self.rank == 0
        return not name.endswith("down_proj_bias") or self.rank < self.parallelism.moe_expert

    def part(self, name: str) -> tuple[slice, ...]:
        """The index of this rank's part in the checkpoint's tensor `name`."""
        if self.parallelism == ONE_RANK:
            return ()
        words = name.removeprefix("model.layers.").split(".")
        if words[0] == "lm_head":
            return (self.vocabulary,)
        if words[1:2] == ["self_attn"]:
            return self._attention_part(words[2], is_bias=words[-1] == "bias")
        if words[1:3] == ["mlp", "experts"]:
            return self._expert_part(self.experts(int(words[0])), words[3])
        return ()

    def _attention_part(self, projection: str, *, is_bias: bool) -> tuple[slice, ...]:
        head_dim = self.architecture.head_dim
        if projection == "sinks":
            return (self.query_heads,)
        if projection == "o_proj":
            return () if is_bias else (_ALL, _times(self.query_heads, head_dim))
        return (_times(self.query_heads if projection == "q_proj" else self.kv_heads, head_dim),)

    def _expert_part(self, experts: slice, name: str) -> tuple[slice, ...]:
        width = self.expert_width
        pairs = _times(width, 2)  # gate and up rows are interleaved
        blocks = slice(width.start // BLOCK_SIZE, width.stop // BLOCK_SIZE)
        return {
            "gate_up_proj": (experts, _ALL, pairs),
            "gate_up_proj_blocks": (experts, pairs),
            "gate_up_proj_scales": (experts, pairs),
            "gate_up_proj_bias": (experts, pairs),
            "down_proj": (experts, width),
            "down_proj_blocks": (experts, _ALL, blocks),
            "down_proj_scales": (experts, _ALL, blocks),
            "down_proj_bias": (experts,),
        }[name]


def shards_of(architecture: PuzzleArchitecture, parallelism: Parallelism) -> list[Shard]:
    """All ranks' parts, in order."""
    return [Shard(architecture=architecture, parallelism=parallelism, rank=rank) for rank in range(parallelism.tensor)]


def count_shard_bytes(shard: Shard) -> int:
    """Bytes of this rank's part of a checkpoint's tensors, as they are on disk."""
    return sum(_part_bytes(spec, shard.part(name)) for name, spec in tensor_table(shard.architecture).items())


def _part_bytes(spec: TensorSpec, part: tuple[slice, ...]) -> int:
    lengths = [len(range(*index.indices(size))) for index, size in zip(part, spec.shape, strict=False)]
    return math.prod([*lengths, *spec.shape[len(lengths) :]]) * DTYPE_BYTES[spec.dtype]


def _part(total: int, parts: int, index: int) -> slice:
    """The index-th of `parts` ranges of `total`; the first ones are one longer where it does not divide."""
    size, longer = divmod(total, parts)
    start = index * size + min(index, longer)
    return slice(start, start + size + (index < longer))


def _times(part: slice, factor: int) -> slice:
    return slice(part.start * factor, part.stop * factor)


def _length(part: slice) -> int:
    return int(part.stop - part.start)
