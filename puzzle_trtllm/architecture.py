"""The shape of a Puzzle child: dimensions that all layers share, and one `BlockConfig` a layer.

A Puzzle child is a gpt-oss mixture-of-experts model whose layers differ in two things: how many experts they keep and
how far they look back. `PuzzleArchitecture` is read from a Hugging Face `config.json` (types `gpt_oss` and
`gpt_oss_puzzle`), cannot change, is validated when it is made, and is the only source of parameter counts, weight bytes
and KV-cache bytes.

Forms of the per-layer part in the wild, tried in this order:
1. `block_configs`, flat: `{"num_local_experts": n, "sliding_window": w | null}` (the released child);
2. `block_configs`, nested as ModelOpt writes it: `{"attention": {"sliding_window": w}, "ffn": {"moe":
   {"num_local_experts": n}}}`;
3. `per_layer_config` as transformers (5.14 and later) keeps it: `{"0": {"num_local_experts": n, ...}, ...}`, overrides
   on top of the shared values;
4. nothing: a plain gpt-oss model, `num_local_experts` everywhere and the window where `layer_types` says so.

A window w counts the query's own token: a key is seen if and only if key > query - w.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from puzzle_trtllm.config_values import (
    MAX_INTEGER,
    boolean,
    positive_integer,
    positive_number,
    section,
)
from puzzle_trtllm.errors import ArchitectureError
from puzzle_trtllm.families import GPT_OSS_PUZZLE, family_of
from puzzle_trtllm.json_files import read_json_object
from puzzle_trtllm.rope import RopeConfig

ExpertsFormat = Literal["mxfp4", "bf16"]
KvDtype = Literal["bf16", "fp8"]

KV_BYTES_PER_VALUE: Mapping[KvDtype, int] = {"bf16": 2, "fp8": 1}

SWIGLU_ALPHA = 1.702
"""Factor in the sigmoid of the experts' gate."""

_INHERITED = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "experts_per_token",
)
"""What a child has of its parent, whatever its blocks are."""

MAX_LAYERS = 10_000
"""Where nothing but a number says how many: each is an object here."""

_LAYER_TYPES = ("sliding_attention", "full_attention")
"""Hugging Face's names; layers alternate in this order where a config says nothing."""


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """What one layer decides for itself."""

    num_local_experts: int
    sliding_window: int | None
    """Tokens a query sees, its own included; None is full attention."""

    def to_json(self) -> dict[str, int | None]:
        return {"num_local_experts": self.num_local_experts, "sliding_window": self.sliding_window}


