"""gpt-oss in a form that trains fast on a CPU; names and shapes are the checkpoint's.

What differs from a textbook transformer, all of it gpt-oss: a learned sink logit a head takes part in the softmax and
gives nothing; the router's softmax runs over the chosen experts only; SwiGLU is gate * sigmoid(1.702 gate) * (up + 1)
with both clamped, gate and up interleaved on one axis.

What differs from the usual gpt-oss code: the sink is one more key. Queries grow by a dimension that holds 1, real keys
hold 0 there and the sink's key holds its logit, so that the fused attention kernel differentiates it. Tokens are sorted
by expert, so each expert does one matrix product over its own tokens.

Legend: B batch, T tokens, S keys, D hidden, F intermediate, H heads, K kv heads, Dh head_dim, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puzzle_trtllm.demo.training import rounding
from puzzle_trtllm.demo.training.dimensions import Dimensions

_RUN = 128
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


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """How one forward pass differs from the plain parent: windows a layer, and experts switched off.

    `expert_bias` is added to the router logits, `[L, 1 or B, E]` with 0 or -inf; `routing` collects each layer's router
    logits `[B * T, E]` when it is a list.
    """

    windows: Sequence[int | None]
    expert_bias: Tensor | None = None
    routing: list[Tensor] | None = None


class RoundedLinear(nn.Linear):
    """A linear layer that can compute with bfloat16 values of its weight and bias."""

    rounded = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.rounded:
            return F.linear(x, self.weight, self.bias)
        bias = None if self.bias is None else rounding.bfloat16(self.bias)
        return F.linear(x, rounding.bfloat16(self.weight), bias)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in float32."""

    rounded = False

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        weight = rounding.bfloat16(self.weight) if self.rounded else self.weight
        return F.rms_norm(x.float(), weight.shape, weight, self.eps)


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
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """q `[B, H, T, Dh]`, k and v `[B, K, S, Dh]`, mask `[T, S + 1]` whose first column is the sink's."""
        dims, batch = self.dims, q.shape[0]
        group, scale = dims.num_heads // dims.num_kv_heads, dims.head_dim**-0.5
        sinks = rounding.bfloat16(self.sinks) if self.rounded else self.sinks
        sink_key = F.pad((sinks / scale).to(q.dtype).view(1, -1, 1, 1), (dims.head_dim, _SINK_PADDING - 1))
        q = F.pad(F.pad(q, (0, 1), value=1.0), (0, _SINK_PADDING - 1))
        k = F.pad(k, (0, _SINK_PADDING)).repeat_interleave(group, 1)
        v = F.pad(v, (0, _SINK_PADDING, 1, 0)).repeat_interleave(group, 1)
        k = torch.cat([sink_key.expand(batch, -1, 1, -1), k], 2)
        with torch.autocast("cpu", enabled=False):
            out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask, scale=scale)
        return out[..., : dims.head_dim]


def _rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rotary
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class _Gather(torch.autograd.Function):
    """Pick rows by index where every row is picked once, and some twice as padding that gets no gradient.

    The gradient is a gather too (by `inverse`, masked where padding was filled), far cheaper than a scatter.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor, real: Tensor | None) -> Tensor:
        ctx.inverse, ctx.real = inverse, real
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        rows = grads[0].index_select(0, ctx.inverse)
        return (rows if ctx.real is None else rows * ctx.real.to(rows.dtype)), None, None, None


class Experts(nn.Module):
    """The expert matrices, `[E, 2F, D]` and `[E, D, F]` as stored, gate on even and up on odd rows."""

    rounded = False

    def __init__(self, dims: Dimensions) -> None:
        super().__init__()
        experts, hidden, width = dims.num_experts, dims.hidden, dims.intermediate
        self.limit = dims.swiglu_limit
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * width, hidden) * hidden**-0.5)
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(experts, 2 * width))
        self.down_proj = nn.Parameter(torch.randn(experts, hidden, width) * width**-0.5 * 0.3)
        self.down_proj_bias = nn.Parameter(torch.zeros(experts, hidden))

    def _weights(self) -> tuple[Tensor, ...]:
        tensors = (self.gate_up_proj, self.gate_up_proj_bias, self.down_proj, self.down_proj_bias)
        if self.rounded:
            kinds = (rounding.mxfp4, rounding.bfloat16, rounding.mxfp4, rounding.bfloat16)
            tensors = tuple(kind(tensor) for kind, tensor in zip(kinds, tensors, strict=True))  # type: ignore[assignment]
        gate_up, gate_up_bias, down, down_bias = tensors
        halves = (torch.cat([t[:, 0::2], t[:, 1::2]], 1) for t in (gate_up, gate_up_bias))
        return (*halves, down, down_bias)

    def forward(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Rows `[N, D]` sorted by expert, `counts[e]` of them for expert e."""
        weights = zip(rows.split(counts), *(tensor.unbind(0) for tensor in self._weights()), strict=True)
        outputs = []
        for x, gate_up, gate_up_bias, down, down_bias in weights:
            gate, up = F.linear(x, gate_up, gate_up_bias).chunk(2, -1)
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
            outputs.append(F.linear((up + 1) * gate * torch.sigmoid(1.702 * gate), down, down_bias))
        return torch.cat(outputs)


