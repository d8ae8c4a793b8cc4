"""Layouts that cannot run are refused here, before anything is written.

- Expert parallelism deals each layer's experts out evenly, so its size must divide the expert count of every layer: the
  smallest layer of the 88B child has 64 experts, and EP above 64 is impossible whatever the others have.
- Tensor parallelism deals out attention heads; KV heads may be repeated when there are fewer of them than ranks, but
  then the ranks must be a multiple of the heads. Attention data parallelism keeps all heads on every rank.
- gpt-oss has no pipeline parallelism in TensorRT-LLM, and the reference runtime is one rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from puzzle_trtllm.architecture import PuzzleArchitecture
from puzzle_trtllm.engine import EngineConfig
from puzzle_trtllm.errors import ConfigError


def check_parallelism(
    architecture: PuzzleArchitecture, config: EngineConfig, llm_args: Mapping[str, Any], *, file: str
) -> None:
    """Raise ConfigError when `llm_args` ask for ranks that the model or the runtime cannot have."""
    if config.runtime == "reference":
        _check(config.num_gpus == 1, "num_gpus", config.num_gpus, "1: the reference runtime runs on one rank", file)
    tp = _size(llm_args, "tensor_parallel_size")
    ep = _size(llm_args, "moe_expert_parallel_size")
    pp = _size(llm_args, "pipeline_parallel_size")
    _check(pp == 1, "pipeline_parallel_size", pp, "1: gpt-oss has no pipeline parallelism", file)
    _check(tp <= config.num_gpus, "tensor_parallel_size", tp, f"at most num_gpus, {config.num_gpus}", file)
    _check(tp % ep == 0, "moe_expert_parallel_size", ep, f"a divisor of tensor_parallel_size, {tp}", file)
    for layer, block in enumerate(architecture.blocks):
        divides = block.num_local_experts % ep == 0
        expected = f"a divisor of the {block.num_local_experts} experts of layer {layer}"
        _check(divides, "moe_expert_parallel_size", ep, expected, file)
    if not llm_args.get("enable_attention_dp"):
        _check_heads(architecture, tp, file)


def _check_heads(a: PuzzleArchitecture, tp: int, file: str) -> None:
    heads, kv_heads = a.num_attention_heads, a.num_key_value_heads
    _check(heads % tp == 0, "tensor_parallel_size", tp, f"a divisor of the {heads} attention heads", file)
    fits = kv_heads % tp == 0 or tp % kv_heads == 0
    _check(fits, "tensor_parallel_size", tp, f"a divisor or a multiple of the {kv_heads} KV heads", file)


def _size(llm_args: Mapping[str, Any], key: str) -> int:
    return int(llm_args.get(key) or 1)


def _check(holds: bool, key: str, found: object, expected: str, file: str) -> None:
    if not holds:
        raise ConfigError("impossible parallelism", file=file, key=key, found=found, expected=expected)