@dataclass(frozen=True, kw_only=True)
class PuzzleArchitecture:
    """The dimensions of a gpt-oss model and its per-layer blocks. Raises ArchitectureError when they are impossible."""

    blocks: tuple[BlockConfig, ...]
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    experts_per_token: int
    max_position_embeddings: int
    rope: RopeConfig
    rms_norm_eps: float = 1e-5
    swiglu_limit: float = 7.0
    attention_bias: bool = True
    tie_word_embeddings: bool = False
    experts_format: ExpertsFormat = "mxfp4"

    def __post_init__(self) -> None:
        _validate(self)

    # -- reading -----------------------------------------------------------------------------------------------------

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, source: str | Path = "config.json") -> PuzzleArchitecture:
        """Read a Hugging Face config. `source` names the file in errors."""
        family_of(config, source)
        alpha = positive_number(config, "swiglu_alpha", source, default=SWIGLU_ALPHA)
        if alpha != SWIGLU_ALPHA:
            raise ArchitectureError(
                "is built into every runtime", file=source, key="swiglu_alpha", found=alpha, expected=SWIGLU_ALPHA
            )
        try:
            architecture = cls(
                blocks=read_block_configs(config, source),
                hidden_size=positive_integer(config, "hidden_size", source),
                intermediate_size=positive_integer(config, "intermediate_size", source),
                num_attention_heads=positive_integer(config, "num_attention_heads", source),
                num_key_value_heads=positive_integer(config, "num_key_value_heads", source),
                head_dim=positive_integer(config, "head_dim", source),
                vocab_size=positive_integer(config, "vocab_size", source),
                experts_per_token=positive_integer(config, _top_k_key(config), source),
                max_position_embeddings=positive_integer(config, "max_position_embeddings", source),
                rope=RopeConfig.from_config(config, source=source),
                rms_norm_eps=positive_number(config, "rms_norm_eps", source, default=1e-5),
                swiglu_limit=positive_number(config, "swiglu_limit", source, default=7.0),
                attention_bias=boolean(config, "attention_bias", source, default=True),
                tie_word_embeddings=boolean(config, "tie_word_embeddings", source, default=False),
                experts_format=_read_experts_format(config, source),
            )
        except ArchitectureError as error:
            if str(source) in str(error):
                raise
            raise ArchitectureError(str(error), file=source) from None
        _check_top_k(config, architecture.experts_per_token, source)
        return architecture

    @classmethod
    def from_path(cls, path: str | Path) -> PuzzleArchitecture:
        """Read `path`, a config.json or a folder that holds one."""
        file = Path(path)
        file = file / "config.json" if file.is_dir() else file
        return cls.from_config(read_json_object(file, ArchitectureError), source=file)

    # -- writing -----------------------------------------------------------------------------------------------------

    def with_blocks(self, blocks: Sequence[BlockConfig]) -> PuzzleArchitecture:
        """The same dimensions with other blocks (the child of this parent)."""
        return replace(self, blocks=tuple(blocks))

    def child_config(self, parent_config: Mapping[str, Any]) -> dict[str, Any]:
        """The config.json of a `gpt_oss_puzzle` child with these blocks, everything else as in the parent's."""
        config = {key: value for key, value in parent_config.items() if key != "per_layer_config"}
        config.update(
            architectures=[GPT_OSS_PUZZLE.causal_lm],
            model_type=GPT_OSS_PUZZLE.model_type,
            block_configs=[block.to_json() for block in self.blocks],
            layer_types=self.layer_types,
            num_experts_per_tok=self.experts_per_token,
            num_hidden_layers=self.num_layers,
            num_local_experts=max(block.num_local_experts for block in self.blocks),
            sliding_window=min((w for w in self.windows if w is not None), default=None),
        )
        return config

    # -- derived values ----------------------------------------------------------------------------------------------

    @property
    def num_layers(self) -> int:
        return len(self.blocks)

    @property
    def layer_types(self) -> list[str]:
        """Hugging Face's name for each layer's attention."""
        return ["full_attention" if b.sliding_window is None else "sliding_attention" for b in self.blocks]

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Distinct windows, ascending, full attention (None) last."""
        distinct = {block.sliding_window for block in self.blocks}
        return (*sorted(w for w in distinct if w is not None), *((None,) if None in distinct else ()))

    @property
    def is_heterogeneous(self) -> bool:
        """True when no plain gpt-oss config can say this: expert counts differ, or windows of two sizes."""
        counts = {block.num_local_experts for block in self.blocks}
        return len(counts) > 1 or len([w for w in self.windows if w is not None]) > 1

    def kv_bytes_per_token_and_layer(self, kv_dtype: KvDtype) -> int:
        """Bytes of K and V for one token in one layer."""
        return 2 * self.num_key_value_heads * self.head_dim * KV_BYTES_PER_VALUE[kv_dtype]

    def kv_bytes_per_token(self, kv_dtype: KvDtype = "bf16") -> int:
        """Bytes of K and V for one token in all layers, before any window has filled."""
        return self.num_layers * self.kv_bytes_per_token_and_layer(kv_dtype)

    def kv_bytes_per_sequence(self, num_tokens: int, kv_dtype: KvDtype = "bf16") -> int:
        """Bytes that a sequence of `num_tokens` keeps: a window layer keeps its window, without block rounding."""
        kept = sum(min(block.sliding_window or num_tokens, num_tokens) for block in self.blocks)
        return kept * self.kv_bytes_per_token_and_layer(kv_dtype)


def read_blocks(path: str | Path, parent: PuzzleArchitecture) -> tuple[BlockConfig, ...]:
    """Read a child architecture file: `{"block_configs": [...]}` or a whole config.json, and hold it to its parent.

    Raises ArchitectureError naming the layer when the layer count, an expert count (0, above the parent's, below top-k)
    or a window cannot be the child's, and naming the key for the whole config of a model of other dimensions.
    """
    file = Path(path)
    config = read_json_object(file, ArchitectureError)
    if "block_configs" not in config and "model_type" not in config:
        raise ArchitectureError("no such key", file=file, key="block_configs", expected="one entry a layer")
    for key in _INHERITED:
        found, expected = config.get(key), getattr(parent, key)
        if found not in (None, expected):
            found = json.dumps(found, default=str)
            raise ArchitectureError("is not the parent's", file=file, key=key, found=found, expected=expected)
    blocks = read_block_configs(config, file)
    if len(blocks) != parent.num_layers:
        raise ArchitectureError(
            "wrong number of layers", file=file, key="block_configs", found=len(blocks), expected=parent.num_layers
        )
    for layer, (block, parents) in enumerate(zip(blocks, parent.blocks, strict=True)):
        key = f"block_configs[{layer}]"
        if not parent.experts_per_token <= block.num_local_experts <= parents.num_local_experts:
            raise ArchitectureError(
                "impossible expert count",
                file=file,
                key=f"{key}.num_local_experts",
                found=block.num_local_experts,
                expected=f"{parent.experts_per_token} (top-k) to {parents.num_local_experts} (the parent's)",
            )
    return blocks


def read_block_configs(config: Mapping[str, Any], source: str | Path) -> tuple[BlockConfig, ...]:
    """The per-layer part of a config alone, in any of the forms above. Raises ArchitectureError."""
    if config.get("block_configs") is not None:
        entries = config["block_configs"]
        if not isinstance(entries, list) or not entries:
            raise ArchitectureError("must be a list with one entry a layer", file=source, key="block_configs")
        if len(entries) > MAX_LAYERS:
            found, expected = f"{len(entries)} entries", f"at most {MAX_LAYERS}"
            raise ArchitectureError("too many layers", file=source, key="block_configs", found=found, expected=expected)
        blocks = tuple(_read_entry(entry, f"block_configs[{i}]", source) for i, entry in enumerate(entries))
        num_layers = config.get("num_hidden_layers", len(blocks))
        if num_layers != len(blocks):
            raise ArchitectureError(
                "disagrees with num_hidden_layers",
                file=source,
                key="block_configs",
                found=f"{len(blocks)} entries",
                expected=num_layers,
            )
        return blocks
    overrides = {str(layer): own for layer, own in section(config, "per_layer_config", source).items()}
    return tuple(
        _read_block(
            {
                "num_local_experts": config.get("num_local_experts"),
                **_shared_window(config, layer_type),
                **section(overrides, str(layer), source, prefix="per_layer_config."),
            },
            f"layer {layer}",
            source,
        )
        for layer, layer_type in enumerate(_read_layer_types(config, source))
    )


def _shared_window(config: Mapping[str, Any], layer_type: str) -> dict[str, Any]:
    """The window of all sliding layers; nothing where there is none, which must not pass for full attention."""
    if layer_type == "full_attention":
        return {"sliding_window": None}
    window = config.get("sliding_window")
    return {} if window is None else {"sliding_window": window}


def _read_layer_types(config: Mapping[str, Any], source: str | Path) -> list[str]:
    """The attention of each layer; windows on the even ones where nothing is said."""
    num_layers = positive_integer(config, "num_hidden_layers", source, most=MAX_LAYERS)
    found = config.get("layer_types")
    if found is None:
        return [_LAYER_TYPES[i % 2] for i in range(num_layers)]
    layer_types = found if isinstance(found, list) else [found]
    for layer_type in layer_types:
        if layer_type not in _LAYER_TYPES:
            raise ArchitectureError(
                "unknown kind of attention",
                file=source,
                key="layer_types",
                found=json.dumps(layer_type, default=str),
                expected=" or ".join(_LAYER_TYPES),
            )
    if len(layer_types) != num_layers:
        raise ArchitectureError(
            "wrong number of layers", file=source, key="layer_types", found=len(layer_types), expected=num_layers
        )
    return layer_types


def _read_entry(entry: Any, key: str, source: str | Path) -> BlockConfig:
    """One entry of block_configs: flat with exactly its two keys (a misspelt window would be none), or nested."""
    if not isinstance(entry, Mapping):
        raise ArchitectureError("must be an object", file=source, key=key, found=type(entry).__name__)
    if "ffn" in entry or "attention" in entry:
        ffn, attention = (section(entry, name, source, prefix=f"{key}.") for name in ("ffn", "attention"))
        moe = section(ffn, "moe", source, prefix=f"{key}.ffn.")
        nested = {
            "num_local_experts": moe.get("num_local_experts"),
            "sliding_window": attention.get("sliding_window"),
        }
        return _read_block(nested, key, source)
    names = [field.name for field in fields(BlockConfig)]
    for name in entry:
        if name not in names:
            raise ArchitectureError("unknown key", file=source, key=f"{key}.{name}", expected=" and ".join(names))
    for name in names:
        if name not in entry:
            raise ArchitectureError("missing key", file=source, key=f"{key}.{name}")
    return _read_block(entry, key, source)


def _read_block(values: Mapping[str, Any], key: str, source: str | Path) -> BlockConfig:
    if "sliding_window" not in values:
        raise ArchitectureError(
            "slides, and no window is given", file=source, key=f"{key}.sliding_window", expected="a positive integer"
        )
    experts, window = values["num_local_experts"], values["sliding_window"]
    for name, value, optional in (("num_local_experts", experts, False), ("sliding_window", window, True)):
        if not (optional and value is None) and (isinstance(value, bool) or not isinstance(value, int)):
            expected = "an integer or null" if optional else "an integer"
            raise ArchitectureError(
                "wrong type", file=source, key=f"{key}.{name}", found=json.dumps(value, default=str), expected=expected
            )
    _check_window(window, f"{key}.sliding_window", file=source)
    return BlockConfig(num_local_experts=experts, sliding_window=window)


def _check_window(window: int | None, key: str, *, file: str | Path | None = None) -> None:
    if window is not None and not 1 <= window <= MAX_INTEGER:
        expected = f"null or 1 to {MAX_INTEGER} tokens"
        raise ArchitectureError("impossible window", file=file, key=key, found=window, expected=expected)


def _read_experts_format(config: Mapping[str, Any], source: str | Path) -> ExpertsFormat:
    """BF16 where nothing is said, and for ModelOpt: it writes KV scales beside them, and what else it may have
    quantized shows in the tensors."""
    method = section(config, "quantization_config", source).get("quant_method")
    if method not in (None, "mxfp4", "modelopt"):
        raise ArchitectureError(
            "unknown kind",
            file=source,
            key="quantization_config.quant_method",
            found=json.dumps(method, default=str),
            expected="mxfp4, or no quantization_config (BF16)",
        )
    return "mxfp4" if method == "mxfp4" else "bf16"


def _top_k_key(config: Mapping[str, Any]) -> str:
    return "num_experts_per_tok" if "num_experts_per_tok" in config else "experts_per_token"


def _check_top_k(config: Mapping[str, Any], top_k: int, source: str | Path) -> None:
    """Released configs say it under both names, and readers differ in which one they ask."""
    older = config.get("experts_per_token")
    if older not in (None, top_k):
        raise ArchitectureError(
            "disagrees with num_experts_per_tok",
            file=source,
            key="experts_per_token",
            found=json.dumps(older, default=str),
            expected=top_k,
        )


def _validate(a: PuzzleArchitecture) -> None:
    if not a.blocks:
        raise ArchitectureError("no layers", key="block_configs")
    if a.num_attention_heads % a.num_key_value_heads:
        raise ArchitectureError(
            "must divide num_attention_heads",
            key="num_key_value_heads",
            found=a.num_key_value_heads,
            expected=f"a divisor of {a.num_attention_heads}",
        )
    if a.head_dim % 2:
        raise ArchitectureError("must be even (rotary pairs)", key="head_dim", found=a.head_dim)
    if a.experts_format == "mxfp4":
        for key in ("hidden_size", "intermediate_size"):
            if getattr(a, key) % 32:
                raise ArchitectureError("MXFP4 needs a multiple of 32", key=key, found=getattr(a, key))
    for layer, block in enumerate(a.blocks):
        if block.num_local_experts < a.experts_per_token:
            raise ArchitectureError(
                "fewer experts than the router picks",
                key=f"block_configs[{layer}].num_local_experts",
                found=block.num_local_experts,
                expected=f"at least {a.experts_per_token}",
            )
        if block.num_local_experts > MAX_INTEGER:
            raise ArchitectureError(
                "too large",
                key=f"block_configs[{layer}].num_local_experts",
                found=block.num_local_experts,
                expected=f"at most {MAX_INTEGER}",
            )
        _check_window(block.sliding_window, f"block_configs[{layer}].sliding_window")
