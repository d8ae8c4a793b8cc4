"""Loading a serving copy into the tensors that the forward pass multiplies.

Legend: D hidden, F expert intermediate, E experts of the layer, H query heads, K KV heads, Dh head dim, V vocabulary.
Query, key and value projections are fused into one. Gate and up rows, interleaved on disk, are separated, so that a
plain chunk splits them. Experts come in the form that they have on disk (BF16 or MXFP4); each layer's are handed to
the kernels, which hold them as they like. Of several ranks each reads its own part (sharding.py): then E, F, H and K,
and V of the head, are those of the part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from puzzle_trtllm.architecture import BlockConfig, PuzzleArchitecture
from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.models.reference.dummy import DummyCheckpoint
from puzzle_trtllm.models.reference.kernels import ExpertMixture, Kernels, Linear
from puzzle_trtllm.models.reference.kernels.expert_weights import ExpertWeights, Mxfp4Matrix
from puzzle_trtllm.sharding import Shard


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """One decoder layer."""

    block: BlockConfig
    input_norm: Tensor
    qkv: Linear
    """D to (H + 2K) * Dh"""
    out: Linear
    """H * Dh to D"""
    sinks: Tensor
    """float32 `[H]`: a logit that takes part in the softmax and adds nothing to the output."""
    post_norm: Tensor
    router: Linear
    experts: ExpertMixture
    held_experts: range
    """Those of the router's experts that `experts` holds."""


@dataclass(frozen=True, kw_only=True)
class ModelWeights:
    """A whole model."""

    architecture: PuzzleArchitecture
    """Heads and expert width as held here."""
    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor
    head: Linear

    @property
    def num_bytes(self) -> int:
        """Bytes that the weights occupy as held (larger than the checkpoint when experts are dequantized)."""
        return sum(t.numel() * t.element_size() for t in _tensors_of(self))


@dataclass(frozen=True, kw_only=True)
class WeightLoader:
    """Reads a checkpoint, or of several ranks the part of one."""

    checkpoint: Checkpoint | DummyCheckpoint
    dtype: torch.dtype
    device: torch.device
    kernels: Kernels
    shard: Shard

    def load(self) -> ModelWeights:
        """What this rank holds of the model. Raises CheckpointError for a missing or misshapen tensor."""
        self.checkpoint.validate()
        architecture = self.shard.architecture
        embedding = self._tensor("model.embed_tokens.weight")
        tied = architecture.tie_word_embeddings
        return ModelWeights(
            architecture=self.shard.local,
            embedding=embedding,
            layers=tuple(self._layer(index, block) for index, block in enumerate(architecture.blocks)),
            final_norm=self._tensor("model.norm.weight").float(),
            head=self.kernels.prepare_linear(
                embedding[self.shard.vocabulary] if tied else self._tensor("lm_head.weight"), None
            ),
        )

    def _tensor(self, name: str) -> Tensor:
        return self._stored(name).to(device=self.device, dtype=self.dtype)

    def _added_bias(self, name: str) -> Tensor:
        """A bias behind a sum over ranks: zeros where another rank adds it."""
        bias = self._tensor(name)
        return bias if self.shard.adds_bias(name) else torch.zeros_like(bias)

    def _layer(self, index: int, block: BlockConfig) -> LayerWeights:
        prefix = f"model.layers.{index}"
        attention = f"{prefix}.self_attn"
        has_bias = self.checkpoint.architecture.attention_bias
        projections = [f"{attention}.{name}_proj" for name in "qkv"]
        return LayerWeights(
            block=block,
            input_norm=self._tensor(f"{prefix}.input_layernorm.weight").float(),
            qkv=self.kernels.prepare_linear(
                torch.cat([self._tensor(f"{name}.weight") for name in projections]),
                torch.cat([self._tensor(f"{name}.bias") for name in projections]) if has_bias else None,
            ),
            out=self.kernels.prepare_linear(
                self._tensor(f"{attention}.o_proj.weight"),
                self._added_bias(f"{attention}.o_proj.bias") if has_bias else None,
            ),
            sinks=self._tensor(f"{attention}.sinks").float(),
            post_norm=self._tensor(f"{prefix}.post_attention_layernorm.weight").float(),
            router=self.kernels.prepare_linear(
                self._tensor(f"{prefix}.mlp.router.weight"), self._tensor(f"{prefix}.mlp.router.bias")
            ),
            experts=self.kernels.prepare_experts(
                self._experts(f"{prefix}.mlp.experts"), limit=self.checkpoint.architecture.swiglu_limit
            ),
            held_experts=range(block.num_local_experts)[self.shard.experts(index)],
        )

    def _experts(self, prefix: str) -> ExpertWeights:
        return ExpertWeights(
            gate_up=self._matrix(f"{prefix}.gate_up_proj", interleaved=True),
            gate_up_bias=_separate(self._tensor(f"{prefix}.gate_up_proj_bias")),
            down=self._matrix(f"{prefix}.down_proj", interleaved=False),
            down_bias=self._added_bias(f"{prefix}.down_proj_bias"),
        )

    def _matrix(self, name: str, *, interleaved: bool) -> Tensor | Mxfp4Matrix:
        """`[E, rows, cols]`, rows being outputs; BF16 experts are stored the other way round."""
        arrange = _separate if interleaved else (lambda tensor: tensor)
        if self.checkpoint.architecture.experts_format == "bf16":
            return arrange(self._tensor(name).transpose(1, 2)).contiguous()
        return Mxfp4Matrix(
            blocks=arrange(self._stored(f"{name}_blocks")).to(self.device),
            scales=arrange(self._stored(f"{name}_scales")).to(self.device),
        )

    def _stored(self, name: str) -> Tensor:
        return self.checkpoint.torch(name, self.shard.part(name))


def _separate(rows: Tensor) -> Tensor:
    """`[E, 2F, ...]` with gate and up interleaved to gate first, then up."""
    return torch.cat([rows[:, 0::2], rows[:, 1::2]], dim=1)


def _tensors_of(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple):
        return [tensor for item in value for tensor in _tensors_of(item)]
    fields: Mapping[str, object] = getattr(value, "__dict__", {})
    return [tensor for item in fields.values() for tensor in _tensors_of(item)]
