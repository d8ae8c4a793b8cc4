"""The two operations that decide the speed of a decode step, behind one interface.

Everything else of the forward pass is plain PyTorch. An implementation is chosen once, when an engine is loaded, and
must give what `torch_kernels` gives: that one runs everywhere and is the oracle of the others.

Legend: S decoding sequences, H query heads, K KV heads, Dh head dim, N blocks of the pool, B tokens a block,
T tokens, D hidden, k experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from puzzle_trtllm.models.reference.step import DecodeGroup
    from puzzle_trtllm.models.reference.weights import ExpertWeights


class DecodeAttention(Protocol):
    """One query a sequence over the paged cache."""

    def __call__(self, q: Tensor, sinks: Tensor, storage: Tensor, group: DecodeGroup) -> Tensor:
        """q `[S, H, Dh]`, sinks float32 `[H]`, one layer's storage `[2, N * K, B, Dh]`; gives `[S, H * Dh]`."""


class ExpertMixture(Protocol):
    """The experts of one layer, in whatever form the kernel reads them. Its attributes are tensors, or None."""

    def __call__(self, x: Tensor, shares: Tensor, chosen: Tensor) -> Tensor:
        """Sum over j of `shares[t, j] * expert chosen[t, j]` of x `[T, D]`; shares and chosen `[T, k]`.

        `chosen` counts the experts held here, and their number stands for one that another rank holds, which adds
        nothing; gives `[T, D]`.
        """


class PrepareExperts(Protocol):
    """Brings experts into the kernel's own form; what it was given may be freed afterwards."""

    def __call__(self, experts: ExpertWeights, *, limit: float) -> ExpertMixture:
        """`limit` clamps SwiGLU's inputs (`swiglu_limit`)."""


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """An implementation of both operations."""

    name: str
    decode_attention: DecodeAttention
    prepare_experts: PrepareExperts
