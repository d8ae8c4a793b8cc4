"""Which tensors a gpt-oss checkpoint holds: name, dtype and shape, derived from the architecture alone.

Legend: E experts of the layer, D hidden, F expert intermediate, H query heads, K KV heads, Dh head dim, V vocabulary.
Gate and up are interleaved on the 2F axis (even rows gate, odd rows up). MXFP4 groups 32 values of the contracted axis:
`gate_up_proj_blocks` uint8 [E, 2F, D/32, 16] with `_scales` uint8 [E, 2F, D/32]; `down_proj_blocks` uint8
[E, D, F/32, 16]. BF16 experts are stored transposed, as transformers multiplies them: `gate_up_proj` [E, D, 2F],
`down_proj` [E, F, D].
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType

from puzzle_trtllm.architecture import BlockConfig, ExpertsFormat, PuzzleArchitecture

DTYPE_BYTES = MappingProxyType(
    {
        "BOOL": 1,
        "U8": 1,
        "I8": 1,
        "F8_E4M3": 1,
        "F8_E5M2": 1,
        "F8_E8M0": 1,
        "I16": 2,
        "U16": 2,
        "F16": 2,
        "BF16": 2,
        "I32": 4,
        "U32": 4,
        "F32": 4,
        "I64": 8,
        "U64": 8,
        "F64": 8,
    }
)
"""Bytes of one element by safetensors dtype name."""

_EXPERTS = re.compile(r"^model\.layers\.(\d+)\.mlp\.experts\.")
_KV_SCALE = re.compile(r"^model\.layers\.(\d+)\.self_attn\.(?:([kvq])_proj\.)?([kvq])_scale$")


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """What a tensor must be."""

    dtype: str
    """safetensors name: BF16, U8, F32, ..."""
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * DTYPE_BYTES[self.dtype]


def tensor_table(architecture: PuzzleArchitecture) -> dict[str, TensorSpec]:
    """Every tensor of a checkpoint of this architecture (calibrated KV scales, which are optional, left out)."""
    a = architecture
    table = {"model.embed_tokens.weight": _bf16(a.vocab_size, a.hidden_size)}
    for layer, block in enumerate(a.blocks):
        table.update((f"model.layers.{layer}.{name}", spec) for name, spec in _layer_table(a, block))
    table["model.norm.weight"] = _bf16(a.hidden_size)
    if not a.tie_word_embeddings:
        table["lm_head.weight"] = _bf16(a.vocab_size, a.hidden_size)
    return table


def count_parameters(architecture: PuzzleArchitecture) -> int:
    """Parameters; an MXFP4 byte holds two, and scale bytes hold none (the published 88.15B counts so)."""
    return sum(
        0 if name.endswith("_scales") else spec.num_elements * (2 if name.endswith("_blocks") else 1)
        for name, spec in tensor_table(architecture).items()
    )


def count_weight_bytes(architecture: PuzzleArchitecture) -> int:
    """Bytes of all tensors, scale bytes included, file headers not."""
    return sum(spec.num_bytes for spec in tensor_table(architecture).values())


def is_expert_tensor(name: str) -> bool:
    """True for `model.layers.*.mlp.experts.*`: the bytes that sit in shards of their own."""
    return _EXPERTS.match(name) is not None


def kv_scale_of(name: str) -> tuple[int, str] | None:
    """`(layer, "k" | "v" | "q")` if this is a KV (or Q) scale under one of its names in the wild, else None.

    Known names: `self_attn.k_proj.k_scale` (ModelOpt) and `self_attn.k_scale`, likewise v and q.
    """
    match = _KV_SCALE.match(name)
    if match is None or match[2] not in (None, match[3]):
        return None
    return int(match[1]), match[3]


def _layer_table(a: PuzzleArchitecture, block: BlockConfig) -> Iterator[tuple[str, TensorSpec]]:
    q_dim, kv_dim, hidden = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim, a.hidden_size
    yield "input_layernorm.weight", _bf16(hidden)
    for name, out_dim, in_dim in (
        ("q_proj", q_dim, hidden),
        ("k_proj", kv_dim, hidden),
        ("v_proj", kv_dim, hidden),
        ("o_proj", hidden, q_dim),
    ):
        yield f"self_attn.{name}.weight", _bf16(out_dim, in_dim)
        if a.attention_bias:
            yield f"self_attn.{name}.bias", _bf16(out_dim)
    yield "self_attn.sinks", _bf16(a.num_attention_heads)
    yield "post_attention_layernorm.weight", _bf16(hidden)
    yield "mlp.router.weight", _bf16(block.num_local_experts, hidden)
    yield "mlp.router.bias", _bf16(block.num_local_experts)
    yield from expert_table(a, block.num_local_experts, a.experts_format)


def expert_table(
    a: PuzzleArchitecture, num_experts: int, experts_format: ExpertsFormat
) -> Iterator[tuple[str, TensorSpec]]:
    """The expert tensors of one layer, names relative to `model.layers.{i}.`."""
    hidden, ffn = a.hidden_size, a.intermediate_size
    for name, out_dim, in_dim in (("gate_up_proj", 2 * ffn, hidden), ("down_proj", hidden, ffn)):
        prefix = f"mlp.experts.{name}"
        if experts_format == "mxfp4":
            yield f"{prefix}_blocks", TensorSpec(dtype="U8", shape=(num_experts, out_dim, in_dim // 32, 16))
            yield f"{prefix}_scales", TensorSpec(dtype="U8", shape=(num_experts, out_dim, in_dim // 32))
        else:
            yield prefix, _bf16(num_experts, in_dim, out_dim)
        yield f"{prefix}_bias", _bf16(num_experts, out_dim)


def _bf16(*shape: int) -> TensorSpec:
    return TensorSpec(dtype="BF16", shape=shape)
