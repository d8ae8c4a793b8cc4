"""Checkpoints to transformers models on the CPU, exactly.

Two ways. `load_child` is transformers' own: `AutoModelForCausalLM.from_pretrained` after our classes are registered.
`load_causal_lm` reads parent and child from the checkpoint's bytes with `puzzle_trtllm.mxfp4`: no quantizer, no device
map, no kernel download, the same values. MXFP4 values are exact in bfloat16 and in float32, so dequantizing rounds
nothing in either. transformers multiplies by the transposed experts: `gate_up_proj` [E, D, 2F], `down_proj` [E, F, D],
where the packed bytes are [E, 2F, D/32, 16] and [E, D, F/32, 16].
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.families import GPT_OSS, GPT_OSS_PUZZLE
from puzzle_trtllm.models.huggingface.configuration_gpt_oss_puzzle import GptOssPuzzleConfig, with_plain_rope
from puzzle_trtllm.models.huggingface.modeling_gpt_oss_puzzle import GptOssPuzzleForCausalLM
from puzzle_trtllm.mxfp4 import dequantize
from puzzle_trtllm.tensors import kv_scale_of

_NOT_FOR_THE_MODEL = ("model_type", "quantization_config", "auto_map", "transformers_version", "per_layer_config")


def register() -> None:
    """Make the Auto classes know the child; calling it again changes nothing."""
    AutoConfig.register(GPT_OSS_PUZZLE.model_type, GptOssPuzzleConfig, exist_ok=True)
    AutoModelForCausalLM.register(GptOssPuzzleConfig, GptOssPuzzleForCausalLM, exist_ok=True)


def load_child(folder: str | Path, *, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    """Load a child as transformers does; `options` go to `from_pretrained`.

    transformers up to 5.17 leaves dequantized experts in bfloat16 whatever `dtype` says; the cast mends that, exactly.
    """
    register()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    for parameter in model.parameters():  # not model.to(dtype), which would round the rotary frequencies too
        parameter.data = parameter.data.to(dtype)
    return model


def load_causal_lm(checkpoint: Checkpoint | str | Path, *, dtype: torch.dtype = torch.float32) -> GptOssForCausalLM:
    """Load a parent or a child on the CPU, in evaluation mode, every parameter in `dtype`.

    Raises CheckpointError or ArchitectureError when the folder is damaged or its tensors do not fit its config.
    """
    source = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint.open(checkpoint)
    source.validate()
    config = model_config(source)
    config.dtype = dtype
    config._attn_implementation = "eager"
    model_class = GptOssPuzzleForCausalLM if isinstance(config, GptOssPuzzleConfig) else GptOssForCausalLM
    with torch.device("meta"):
        model = model_class(config)
    model.model.rotary_emb = GptOssRotaryEmbedding(config=config)  # computed, not loaded; the one on meta has no values
    model.load_state_dict(dict(_parameters(source, dtype)), strict=not config.tie_word_embeddings, assign=True)
    model.tie_weights()
    return model.eval()


def model_config(checkpoint: Checkpoint) -> GptOssConfig:
    """The transformers config of a checkpoint, without its storage format (which transformers would act on).

    Copied through and through: transformers rewrites nested blocks (the rotary one) in place. What may be written in
    more than one way is as `checkpoint.architecture` reads it.
    """
    a = checkpoint.architecture
    values = {k: copy.deepcopy(v) for k, v in checkpoint.config.items() if k not in _NOT_FOR_THE_MODEL}
    values.update(num_experts_per_tok=a.experts_per_token, rms_norm_eps=a.rms_norm_eps, swiglu_limit=a.swiglu_limit)
    is_plain = checkpoint.config.get("model_type") == GPT_OSS.model_type
    if is_plain and not any(checkpoint.config.get(key) for key in ("block_configs", "per_layer_config")):
        return GptOssConfig(**with_plain_rope(values))
    return GptOssPuzzleConfig(**{**values, "block_configs": [block.to_json() for block in a.blocks]})


def _parameters(source: Checkpoint, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    for name in source.tensors:
        if kv_scale_of(name) is not None or name.endswith("_scales"):
            continue  # KV scales are no parameters of this model; expert scales go with their blocks
        if name.endswith("_blocks"):
            yield name.removesuffix("_blocks"), experts_EIO(source, name.removesuffix("_blocks"), dtype)
        else:
            yield name, source.torch(name).to(dtype)


def experts_EIO(source: Checkpoint, name: str, dtype: torch.dtype) -> torch.Tensor:  # noqa: N802
    """One packed expert tensor, dequantized and transposed to [experts, in, out] as transformers multiplies it."""
    blocks, scales = source.numpy(f"{name}_blocks"), source.numpy(f"{name}_scales")
    result = torch.empty(blocks.shape[0], scales.shape[2] * 32, blocks.shape[1], dtype=dtype)
    for expert in range(blocks.shape[0]):  # one at a time: float32 in between would be twice the layer
        result[expert] = torch.from_numpy(dequantize(blocks[expert], scales[expert])).T
    return result
