"""Tiny random gpt-oss checkpoints in the released format, complete enough for every stage.

A toy has what a real folder has: MXFP4 experts (or BF16), attention sinks, YaRN rotary embedding, a tokenizer with a
chat template that knows the reasoning effort, a generation config, experts in shards of their own. Its weights are
scaled so that nothing is degenerate: attention and router are spread but not uniform, logits have a standard deviation
of about 2, so that a wrong mask, a swapped expert or a dropped bias changes the result by far more than rounding.
"""

from __future__ import annotations

import json
import math
import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from puzzle_trtllm import mxfp4
from puzzle_trtllm.architecture import BlockConfig, ExpertsFormat, PuzzleArchitecture
from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.checkpoint_writer import MAX_SHARD_BYTES, PlannedTensor, tensor_of, write_shards
from puzzle_trtllm.rope import RopeConfig
from puzzle_trtllm.tensors import tensor_table

SPECIAL_TOKENS = ("<|endoftext|>", "<|return|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|unk|>")
CHARACTERS = string.ascii_letters + string.digits + " \n.,:;!?+-=*/()'\"_<>|{}[]#%"
TOKENS = (*SPECIAL_TOKENS, *CHARACTERS)
VOCAB_SIZE = len(TOKENS)
PAD_ID, RETURN_ID, UNK_ID = 0, 1, 6

CHAT_TEMPLATE = """\
{%- set effort = reasoning_effort if reasoning_effort is defined and reasoning_effort else "medium" -%}
{%- if effort not in ["low", "medium", "high"] -%}
{{- raise_exception("reasoning_effort must be low, medium or high, found " ~ effort) -}}
{%- endif -%}
<|start|>system<|message|>effort: {{ effort }}<|end|>
{%- for message in messages -%}
<|start|>{{ message.role }}<|message|>{{ message.content }}<|end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}
"""

Blocks = Sequence[tuple[int, "int | None"]]
"""(expert count, window) a layer; a window of None is full attention."""


def toy_architecture(
    blocks: Blocks,
    *,
    hidden_size: int = 64,
    intermediate_size: int = 32,
    num_attention_heads: int = 4,
    num_key_value_heads: int = 2,
    head_dim: int = 16,
    vocab_size: int = VOCAB_SIZE,
    experts_per_token: int = 2,
    max_position_embeddings: int = 512,
    experts_format: ExpertsFormat = "mxfp4",
    tie_word_embeddings: bool = False,
) -> PuzzleArchitecture:
    """An architecture with these blocks; YaRN stretches 64 positions by 8, so that short texts reach its blend."""
    return PuzzleArchitecture(
        blocks=tuple(BlockConfig(num_local_experts=experts, sliding_window=window) for experts, window in blocks),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=head_dim,
        vocab_size=vocab_size,
        experts_per_token=experts_per_token,
        max_position_embeddings=max_position_embeddings,
        rope=RopeConfig(
            theta=150000.0, rope_type="yarn", factor=8.0, original_max_position_embeddings=64, truncate=False
        ),
        experts_format=experts_format,
        tie_word_embeddings=tie_word_embeddings,
    )


def toy_config(architecture: PuzzleArchitecture) -> dict[str, object]:
    """config.json as published: gpt_oss where a plain config can say it, else gpt_oss_puzzle with block_configs."""
    a = architecture
    config: dict[str, object] = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": a.attention_bias,
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "eos_token_id": RETURN_ID,
        "experts_per_token": a.experts_per_token,
        "head_dim": a.head_dim,
        "hidden_act": "silu",
        "hidden_size": a.hidden_size,
        "initial_context_length": a.rope.original_max_position_embeddings,
        "initializer_range": 0.02,
        "intermediate_size": a.intermediate_size,
        "layer_types": a.layer_types,
        "max_position_embeddings": a.max_position_embeddings,
        "num_attention_heads": a.num_attention_heads,
        "num_experts_per_tok": a.experts_per_token,
        "num_hidden_layers": a.num_layers,
        "num_key_value_heads": a.num_key_value_heads,
        "num_local_experts": max(block.num_local_experts for block in a.blocks),
        "output_router_logits": False,
        "pad_token_id": PAD_ID,
        "rms_norm_eps": a.rms_norm_eps,
        "rope_scaling": {
            "beta_fast": a.rope.beta_fast,
            "beta_slow": a.rope.beta_slow,
            "factor": a.rope.factor,
            "original_max_position_embeddings": a.rope.original_max_position_embeddings,
            "rope_type": a.rope.rope_type,
            "truncate": a.rope.truncate,
        },
        "rope_theta": a.rope.theta,
        "router_aux_loss_coef": 0.9,
        "sliding_window": next((w for w in a.windows if w is not None), 128),
        "swiglu_limit": a.swiglu_limit,
        "tie_word_embeddings": a.tie_word_embeddings,
        "use_cache": True,
        "vocab_size": a.vocab_size,
    }
    if a.experts_format == "mxfp4":
        kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    return a.child_config(config) if a.is_heterogeneous else config


