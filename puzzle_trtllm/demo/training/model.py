"""abacus as a trainable model; names and shapes of its tensors are the checkpoint's.

A forward pass can differ from the plain parent: other windows, and experts switched off in the router, which equals
removing them. Training uses that for dropout, evaluation for trying children without writing them.

Legend: B batch, T tokens, E experts, L layers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from puzzle_trtllm.demo.training import rounding
from puzzle_trtllm.demo.training.attention import Attention, Cache, attention_mask, rotary_parameters
from puzzle_trtllm.demo.training.dimensions import Dimensions
from puzzle_trtllm.demo.training.layers import RMSNorm, RoundedLinear
from puzzle_trtllm.demo.training.mixture import MixtureOfExperts


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """How one forward pass differs from the plain parent: windows a layer, and experts switched off.

    `expert_bias` is added to the router logits, `[L, 1 or B, E]` with 0 or -inf; `routing` collects each layer's router
    logits `[B * T, E]` when it is a list.
    """

    windows: Sequence[int | None]
    expert_bias: Tensor | None = None
    routing: list[Tensor] | None = None


class Layer(nn.Module):
    """Attention and mixture of experts, each behind a norm and beside a residual."""

    def __init__(self, dims: Dimensions) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(dims.hidden, dims.rms_norm_eps)
        self.self_attn = Attention(dims)
        self.post_attention_layernorm = RMSNorm(dims.hidden, dims.rms_norm_eps)
        self.mlp = MixtureOfExperts(dims)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor,
        cache: Cache | None,
        expert_bias: Tensor | None,
        routing: list[Tensor] | None,
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, cache)
        output: Tensor = x + self.mlp(self.post_attention_layernorm(x), expert_bias, routing)
        return output


class Body(nn.Module):
    """Everything but the output matrix; exists so that tensor names carry the prefix `model.`"""

    def __init__(self, dims: Dimensions) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(dims.vocab_size, dims.hidden)
        self.layers = nn.ModuleList(Layer(dims) for _ in range(dims.num_layers))
        self.norm = RMSNorm(dims.hidden, dims.rms_norm_eps)


class Abacus(nn.Module):
    """The whole model. `set_rounded(True)` makes it compute with the values that a checkpoint stores."""

    rounded = False

    def __init__(self, dims: Dimensions) -> None:
        super().__init__()
        self.dims = dims
        self.model = Body(dims)
        self.lm_head = RoundedLinear(dims.hidden, dims.vocab_size, bias=False)
        self.inverse_frequencies, self.attention_scaling = rotary_parameters(dims)

    def set_rounded(self, rounded: bool) -> None:
        for module in self.modules():
            if hasattr(module, "rounded"):
                module.rounded = rounded  # type: ignore[assignment]

    def forward(self, tokens_BT: Tensor, conditions: Conditions, caches: list[Cache] | None = None) -> Tensor:
        """Logits `[B, T, V]`. With caches (one a layer), the tokens continue what the caches hold."""
        past = 0 if caches is None or caches[0].keys is None else caches[0].keys.shape[2]
        positions = torch.arange(past, past + tokens_BT.shape[1])
        angles = positions[:, None] * self.inverse_frequencies
        rotary = (angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling)
        masks = {window: attention_mask(positions, window) for window in set(conditions.windows)}
        table = self.model.embed_tokens.weight
        x = functional.embedding(tokens_BT, rounding.bfloat16(table) if self.rounded else table)
        for i, layer in enumerate(self.model.layers):
            cache = None if caches is None else caches[i]
            bias = None if conditions.expert_bias is None else conditions.expert_bias[i]
            x = layer(x, rotary, masks[conditions.windows[i]], cache, bias, conditions.routing)
        logits: Tensor = self.lm_head(self.model.norm(x))
        return logits
