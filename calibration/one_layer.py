"""One decoder layer of a checkpoint as a model of its own.

A stack of n layers is n stacks of one layer, each fed with what the one before gave. So layer i is built as a whole
transformers model with a config of one layer: masks, rotary embedding and layer are the code that the full model runs,
operation for operation, and ModelOpt finds in it what it finds in the full model. Embedding, final norm and output head
are left out; it takes hidden states and gives hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm, GptOssRotaryEmbedding

from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.models.huggingface.loading import experts_EIO, model_config
from puzzle_trtllm.models.huggingface.modeling_gpt_oss_puzzle import GptOssPuzzleForCausalLM
from puzzle_trtllm.tensors import kv_scale_of


def load_layer(source: Checkpoint, layer: int, *, dtype: torch.dtype, device: torch.device | None = None) -> Any:
    """Layer `layer` alone on `device` (the CPU), as `model.model.layers[0]`, every parameter in `dtype`, to evaluate.

    Call `model.model(inputs_embeds=..., use_cache=False)` with the layer's input; `last_hidden_state` is its output.
    Experts are dequantized here and freed with the model.
    """
    config = model_config(replace(source, config=_one_layer_config(source, layer)))
    config.dtype = dtype
    config._attn_implementation = "eager"
    with torch.device("meta"):
        model: Any = GptOssPuzzleForCausalLM(config)  # a parent's too: with equal layers it is gpt-oss
    model.model.rotary_emb = GptOssRotaryEmbedding(config=config)  # computed, not loaded; the one on meta has no values
    model.model.embed_tokens = model.model.norm = model.lm_head = nn.Identity()
    parameters = dict(_parameters(source, f"model.layers.{layer}.", dtype))
    model.model.layers[0].load_state_dict(parameters, strict=True, assign=True)
    return model.to(device).eval()


def embed(source: Checkpoint, ids_BT: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    """Token embeddings `[B, T, D]`; only the rows in question are read."""
    rows = torch.from_numpy(source.numpy("model.embed_tokens.weight")[ids_BT.numpy()])
    return rows.view(torch.bfloat16).to(dtype)


def output_head(
    source: Checkpoint, *, dtype: torch.dtype, device: torch.device | None = None
) -> tuple[Any, torch.Tensor]:
    """(final norm, output head `[V, D]`), as the whole model has them."""
    a = source.architecture
    norm = GptOssRMSNorm(a.hidden_size, eps=a.rms_norm_eps)
    norm.load_state_dict({"weight": source.torch("model.norm.weight").to(dtype)}, assign=True)
    name = "model.embed_tokens.weight" if a.tie_word_embeddings else "lm_head.weight"
    return norm.to(device), source.torch(name).to(device, dtype)


def _one_layer_config(source: Checkpoint, layer: int) -> dict[str, Any]:
    block = source.architecture.blocks[layer]
    return {**source.config, "num_hidden_layers": 1, "block_configs": [block.to_json()]}


def _parameters(source: Checkpoint, prefix: str, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    for name in source.tensors:
        if not name.startswith(prefix) or kv_scale_of(name) is not None or name.endswith("_scales"):
            continue
        own = name.removeprefix(prefix).removesuffix("_blocks")
        if name.endswith("_blocks"):
            yield own, experts_EIO(source, name.removesuffix("_blocks"), dtype)
        else:
            yield own, source.torch(name).to(dtype)
