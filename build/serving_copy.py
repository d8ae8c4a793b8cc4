"""`<engine>/model`: the checkpoint as a runtime should see it.

It differs from the checkpoint in what engines would trip over:
- `model_type` is `gpt_oss` (an unknown one needs remote code in every worker; GptOssConfig keeps `block_configs`), and
  only `architectures` says that a plain gpt-oss cannot run it;
- no scale tensor is left, whether its scales were folded or not, so that no engine can apply one twice or by half;
- no hf_quant_config.json: TensorRT-LLM would read it instead of config.json's mxfp4 entry;
- `<|call|>`, where the tokenizer has it, ends a generation: gpt-oss ends its tool calls so, and released generation
  configs forget it.
Experts are hard-linked; only the small shards are written anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from puzzle_trtllm.architecture import PuzzleArchitecture
from puzzle_trtllm.build.companions import GENERATION_CONFIG, companions
from puzzle_trtllm.build.fold import Folding
from puzzle_trtllm.chat import ChatTokenizer
from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.checkpoint_writer import PlannedTensor, Progress, copy_companions, rewrite_checkpoint
from puzzle_trtllm.errors import CheckpointError
from puzzle_trtllm.families import GPT_OSS, GPT_OSS_PUZZLE, Family
from puzzle_trtllm.json_files import read_json_object
from puzzle_trtllm.rope import RopeConfig
from puzzle_trtllm.tensors import kv_scale_of

_NOT_FOR_SERVING = ("auto_map", "per_layer_config", "num_experts", "rope_parameters")
"""Remote code is not shipped here, per_layer_config would compete with block_configs, num_experts triggers a legacy
remapping in TensorRT-LLM, which reads no rope_parameters."""


def serving_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config.json of the serving copy."""
    a = checkpoint.architecture
    config = {key: value for key, value in checkpoint.config.items() if key not in _NOT_FOR_SERVING}
    family = serving_family(a)
    names = {"model_type": family.serving_model_type, "architectures": [family.causal_lm]}
    config = {**a.child_config(config), **names}
    config = _with_whole_rope(config, a.rope)
    config["sliding_window"] = config["sliding_window"] or checkpoint.config.get("sliding_window")
    if family is GPT_OSS:
        del config["block_configs"]
    return config


def _with_whole_rope(config: Mapping[str, Any], rope: RopeConfig) -> dict[str, Any]:
    """Every rotary value where older readers look, as we read it: for what they do not find they have their own."""
    whole = rope.to_json()
    block = config.get("rope_scaling") or {}
    missing = {key: value for key, value in whole["rope_scaling"].items() if key not in block}
    return {**config, **whole, "rope_scaling": {**block, **missing}}


def serving_family(a: PuzzleArchitecture) -> Family:
    """Whose class runs it: engines' own gpt-oss where it can, with equal layers and windows on the even ones."""
    alternating = all((block.sliding_window is None) == (i % 2 == 1) for i, block in enumerate(a.blocks))
    return GPT_OSS if alternating and not a.is_heterogeneous else GPT_OSS_PUZZLE


def write_serving_copy(
    checkpoint: Checkpoint, folder: Path, folding: Folding, *, progress: Progress | None = None
) -> list[str]:
    """Write the serving copy into the empty `folder` and return notes on what was changed for serving.

    Raises CheckpointError, before anything large is written, for companions that could not be served.
    """
    generation, notes = _generation_config(checkpoint)
    _check_tokenizer(checkpoint)
    scales = {name: None for name in checkpoint.tensors if kv_scale_of(name) is not None}
    replace: dict[str, PlannedTensor | None] = {**scales, **folding.replace}
    rewrite_checkpoint(
        checkpoint,
        folder,
        config=serving_config(checkpoint),
        replace=replace,
        companions=False,
        progress=progress,
    )
    copy_companions((file for file in companions(checkpoint) if file.name != GENERATION_CONFIG), folder)
    (folder / GENERATION_CONFIG).write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    return notes


def _check_tokenizer(checkpoint: Checkpoint) -> None:
    """It may be missing, as who has it sends token ids; one that cannot work would fail at the first request."""
    config = checkpoint.path / "tokenizer_config.json"
    if config.is_file() and read_json_object(config, CheckpointError).get("auto_map") is not None:
        message = "names code, which TensorRT-LLM would run: it loads tokenizers with trust_remote_code"
        raise CheckpointError(message, file=config, key="auto_map", expected="a tokenizer that is tokenizer.json alone")
    if (checkpoint.path / "tokenizer.json").is_file():
        tokenizer = ChatTokenizer.from_folder(checkpoint.path)
        tokenizer.check_vocabulary(checkpoint.architecture.vocab_size)
        tokenizer.check_template()


def _generation_config(checkpoint: Checkpoint) -> tuple[dict[str, Any], list[str]]:
    """generation_config.json with every token that ends a generation, and notes on it; made from config.json where
    there is none."""
    file = checkpoint.path / GENERATION_CONFIG
    given = read_json_object(file, CheckpointError) if file.is_file() else {}
    vocab_size = checkpoint.architecture.vocab_size
    if given.get("eos_token_id") is not None:
        ids = _token_ids(given, file, vocab_size)
    else:
        ids = _token_ids(checkpoint.config, checkpoint.path / "config.json", vocab_size)
    notes = []
    call_id = _special_token_id(checkpoint.path, "<|call|>")
    if call_id is not None and call_id not in ids:
        ids.append(call_id)
        notes.append(f"{GENERATION_CONFIG}: added {call_id} <|call|> to eos_token_id, so that tool calls end")
    return {**given, "eos_token_id": ids}, notes


def _token_ids(config: Mapping[str, Any], file: Path, vocab_size: int) -> list[int]:
    """The config's eos_token_id as a list; empty where it says none. A token that no model can make ends nothing."""
    eos = config.get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(_is_token_id(token_id) and token_id < vocab_size for token_id in ids):
        raise CheckpointError(
            "must be a token id or a list of them",
            file=file,
            key="eos_token_id",
            found=json.dumps(eos),
            expected=f"0 to {vocab_size - 1}",
        )
    return list(ids)


def _special_token_id(folder: Path, token: str) -> int | None:
    file = folder / "tokenizer.json"
    added = read_json_object(file, CheckpointError).get("added_tokens", []) if file.is_file() else []
    if not isinstance(added, list) or not all(_is_added_token(entry) for entry in added):
        raise CheckpointError("must be a list of objects with id and content", file=file, key="added_tokens")
    return next((entry["id"] for entry in added if entry["content"] == token), None)


def _is_added_token(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("content"), str) and _is_token_id(entry.get("id"))


def _is_token_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
