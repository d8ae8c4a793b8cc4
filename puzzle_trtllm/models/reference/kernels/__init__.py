"""What a step of the forward pass is made of, behind one interface.

An implementation is chosen once, when an engine is loaded, and must give what `TorchKernels` gives: that one runs
everywhere and is the oracle of the others. Weights are handed over once and held in whatever form a kernel reads.

Legend: T rows of a step, S decoding sequences, R rows of prompt chunks, D hidden, H query heads, K KV heads, Dh head
dim, N blocks of the pool, B tokens a block, W rows that are kept, E experts, k experts a token.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from puzzle_trtllm.models.reference.kernels.expert_weights import ExpertWeights
from puzzle_trtllm.models.reference.kernels.reads import Chunks, GroupReads


class Linear(Protocol):
    """A linear layer; its attributes are tensors, or objects that hold tensors."""

    def __call__(self, x: Tensor) -> Tensor:
        """x `[T, inputs]`; gives `[T, outputs]`."""


class ExpertMixture(Protocol):
    """The experts of one layer; its attributes are tensors, or objects that hold tensors."""

    def __call__(self, x: Tensor, shares: Tensor, chosen: Tensor) -> Tensor:
        """Sum over j of `shares[t, j] * expert chosen[t, j]` of x `[T, D]`; shares and chosen (int64) `[T, k]`.

        `chosen` counts the experts held here, and their number stands for one that another rank holds, which adds
        nothing; gives `[T, D]`.
        """


class Kernels(Protocol):
    """All operations of a step but the embedding and residual sums."""

    name: str

    def prepare_linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """weight `[outputs, inputs]`."""

    def prepare_experts(self, experts: ExpertWeights, *, limit: float) -> ExpertMixture:
        """`limit` clamps SwiGLU's inputs (`swiglu_limit`)."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x `[T, D]`, weight float32 `[D]`; float32 inside, rounded to x's dtype at the end."""

    def rotate(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, kv_heads: int, kv_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Rotate `[T, H + 2K, Dh]` by the rows `positions` of cos and sin `[positions, Dh / 2]`.

        Gives q `[T, H, Dh]` and, as the cache stores them, K and V `[2, T, K, Dh]`.
        """

    def write(self, storage: Tensor, rows: Tensor, offsets: Tensor, kv: Tensor) -> None:
        """Write `[2, W, K, Dh]` into one layer's storage at rows `[W, K]` and offsets `[W, 1]` in their blocks."""

    def decode_attention(self, q: Tensor, sinks: Tensor, storage: Tensor, reads: GroupReads) -> Tensor:
        """q `[S, H, Dh]`, sinks float32 `[H]`, one layer's storage `[2, N * K, B, Dh]`; gives `[S, H * Dh]`."""

    def prefill_attention(
        self, q: Tensor, kv: Tensor, sinks: Tensor, storage: Tensor, reads: GroupReads, chunks: Chunks
    ) -> Tensor:
        """Prompt chunks attend to their past in the storage, and to themselves: q `[R, H, Dh]`, kv `[2, R, K, Dh]` as
        the cache stores it; gives `[R, H * Dh]`."""

    def route(self, logits: Tensor, top: int) -> tuple[Tensor, Tensor]:
        """The `top` largest of router logits `[T, E]`: shares (their softmax) and expert numbers, int64, `[T, k]`."""
