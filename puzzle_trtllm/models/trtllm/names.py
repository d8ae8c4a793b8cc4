"""Which tensors of the checkpoint fill which module of TensorRT-LLM's gpt-oss.

Module tree (upstream's modeling_gpt_oss.py): `model.block.{i}.attn.{qkv_proj, o_proj, norm}` and the sinks on `attn`
itself, `model.block.{i}.mlp.{norm, gate, experts}`, `model.embedding`, `model.norm`, `lm_head`. The names matter beyond
loading: the MXFP4 exclude patterns match on them.

Three norms of a block are placeholders that upstream replaces after loading by others (`input_layernorm`,
`post_attention_layernorm`, `next_layer_layernorm`, so that norms fuse with the all-reduce before them). The first two
are filled all the same; the third has no tensor of its own and stays as it is made.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

FillKind = Literal["parts", "experts"]

_PLACEHOLDER = re.compile(r"^model\.block\.\d+\.next_layer_layernorm$")
_DRAFT = re.compile(r"^draft_model(\.|$)")


@dataclass(frozen=True, kw_only=True)
class ModulePlan:
    """How one module is filled."""

    module: str
    kind: FillKind
    parts: tuple[Mapping[str, str], ...]
    """Parameter name -> tensor name; three parts for a fused qkv_proj, one elsewhere."""

    @property
    def tensors(self) -> frozenset[str]:
        return frozenset(name for part in self.parts for name in part.values())


def module_plans(num_layers: int, tensors: Iterable[str]) -> dict[str, ModulePlan]:
    """Every module that is filled, by name. `tensors` decides the expert format and whether the head is tied.

    Biases are not optional: upstream makes them for every projection and for the router, and would leave them unfilled.
    """
    names = frozenset(tensors)
    plans = [_module("model.embedding", "model.embed_tokens")]
    for layer in range(num_layers):
        plans += _layer(f"model.block.{layer}", f"model.layers.{layer}", names)
    plans.append(_module("model.norm", "model.norm"))
    head = "lm_head" if "lm_head.weight" in names else "model.embed_tokens"
    plans.append(_module("lm_head", head))
    return {plan.module: plan for plan in plans}


def canonical_name(module: str) -> str:
    """The name a plan goes by: newer fused MoE modules keep their weights in a child called `backend`."""
    return module.removesuffix(".backend") if module.endswith(".mlp.experts.backend") else module


def is_left_alone(module: str) -> bool:
    """Modules with parameters that are not the checkpoint's: placeholders, and a draft model loaded elsewhere."""
    return _PLACEHOLDER.match(module) is not None or _DRAFT.match(module) is not None


def _layer(block: str, layer: str, names: frozenset[str]) -> Iterator[ModulePlan]:
    attn = f"{layer}.self_attn"
    yield ModulePlan(module=f"{block}.attn", kind="parts", parts=({"sinks": f"{attn}.sinks"},))
    qkv = tuple(_part(f"{attn}.{name}_proj", bias=True) for name in "qkv")
    yield ModulePlan(module=f"{block}.attn.qkv_proj", kind="parts", parts=qkv)
    yield _module(f"{block}.attn.o_proj", f"{attn}.o_proj", bias=True)
    for module, tensor in (
        ("attn.norm", "input_layernorm"),
        ("mlp.norm", "post_attention_layernorm"),
        ("input_layernorm", "input_layernorm"),
        ("post_attention_layernorm", "post_attention_layernorm"),
    ):
        yield _module(f"{block}.{module}", f"{layer}.{tensor}")
    yield _module(f"{block}.mlp.gate", f"{layer}.mlp.router", bias=True)
    experts = f"{layer}.mlp.experts."
    suffixes = _MXFP4 if f"{experts}gate_up_proj_blocks" in names else _BF16
    parts = ({suffix: experts + suffix for suffix in suffixes},)
    yield ModulePlan(module=f"{block}.mlp.experts", kind="experts", parts=parts)


def _module(module: str, tensor_prefix: str, *, bias: bool = False) -> ModulePlan:
    return ModulePlan(module=module, kind="parts", parts=(_part(tensor_prefix, bias=bias),))


def _part(prefix: str, *, bias: bool) -> dict[str, str]:
    return {name: f"{prefix}.{name}" for name in (("weight", "bias") if bias else ("weight",))}


_BF16 = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
_MXFP4 = (
    "gate_up_proj_blocks",
    "gate_up_proj_scales",
    "gate_up_proj_bias",
    "down_proj_blocks",
    "down_proj_scales",
    "down_proj_bias",
)
