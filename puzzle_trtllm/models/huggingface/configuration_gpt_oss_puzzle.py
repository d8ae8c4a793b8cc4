"""The config of a Puzzle child for transformers: a gpt-oss config plus `block_configs`, one entry a layer.

`block_configs[i]` is `{"num_local_experts": n, "sliding_window": w | null}`; a window w counts the query's own token
and null is full attention. What plain gpt-oss says once for all layers (`num_local_experts`, `sliding_window`,
`layer_types`) is derived from it and only a summary: the largest count and the smallest window.

This file is also shipped inside child checkpoints as remote code, so it imports nothing but transformers, and it keeps
to what transformers 4.57 and 5 have in common. The trap there is the rotary block: 4.x calls it `rope_scaling` with
`rope_theta` beside it, 5.x `rope_parameters` with the theta inside, and both warn about or refuse some spellings of a
number. It is brought to one form, the older one, which both read.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig

_ROPE_FLOATS = ("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")


class GptOssPuzzleConfig(GptOssConfig):  # type: ignore[misc]
    """Config of a `gpt_oss_puzzle` model. Without `block_configs` it describes the same model as GptOssConfig."""

    model_type = "gpt_oss_puzzle"

    def __init__(self, block_configs: Sequence[Mapping[str, Any]] | None = None, **kwargs: Any) -> None:
        """Raises ValueError when `block_configs` disagrees with `num_hidden_layers` or lacks an expert count."""
        overrides = kwargs.pop("per_layer_config", None)  # block_configs is the one source; see the property below
        if overrides and block_configs is None:
            raise ValueError("the layers of a gpt_oss_puzzle model are its block_configs, found per_layer_config alone")
        blocks = None if block_configs is None else [_flat_block(block) for block in block_configs]
        if blocks is not None:
            kwargs.update(_summary(blocks, kwargs.get("num_hidden_layers", len(blocks))))
        if "experts_per_token" in kwargs:  # an older name, which gpt-oss's own config does not read
            kwargs.setdefault("num_experts_per_tok", kwargs["experts_per_token"])
        if (kwargs.get("quantization_config") or {}).get("quant_method") == "mxfp4":
            # transformers' MXFP4 kernels give every layer the same number of experts: always dequantize
            kwargs["quantization_config"] = {**kwargs["quantization_config"], "dequantize": True}
        super().__init__(**with_plain_rope(kwargs))
        self.block_configs = blocks if blocks is not None else self._equal_blocks()

    def _equal_blocks(self) -> list[dict[str, int | None]]:
        return [
            {
                "num_local_experts": self.num_local_experts,
                "sliding_window": self.sliding_window if layer_type == "sliding_attention" else None,
            }
            for layer_type in self.layer_types
        ]

    @property
    def windows(self) -> list[int | None]:
        """The window of each layer."""
        return [block["sliding_window"] for block in self.block_configs]

    def layer_config(self, layer_idx: int) -> GptOssPuzzleConfig:
        """This config as layer `layer_idx` sees it: its own expert count and window where gpt-oss looks for them."""
        layer = copy.copy(self)
        layer.num_local_experts = self.block_configs[layer_idx]["num_local_experts"]
        layer.sliding_window = self.block_configs[layer_idx]["sliding_window"]
        return layer

    @property
    def per_layer_config(self) -> list[GptOssPuzzleConfig]:
        """What recent transformers asks when it builds a cache layer by layer (5.23 does, 5.17 not yet)."""
        return [self.layer_config(i) for i in range(self.num_hidden_layers)]


def _flat_block(block: Mapping[str, Any]) -> dict[str, int | None]:
    """One entry in the released form; ModelOpt's nested form (`attention`, `ffn.moe`) is flattened."""
    if "ffn" in block:
        block = {**(block.get("attention") or {}), **((block["ffn"] or {}).get("moe") or {})}
    if not isinstance(block.get("num_local_experts"), int):
        raise ValueError(f"block_configs: every entry needs an integer num_local_experts, found {dict(block)}")
    return {"num_local_experts": block["num_local_experts"], "sliding_window": block.get("sliding_window")}


def _summary(blocks: list[dict[str, int | None]], num_hidden_layers: int) -> dict[str, Any]:
    """The keys that plain gpt-oss has for all layers at once."""
    if len(blocks) != num_hidden_layers:
        raise ValueError(f"block_configs has {len(blocks)} entries, num_hidden_layers is {num_hidden_layers}")
    windows = [block["sliding_window"] for block in blocks]
    return {
        "num_hidden_layers": num_hidden_layers,
        "num_local_experts": max(block["num_local_experts"] or 0 for block in blocks),
        "sliding_window": min((w for w in windows if w is not None), default=None),
        "layer_types": ["full_attention" if w is None else "sliding_attention" for w in windows],
    }


def with_plain_rope(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """`kwargs` with the rotary block as `rope_scaling` and `rope_theta`, its numbers floats.

    A block of null is none; without any, gpt-oss's own default holds (transformers 4 and 5 read null differently).
    A YaRN block that lacks `original_max_position_embeddings` takes the config's `initial_context_length`, as the
    original implementation does (transformers 5 would take `max_position_embeddings`, which is already extended).
    """
    result = dict(kwargs)
    given = [result.pop(key) for key in ("rope_scaling", "rope_parameters") if key in result]
    if not given:
        return result
    block = dict(next(filter(None, given), {}))
    block["rope_type"] = block.pop("type", None) or block.get("rope_type", "default")
    block.update({key: float(block[key]) for key in _ROPE_FLOATS if block.get(key) is not None})
    result["rope_theta"] = float(block.pop("rope_theta", None) or result.get("rope_theta") or 150000.0)
    if block["rope_type"] == "yarn":
        block.setdefault("original_max_position_embeddings", result.get("initial_context_length", 4096))
    result["rope_scaling"] = block
    return result
