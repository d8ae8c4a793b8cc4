"""The Puzzle child for transformers: gpt-oss whose layers differ in expert count and attention window.

Everything is gpt-oss's own code except three things. Each decoder layer is built from its own view of the config. The
model makes one attention mask per distinct window (not per layer, not per layer type) and hands all of them to every
layer, which picks its own. And the KV cache keeps, for each layer, that layer's window. When all layers are equal the
arithmetic is gpt-oss's, operation for operation.

This file is also shipped inside child checkpoints as remote code, so it imports nothing but torch, transformers and
its own config, and keeps to what transformers 4.57 and 5 have in common.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.gpt_oss.modeling_gpt_oss import (
    GptOssDecoderLayer,
    GptOssForCausalLM,
    GptOssModel,
    GptOssPreTrainedModel,
    GptOssRMSNorm,
    GptOssRotaryEmbedding,
    load_balancing_loss_func,
)

from .configuration_gpt_oss_puzzle import GptOssPuzzleConfig

Masks = dict[int | None, torch.Tensor | None]
"""One attention mask per distinct window; None is full attention."""


class GptOssPuzzleDecoderLayer(GptOssDecoderLayer):  # type: ignore[misc]
    """A gpt-oss layer with its own expert count and window."""

    def __init__(self, config: GptOssPuzzleConfig, layer_idx: int) -> None:
        super().__init__(config.layer_config(layer_idx), layer_idx)
        self.window = config.windows[layer_idx]
        for module in self.modules():
            if hasattr(module, "config"):
                module.config = config  # sizes are set; from here on all layers follow the model's one config

    def forward(self, hidden_states: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        if isinstance(attention_mask, dict):
            attention_mask = attention_mask[self.window]
        return super().forward(hidden_states, attention_mask=attention_mask, **kwargs)


class GptOssPuzzlePreTrainedModel(GptOssPreTrainedModel):  # type: ignore[misc]
    config: GptOssPuzzleConfig
    config_class = GptOssPuzzleConfig
    _no_split_modules = ["GptOssPuzzleDecoderLayer"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"self_attn\.([qkv]_proj\.)?[qkv]_scale$"]  # noqa: RUF012 - for FP8 KV caches

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As PreTrainedModel. Experts that were dequantized stay so: transformers 5 would save them under the names of
        packed ones (gpt-oss's too), not find them again, and go on with random ones.
        """
        self._weight_conversions = None
        return super().save_pretrained(*args, **kwargs)

    # transformers reads a model's source file to learn what can be set; the code that answers is in gpt-oss's.
    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return bool(GptOssPreTrainedModel._can_set_experts_implementation())

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return bool(GptOssPreTrainedModel._can_set_attn_implementation())


