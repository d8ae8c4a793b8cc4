"""Layouts that cannot run are refused here, before anything is written.

What the model itself forbids is in the core (puzzle_trtllm/parallelism.py), for the reference runtime asks the same.
gpt-oss has no pipeline parallelism in TensorRT-LLM; the reference runtime has no attention data parallelism.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from puzzle_trtllm.architecture import PuzzleArchitecture
from puzzle_trtllm.engine import EngineConfig
from puzzle_trtllm.errors import ConfigError
from puzzle_trtllm.parallelism import Parallelism


def check_parallelism(
    architecture: PuzzleArchitecture, config: EngineConfig, llm_args: Mapping[str, Any], *, file: str
) -> None:
    """Raise ConfigError when `llm_args` ask for ranks that the model or the runtime cannot have."""
    sizes = Parallelism.from_llm_args(llm_args)
    attention_dp = bool(llm_args.get("enable_attention_dp"))
    if config.runtime == "reference":
        deals_heads = "the reference runtime deals out attention heads"
        _check(config.parallel == "tp", "parallel", config.parallel, f"tp: {deals_heads}", file)
        _check(sizes.tensor == 1 or not attention_dp, "enable_attention_dp", True, f"false: {deals_heads}", file)
    pp = int(llm_args.get("pipeline_parallel_size") or 1)
    _check(pp == 1, "pipeline_parallel_size", pp, "1: gpt-oss has no pipeline parallelism", file)
    expected = f"at most num_gpus, {config.num_gpus}"
    _check(sizes.tensor <= config.num_gpus, "tensor_parallel_size", sizes.tensor, expected, file)
    for problem in sizes.problems(architecture, attention_dp=attention_dp):
        _check(False, *problem, file)
    if config.runtime == "reference":
        for problem in sizes.width_problems(architecture):
            _check(False, *problem, file)


def check_kv_heads(architecture: PuzzleArchitecture, llm_args: Mapping[str, Any], *, file: str) -> None:
    """Raise ConfigError for more ranks than TensorRT-LLM's loader can deal KV heads to."""
    tp, kv_heads = llm_args["tensor_parallel_size"], architecture.num_key_value_heads
    if not llm_args.get("enable_attention_dp") and kv_heads % tp:
        raise ConfigError(
            "TensorRT-LLM's gpt-oss loader does not repeat KV heads",
            file=file,
            key="tensor_parallel_size",
            found=tp,
            expected=f"a divisor of the {kv_heads} KV heads, or parallel: dep",
        )


def _check(holds: bool, key: str, found: object, expected: str, file: str) -> None:
    if not holds:
        raise ConfigError("impossible parallelism", file=file, key=key, found=found, expected=expected)
