"""gpt-oss attention: grouped queries, a window, and a learned sink a head.

The sink is a logit that takes part in the softmax and gives nothing. Here it is one more key: queries grow by a
dimension that holds 1, real keys hold 0 there, and the sink's key holds its logit with a value of zeros. That way
the fused attention kernel computes and differentiates it, three times faster on a CPU than a softmax written out.

Legend: B batch, T tokens, S keys, H heads, K kv heads, Dh head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from puzzle_trtllm.demo.training import rounding
from puzzle_trtllm.demo.training.dimensions import Dimensions
from puzzle_trtllm.demo.training.layers import RoundedLinear

_SINK_PADDING = 8
"""Extra head dimensions, of which the first holds the sink's logit; a multiple of 8 suits the kernel."""


@dataclass(kw_only=True)
class Cache:
    """Keys (after RoPE) and values of one layer, `[B, K, S, Dh]`, S growing by what each call appends."""

    keys: Tensor | None = None
    values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys], 2)
        self.values = values if self.values is None else torch.cat([self.values, values], 2)
        return self.keys, self.values


class Attention(nn.Module):
    """Grouped-query attention with sinks and a window that includes the query's own token."""

    rounded = False

    def __init__(self, dims: Dimensions) -> None:
        super().__init__()
        self.dims = dims
        q_width, kv_width = dims.num_heads * dims.head_dim, dims.num_kv_heads * dims.head_dim
        self.q_proj = RoundedLinear(dims.hidden, q_width)
        self.k_proj = RoundedLinear(dims.hidden, kv_width)
        self.v_proj = RoundedLinear(dims.hidden, kv_width)
        self.o_proj = RoundedLinear(q_width, dims.hidden)
        self.sinks = nn.Parameter(torch.zeros(dims.num_heads))

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor, cache: Cache | None) -> Tensor:
        dims = self.dims
        q, k, v = (
            projection(x).unflatten(-1, (-1, dims.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = _rotate(q, rotary), _rotate(k, rotary)
        if cache is not None:
            k, v = cache.append(k, v)
        out = self._attend(q, k, v, mask)
        mixed: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return mixed

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """q `[B, H, T, Dh]`, k and v `[B, K, S, Dh]`, mask `[T, S + 1]` whose first column is the sink's."""
        dims, batch = self.dims, q.shape[0]
        group, scale = dims.num_heads // dims.num_kv_heads, dims.head_dim**-0.5
        sinks = rounding.bfloat16(self.sinks) if self.rounded else self.sinks
        sink_key = functional.pad((sinks / scale).to(q.dtype).view(1, -1, 1, 1), (dims.head_dim, _SINK_PADDING - 1))
        q = functional.pad(functional.pad(q, (0, 1), value=1.0), (0, _SINK_PADDING - 1))
        k = functional.pad(k, (0, _SINK_PADDING)).repeat_interleave(group, 1)
        v = functional.pad(v, (0, _SINK_PADDING, 1, 0)).repeat_interleave(group, 1)
        k = torch.cat([sink_key.expand(batch, -1, 1, -1), k], 2)
        with torch.autocast("cpu", enabled=False):
            out = functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask, scale=scale)
        return out[..., : dims.head_dim]


def _rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rotary
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def rotary_parameters(dims: Dimensions) -> tuple[Tensor, float]:
    """YaRN's inverse frequencies `[Dh / 2]` and its factor on cos and sin, as transformers computes them."""
    from transformers import GptOssConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, scaling = ROPE_INIT_FUNCTIONS["yarn"](GptOssConfig(**dims.config()), torch.device("cpu"))
    return frequencies, float(scaling)


def attention_mask(query_positions: Tensor, window: int | None) -> Tensor:
    """Additive mask `[T, 1 + S]` for keys 0 .. last query; column 0 is the sink, which everyone sees."""
    keys = torch.arange(int(query_positions[-1]) + 1)
    distance = query_positions[:, None] - keys
    visible = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    return functional.pad(torch.zeros(distance.shape).masked_fill(~visible, float("-inf")), (1, 0))
