"""Bytes of weights on one GPU, exact to the tensor, under a layout and with expert counts that differ by layer.

Tensors fall into five classes by what splits them: experts (dealt out over all GPUs of a replica), query heads (Q, O
and sinks: split under tpN), KV heads (K and V: split under tpN, repeated when there are more GPUs than heads),
vocabulary (embedding and lm_head: split under tpN), and the rest (norms, router, O's bias: on every GPU).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from puzzle_trtllm.architecture import PuzzleArchitecture
from puzzle_trtllm.build.planner.layout import Layout
from puzzle_trtllm.tensors import is_expert_tensor, tensor_table

SplitBy = Literal["experts", "query heads", "KV heads", "vocabulary", "nothing"]

_BY_QUERY_HEAD = ("self_attn.q_proj.weight", "self_attn.q_proj.bias", "self_attn.o_proj.weight", "self_attn.sinks")
_BY_KV_HEAD = ("self_attn.k_proj.weight", "self_attn.k_proj.bias", "self_attn.v_proj.weight", "self_attn.v_proj.bias")
_BY_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True, kw_only=True)
class WeightBytes:
    """Weights of one GPU, bytes."""

    experts: int
    attention_and_router: int
    vocabulary: int
    """Embedding and lm_head."""

    @property
    def total(self) -> int:
        return self.experts + self.attention_and_router + self.vocabulary


def weights_by_split(architecture: PuzzleArchitecture) -> dict[SplitBy, int]:
    """Bytes of the whole model by what splits them; the values add up to `count_weight_bytes`."""
    result: Counter[SplitBy] = Counter()
    for name, spec in tensor_table(architecture).items():
        result[split_by(name)] += spec.num_bytes
    return dict(result)


def split_by(name: str) -> SplitBy:
    """The class of a tensor."""
    if is_expert_tensor(name):
        return "experts"
    if name in _BY_VOCABULARY:
        return "vocabulary"
    if name.endswith(_BY_KV_HEAD):
        return "KV heads"
    return "query heads" if name.endswith(_BY_QUERY_HEAD) else "nothing"


def weights_per_gpu(
    architecture: PuzzleArchitecture, layout: Layout, whole: dict[SplitBy, int] | None = None
) -> WeightBytes:
    """What one GPU of a replica holds; `whole` saves computing `weights_by_split` again.

    Every division is exact: `parse_layout` lets only even splits through.
    """
    whole = weights_by_split(architecture) if whole is None else whole
    kv = whole["KV heads"] * layout.kv_heads_per_gpu(architecture) // architecture.num_key_value_heads
    return WeightBytes(
        experts=whole["experts"] // layout.gpus_per_replica,
        attention_and_router=whole["query heads"] // layout.attention_split + kv + whole["nothing"],
        vocabulary=whole["vocabulary"] // layout.attention_split,
    )


def active_parameters(architecture: PuzzleArchitecture) -> int:
    """Parameters that one token passes through: all but the experts it is not routed to and the embedding table.

    A table that is the head too (tied embeddings) counts, as the head. The published 5.13 B counts so; it is the same
    for parent and child, because pruning leaves top-k alone.
    """
    total = 0
    for name, spec in tensor_table(architecture).items():
        if name.endswith("_scales") or (name == "model.embed_tokens.weight" and not architecture.tie_word_embeddings):
            continue
        count = spec.num_elements * (2 if name.endswith("_blocks") else 1)
        total += count * architecture.experts_per_token // spec.shape[0] if is_expert_tensor(name) else count
    return total