def write_toy_checkpoint(
    folder: Path,
    architecture: PuzzleArchitecture,
    *,
    seed: int = 0,
    kv_scales: Sequence[tuple[float, float]] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write a whole checkpoint folder. `kv_scales` adds ModelOpt's k_scale and v_scale, one pair a layer."""
    folder.mkdir(parents=True, exist_ok=True)
    planned = list(_random_tensors(architecture, np.random.default_rng(seed)))
    for layer, pair in enumerate(kv_scales or ()):
        for kind, scale in zip("kv", pair, strict=True):
            name = f"model.layers.{layer}.self_attn.{kind}_proj.{kind}_scale"
            planned.append(tensor_of(name, "F32", np.array(scale, dtype=np.float32)))
    write_shards(folder, planned, max_shard_bytes=max_shard_bytes)
    _write_json(folder / "config.json", toy_config(architecture))
    _write_json(folder / "generation_config.json", {"eos_token_id": [RETURN_ID], "pad_token_id": PAD_ID})
    if kv_scales is not None:
        quantization = {"quant_algo": None, "kv_cache_quant_algo": "FP8", "quantized_layers": {}}
        _write_json(folder / "hf_quant_config.json", {"producer": {"name": "toy"}, "quantization": quantization})
    write_toy_tokenizer(folder)
    return folder


def write_overrides_by_layer(folder: Path) -> None:
    """Say the same blocks as recent transformers keeps them: `per_layer_config`, under gpt-oss's own name."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    blocks = config.pop("block_configs")
    config.update(model_type="gpt_oss", per_layer_config={str(i): block for i, block in enumerate(blocks)})
    _write_json(folder / "config.json", config)


def change_values(checkpoint: Checkpoint, name: str, values: Mapping[int, float]) -> None:
    """Set elements (flat index: value) of a BF16 tensor in its file."""
    entry = checkpoint.entry(name)
    bits = checkpoint.numpy(name).copy().reshape(-1)
    indices = list(values)
    bits[indices] = bf16_bits(np.array([values[i] for i in indices]))
    with entry.file.open("r+b") as stream:
        stream.seek(entry.offset)
        stream.write(bits.astype("<u2").tobytes())


def flip_bit(folder: Path, name: str, byte: int) -> None:
    """Flip one bit of a tensor in its shard."""
    entry = Checkpoint.open(folder).entry(name)
    data = bytearray(entry.file.read_bytes())
    data[entry.offset + byte] ^= 1
    entry.file.write_bytes(data)


def write_toy_tokenizer(folder: Path) -> None:
    """tokenizer.json (one token a character, plus the special ones), tokenizer_config.json, chat_template.jinja."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    vocab = {token: index for index, token in enumerate(TOKENS)}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocab, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|return|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|unk|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    _write_json(folder / "tokenizer_config.json", settings)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """float32 to BF16 bit patterns (uint16), round to nearest, ties to even; finite values only."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _random_tensors(a: PuzzleArchitecture, rng: np.random.Generator) -> Iterator[PlannedTensor]:
    for name, spec in tensor_table(a).items():
        if name.endswith("_scales"):
            continue  # written together with its blocks
        if not name.endswith("_blocks"):
            yield tensor_of(name, spec.dtype, bf16_bits(_random_values(name, spec.shape, rng)))
            continue
        num_experts, out_dim, num_blocks, _ = spec.shape
        values = _random_values(name, (num_experts, out_dim, num_blocks * mxfp4.BLOCK_SIZE), rng)
        blocks, scales = mxfp4.quantize(values)
        yield tensor_of(name, "U8", blocks)
        yield tensor_of(name.removesuffix("_blocks") + "_scales", "U8", scales)


def _random_values(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    values = rng.standard_normal(shape).astype(np.float32)
    if "norm." in name:
        return 1 + 0.1 * values
    if "embed_tokens" in name or name.endswith("sinks"):
        return values
    if name.endswith("bias"):
        return 0.2 * values
    fan_in = shape[-2] if name.endswith(("experts.gate_up_proj", "experts.down_proj")) else shape[-1]
    gain = next((g for part, g in _GAINS.items() if part in name), 1.0)
    return values * np.float32(gain / math.sqrt(fan_in))


_GAINS = {"q_proj": 1.5, "k_proj": 1.5, "router": 1.5, "lm_head": 2.0}
"""Standard deviation of the output for an input of unit variance, where it is not 1."""


def _write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