class GptOssPuzzleModel(GptOssPuzzlePreTrainedModel, GptOssModel):  # type: ignore[misc]
    """The decoder stack, without the output head."""

    def __init__(self, config: GptOssPuzzleConfig) -> None:
        GptOssPreTrainedModel.__init__(self, config)  # not GptOssModel's, which would build equal layers first
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(GptOssPuzzleDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = GptOssRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = GptOssRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As GptOssModel; `attention_mask` may also be a ready-made dict of masks by window."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = puzzle_cache(self.config)
        if past_key_values is not None:
            _check_cache(self.config, past_key_values)
        if kwargs.pop("collect_router_logits", False):
            kwargs["output_router_logits"] = True
        masks = attention_mask
        if not isinstance(attention_mask, dict):
            masks = window_masks(self.config, inputs_embeds, attention_mask, past_key_values)
        return super().forward(
            attention_mask={"full_attention": masks, "sliding_attention": masks},
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )


class GptOssPuzzleForCausalLM(GptOssPuzzlePreTrainedModel, GptOssForCausalLM):  # type: ignore[misc]
    """A Puzzle child of gpt-oss with its output head."""

    def __init__(self, config: GptOssPuzzleConfig) -> None:
        GptOssPreTrainedModel.__init__(self, config)
        self.model = GptOssPuzzleModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.router_aux_loss_coef = config.router_aux_loss_coef
        self.num_experts = config.num_local_experts
        self.num_experts_per_tok = config.num_experts_per_tok
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """As GptOssForCausalLM; the load-balancing loss is `balancing_loss`.

        Every parameter of GptOssForCausalLM is named: `generate` computes the prompt's last logits alone and positions
        without the padding, and Trainer keeps a column, only where the signature says so.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        kwargs.update(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
        )
        counts = {block["num_local_experts"] for block in self.config.block_configs}
        if not output_router_logits or len(counts) == 1:
            return super().forward(output_router_logits=output_router_logits, **kwargs)
        as_tuple = kwargs.pop("return_dict", None) is False
        # Told not to, gpt-oss computes no balancing loss, which it could not over layers of several sizes.
        output = super().forward(output_router_logits=False, collect_router_logits=True, **kwargs)
        output.aux_loss = balancing_loss(output.router_logits, self.num_experts_per_tok, attention_mask)
        if output.loss is not None:
            output.loss = output.loss + self.router_aux_loss_coef * output.aux_loss.to(output.loss.device)
        return output.to_tuple() if as_tuple else output

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> None:
        """Give `generate` the cache of this architecture. ValueError for kinds that do not know windows by layer."""
        given = model_kwargs.get("past_key_values")
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        cache = model_kwargs.get("past_key_values")
        # One that has no layers yet keeps all tokens: transformers 4 takes it where assisted decoding must go back.
        if isinstance(cache, DynamicCache) and cache is not given and cache.layers:
            goes_back = any(getattr(layer, "record_past", False) for layer in cache.layers)
            cache.layers = puzzle_cache(self.config).layers
            if goes_back:
                cache.activate_past_recording()

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: `generate_batch` pages its cache by one window for all layers, and would answer with nothing."""
        raise ValueError("continuous batching cannot hold a window per layer: use generate")

    @staticmethod
    def create_masks_for_generate(
        config: GptOssPuzzleConfig, attention_mask: torch.Tensor | None, past_key_values: Cache | None, **kwargs: Any
    ) -> Masks:
        """What `generate` makes ahead of `forward` where the cache has a fixed size."""
        embeds = kwargs["inputs_embeds"] if "inputs_embeds" in kwargs else kwargs["input_embeds"]
        return window_masks(config, embeds, attention_mask, past_key_values)


def balancing_loss(router_logits: Any, top_k: int, attention_mask: Any) -> torch.Tensor:
    """gpt-oss's load-balancing loss over the layers of each expert count, and its mean over all layers."""
    by_count: dict[int, list[torch.Tensor]] = {}
    for logits in router_logits:
        by_count.setdefault(logits.shape[-1], []).append(logits)
    mask = None if isinstance(attention_mask, dict) else attention_mask
    losses = [len(layers) * load_balancing_loss_func(tuple(layers), n, top_k, mask) for n, layers in by_count.items()]
    total: torch.Tensor = sum(losses) / len(router_logits)
    return total


def puzzle_cache(config: GptOssPuzzleConfig) -> DynamicCache:
    """An empty KV cache that keeps, for each layer, what its window still needs."""
    cache = DynamicCache()
    cache.layers = [
        DynamicLayer() if window is None else DynamicSlidingWindowLayer(sliding_window=_kept(window))
        for window in config.windows
    ]
    return cache


def _kept(window: int) -> int:
    """What a growing layer is told to keep. A window of one token keeps two: transformers' layer stores the last w - 1
    keys, and its slice `[-0:]` would keep all of them while announcing none.
    """
    return max(window, 2)


def window_masks(
    config: GptOssPuzzleConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
) -> Masks:
    """One mask per distinct window, in whatever form the attention implementation takes.

    `inputs_embeds` [B, T, D] of the new tokens; `attention_mask` [B, past + T], 0 where padded. A mask is as wide as
    what its layers' cache will return, so it is sized against a view of the cache that holds one such layer.
    """
    masks: Masks = {}
    for layer_idx, window in enumerate(config.windows):
        if window in masks:
            continue
        make = create_causal_mask if window is None else create_sliding_window_causal_mask
        arguments = {
            "config": config.layer_config(layer_idx),
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "past_key_values": _one_layer(past_key_values, layer_idx),
        }
        masks[window] = make(**_for_this_transformers(make, arguments, past_key_values))
    return masks


def _one_layer(cache: Cache | None, layer_idx: int) -> Cache | None:
    if cache is None or layer_idx >= len(cache.layers):
        return None
    return Cache(layers=[cache.layers[layer_idx]])


def _for_this_transformers(make: Any, arguments: dict[str, Any], cache: Cache | None) -> dict[str, Any]:
    """Rename and add what transformers before 5.0 wants: `input_embeds`, and the positions of the new tokens."""
    parameters = inspect.signature(make).parameters
    if "input_embeds" in parameters:
        embeds = arguments["input_embeds"] = arguments.pop("inputs_embeds")
        seen = cache.get_seq_length() if cache is not None else 0
        arguments["cache_position"] = torch.arange(embeds.shape[1], device=embeds.device) + seen
    return arguments


def _check_cache(config: GptOssPuzzleConfig, cache: Cache) -> None:
    """Refuse a cache that forgets what a layer must still see (one built for a single window, say)."""
    sizes = [layer.max_cache_len for layer in cache.layers if hasattr(layer, "max_cache_len")]  # of a fixed-size cache
    for layer_idx, (window, layer) in enumerate(zip(config.windows, cache.layers, strict=False)):
        kept, needed = getattr(layer, "sliding_window", None), window and _kept(window)
        if kept is None and sizes and getattr(layer, "is_sliding", False):
            kept, needed = layer.max_cache_len, min(window or max(sizes), max(sizes))
        if kept is not None and (needed is None or kept < needed):
            raise ValueError(
                f"past_key_values keeps {kept} tokens in layer {layer_idx}, whose window is {window or 'unlimited'}: "
                "build it with puzzle_cache(config)"
            )