class MixtureOfExperts(nn.Module):
    """Router and experts: the top k logits choose, their softmax weighs."""

    def __init__(self, dims: Dimensions) -> None:
        super().__init__()
        self.top_k, self.num_experts = dims.top_k, dims.num_experts
        self.router = RoundedLinear(dims.hidden, dims.num_experts)
        self.experts = Experts(dims)

    def forward(self, x: Tensor, expert_bias: Tensor | None, routing: list[Tensor] | None) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            logits = self.router(x.float())
        if routing is not None:
            routing.append(logits.flatten(0, 1))
        if expert_bias is not None:
            logits = logits + expert_bias.unsqueeze(1)
        top, chosen = logits.flatten(0, 1).topk(self.top_k, -1)
        slots = _Slots.of(chosen.flatten(), self.num_experts)
        copies = x.flatten(0, 1).unsqueeze(1).expand(-1, self.top_k, -1).flatten(0, 1)
        rows: Tensor = _Gather.apply(copies, slots.source, slots.target, None)  # type: ignore[no-untyped-call]
        rows = self.experts(rows, slots.counts)
        rows = _Gather.apply(rows, slots.target, slots.source, slots.real)  # type: ignore[no-untyped-call]
        weighted = rows.float().unflatten(0, (-1, self.top_k)) * top.softmax(-1).unsqueeze(-1)
        return weighted.sum(1).view_as(x)


@dataclass(frozen=True, kw_only=True)
class _Slots:
    """Where each (token, choice) row goes when rows are sorted by expert.

    Each expert's run is padded to a multiple of _RUN rows: the CPU's bfloat16 kernels are compiled per shape, and a
    new row count for every expert at every step would compile for ever.
    """

    source: Tensor  # [slots] row that fills each slot; 0 in padding
    target: Tensor  # [rows] slot of each row
    real: Tensor  # [slots, 1] false in padding
    counts: list[int]  # [E] slots of each expert

    @classmethod
    def of(cls, experts: Tensor, num_experts: int) -> _Slots:
        order = experts.argsort(stable=True)
        counts = torch.bincount(experts, minlength=num_experts)
        padded = (counts + _RUN - 1) // _RUN * _RUN
        shift = (padded - counts).cumsum(0) - (padded - counts)
        target = torch.empty_like(order)
        target[order] = torch.arange(len(order)) + shift[experts[order]]
        source = torch.zeros(int(padded.sum()), dtype=torch.int64)
        source[target] = torch.arange(len(order))
        real = torch.zeros(len(source), 1, dtype=torch.bool)
        real[target] = True
        return cls(source=source, target=target, real=real, counts=padded.tolist())


class Layer(nn.Module):
    """Attention and mixture of experts, each behind a norm and beside a residual."""

    def __init__(self, dims: Dimensions) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(dims.hidden, dims.rms_norm_eps)
        self.self_attn = Attention(dims)
        self.post_attention_layernorm = RMSNorm(dims.hidden, dims.rms_norm_eps)
        self.mlp = MixtureOfExperts(dims)


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
        self.inverse_frequencies, self.attention_scaling = _rotary_parameters(dims)

    def set_rounded(self, rounded: bool) -> None:
        for module in self.modules():
            if hasattr(module, "rounded"):
                module.rounded = rounded

    def forward(self, tokens_BT: Tensor, conditions: Conditions, caches: list[Cache] | None = None) -> Tensor:
        """Logits `[B, T, V]`. With caches (one a layer), the tokens continue what the caches hold."""
        past = 0 if caches is None or caches[0].keys is None else caches[0].keys.shape[2]
        positions = torch.arange(past, past + tokens_BT.shape[1])
        angles = positions[:, None] * self.inverse_frequencies
        rotary = (angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling)
        masks = {window: attention_mask(positions, window) for window in set(conditions.windows)}
        table = self.model.embed_tokens.weight
        x = F.embedding(tokens_BT, rounding.bfloat16(table) if self.rounded else table)
        for i, layer in enumerate(self.model.layers):
            cache = None if caches is None else caches[i]
            bias = None if conditions.expert_bias is None else conditions.expert_bias[i]
            x = x + layer.self_attn(layer.input_layernorm(x), rotary, masks[conditions.windows[i]], cache)
            x = x + layer.mlp(layer.post_attention_layernorm(x), bias, conditions.routing)
        logits: Tensor = self.lm_head(self.model.norm(x))
        return logits


def _rotary_parameters(dims: Dimensions) -> tuple[Tensor, float]:
    """YaRN's inverse frequencies `[Dh / 2]` and its factor on cos and sin, as transformers computes them."""
    from transformers import GptOssConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    return ROPE_INIT_FUNCTIONS["yarn"](GptOssConfig(**dims.config()), torch.device("cpu"))


def attention_mask(query_positions: Tensor, window: int | None) -> Tensor:
    """Additive mask `[T, 1 + S]` for keys 0 .. last query; column 0 is the sink, which everyone sees."""
    keys = torch.arange(int(query_positions[-1]) + 1)
    distance = query_positions[:, None] - keys
    visible = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    return F.pad(torch.zeros(distance.shape).masked_fill(~visible, float("-inf")), (1, 0))
