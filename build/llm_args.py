"""llm_args.yaml: the arguments of TensorRT-LLM's `LLM`, derived from architecture, engine config and scenario.

A human's engine config holds only what a human decides. Everything else follows, and every derived value carries its
reason, so that `build --explain` can show both. `llm_args` in the engine config overrides any single value; values
that depend on it follow (a shorter max_seq_len shortens the windows).

The memory cap: `memory_bytes` covers weights and KV cache together, so the cache gets what the weights leave. The trap:
`max_attention_window` sizes the memory while the model's own window masks. It needs one entry a layer, no nulls, and
never less than the model's window; left out, a runtime would derive it from the single `sliding_window` of config.json.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from puzzle_trtllm.architecture import KvDtype, PuzzleArchitecture
from puzzle_trtllm.build.parallelism import check_parallelism
from puzzle_trtllm.engine import EngineConfig
from puzzle_trtllm.errors import ConfigError
from puzzle_trtllm.llm_args_schema import check_llm_args, section_class
from puzzle_trtllm.scenario import Scenario
from puzzle_trtllm.tensors import count_weight_bytes

DEFAULT_MAX_NUM_TOKENS = 8192
DEFAULT_TOKENS_PER_BLOCK = 32
MIN_TOKENS_PER_BLOCK = 8
_OVERRIDE = "llm_args of the engine config"


class DerivedValue(NamedTuple):
    """One argument, where it comes from."""

    key: str
    """Dotted: kv_cache_config.dtype."""
    value: Any
    reason: str


def derive_llm_args(
    architecture: PuzzleArchitecture, config: EngineConfig, scenario: Scenario, *, file: str
) -> list[DerivedValue]:
    """All arguments for one engine, in the order they are written. `file` names the engine config in errors.

    Raises ConfigError for an override that TensorRT-LLM does not know, an impossible layout, a scenario longer than the
    model, or a memory cap that leaves no room for one sequence.
    """
    if "model" in config.llm_args:
        raise ConfigError("is passed by the loader of the engine", file=file, key="llm_args.model")
    check_llm_args(config.llm_args, target=config.target, file=f"{file}: llm_args")
    values = _Values(config.llm_args)
    _parallel(values, config)
    _sizes(values, architecture, scenario, file)
    _kv_cache(values, architecture, config)
    result = list(values.finish())
    nested = to_nested(result)
    check_parallelism(architecture, config, nested, file=file)
    if nested["kv_cache_config"]["tokens_per_block"] < 1:
        found = nested["kv_cache_config"]["tokens_per_block"]
        raise ConfigError("must be positive", file=file, key="kv_cache_config.tokens_per_block", found=found)
    _check_windows(architecture, nested, file)
    _check_memory(architecture, config, nested, file)
    check_llm_args(nested, target=config.target, file=file)
    return result


def to_nested(values: list[DerivedValue]) -> dict[str, Any]:
    """The arguments as `LLM(**...)` takes them."""
    result: dict[str, Any] = {}
    for key, value, _ in values:
        section, _, name = key.rpartition(".")
        (result.setdefault(section, {}) if section else result)[name] = value
    return result


def one_sequence_bytes(architecture: PuzzleArchitecture, llm_args: Mapping[str, Any]) -> int:
    """KV bytes of one sequence of max_seq_len, in whole blocks: a window layer holds ceil(w / block) + 1 at most."""
    kv = llm_args["kv_cache_config"]
    size: int = kv["tokens_per_block"]
    whole: int = math.ceil(llm_args["max_seq_len"] / size)
    windows = [block.sliding_window for block in architecture.blocks]
    blocks = sum(whole if w is None else min(whole, math.ceil(w / size) + 1) for w in windows)
    kv_dtype: KvDtype = "fp8" if kv["dtype"] == "fp8" else "bf16"
    return blocks * size * architecture.kv_bytes_per_token_and_layer(kv_dtype)


class _Values:
    """Collects values; an override of the same key replaces the derived one."""

    def __init__(self, overrides: Mapping[str, Any]) -> None:
        self._values: list[DerivedValue] = []
        self._overrides: dict[str, Any] = {}
        for key, value in overrides.items():
            if isinstance(value, Mapping) and section_class(key) is not None:
                self._overrides.update({f"{key}.{name}": inner for name, inner in value.items()})
            else:
                self._overrides[key] = value

    def put(self, key: str, value: Any, reason: str) -> Any:
        """Record a value and return the one that holds."""
        if key in self._overrides:
            value, reason = self._overrides.pop(key), _OVERRIDE
        self._values.append(DerivedValue(key, value, reason))
        return value

    def finish(self) -> Iterator[DerivedValue]:
        """Everything recorded, then the overrides that nothing was derived for."""
        yield from self._values
        for key, value in self._overrides.items():
            yield DerivedValue(key, value, _OVERRIDE)


def _parallel(values: _Values, config: EngineConfig) -> None:
    values.put("backend", "pytorch", "the only backend of TensorRT-LLM that runs gpt-oss")
    values.put("tensor_parallel_size", config.num_gpus, f"num_gpus of the engine config ({config.parallel})")
    if config.parallel == "dep":
        values.put("moe_expert_parallel_size", config.num_gpus, "parallel: dep deals the experts out to all GPUs")
        values.put("enable_attention_dp", True, "parallel: dep runs attention on whole sequences, one GPU each")


def _sizes(values: _Values, a: PuzzleArchitecture, scenario: Scenario, file: str) -> None:
    wanted = scenario.sequence_tokens
    reason = f"scenario {scenario.name}: {scenario.input_tokens} in + {scenario.output_tokens} out"
    max_seq_len = values.put("max_seq_len", wanted, reason)
    if max_seq_len is None or max_seq_len > a.max_position_embeddings:
        raise ConfigError(
            "sequences longer than the model's positions",
            file=file,
            key="max_seq_len",
            found=max_seq_len,
            expected=f"at most {a.max_position_embeddings}",
        )
    batch = values.put("max_batch_size", scenario.concurrency, f"scenario {scenario.name}: concurrency") or 0
    reason = "TensorRT-LLM's default" if batch <= DEFAULT_MAX_NUM_TOKENS else "one token for every sequence"
    values.put("max_num_tokens", max(DEFAULT_MAX_NUM_TOKENS, batch), reason)
    values.put("enable_chunked_prefill", True, "a long prompt must not hold up the sequences that are decoding")


def _kv_cache(values: _Values, a: PuzzleArchitecture, config: EngineConfig) -> None:
    max_seq_len = next(v.value for v in values.finish() if v.key == "max_seq_len")
    dtype = "fp8" if config.kv_dtype == "fp8" else "auto"
    values.put("kv_cache_config.dtype", dtype, f"kv_dtype: {config.kv_dtype} of the engine config")
    windows = [min(block.sliding_window or max_seq_len, max_seq_len) for block in a.blocks]
    values.put(
        "kv_cache_config.max_attention_window", windows, "one entry a layer: its window; max_seq_len where it sees all"
    )
    size, reason = _tokens_per_block(a, config)
    values.put("kv_cache_config.tokens_per_block", size, reason)
    shares = config.runtime == "tensorrt_llm"
    reason = "requests with a common prefix share blocks" if shares else "the reference runtime shares no blocks"
    values.put("kv_cache_config.enable_block_reuse", shares, reason)
    if config.memory_bytes is not None:
        weight_bytes = count_weight_bytes(a)
        left = config.memory_bytes - weight_bytes
        reason = f"memory_bytes {config.memory_bytes} - {weight_bytes} of weights"
        values.put("kv_cache_config.max_gpu_total_bytes", left, reason)


def _tokens_per_block(a: PuzzleArchitecture, config: EngineConfig) -> tuple[int, str]:
    smallest = min((w for w in a.windows if w is not None), default=DEFAULT_TOKENS_PER_BLOCK)
    if config.runtime == "tensorrt_llm" or smallest >= DEFAULT_TOKENS_PER_BLOCK:
        return DEFAULT_TOKENS_PER_BLOCK, "TensorRT-LLM's default"
    size = max(1 << (smallest.bit_length() - 1), MIN_TOKENS_PER_BLOCK)
    return size, f"blocks no larger than the smallest window, {smallest}"


def _check_windows(a: PuzzleArchitecture, llm_args: Mapping[str, Any], file: str) -> None:
    key = "kv_cache_config.max_attention_window"
    given = llm_args["kv_cache_config"]["max_attention_window"]
    if not given or len(given) != a.num_layers:
        found = f"{len(given or [])} entries"
        raise ConfigError("needs one entry a layer", file=file, key=key, found=found, expected=a.num_layers)
    for layer, (window, block) in enumerate(zip(given, a.blocks, strict=True)):
        needed = min(block.sliding_window or llm_args["max_seq_len"], llm_args["max_seq_len"])
        if window < needed:
            raise ConfigError(
                "smaller than the model's window",
                file=file,
                key=f"{key}[{layer}]",
                found=window,
                expected=f"at least {needed}",
            )


def _check_memory(a: PuzzleArchitecture, config: EngineConfig, llm_args: Mapping[str, Any], file: str) -> None:
    if config.memory_bytes is None:
        return
    left = config.memory_bytes - count_weight_bytes(a)
    needed = one_sequence_bytes(a, llm_args)
    if left < needed:
        raise ConfigError(
            f"leaves no room for the KV cache of one sequence of {llm_args['max_seq_len']} tokens",
            file=file,
            key="memory_bytes",
            found=config.memory_bytes,
            expected=f"at least {count_weight_bytes(a) + needed}: {count_weight_bytes(a)} weights + {needed} KV",
        )
