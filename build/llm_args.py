"""llm_args.yaml: the arguments of TensorRT-LLM's `LLM`, derived from architecture, engine config and scenario.

A human's engine config holds only what a human decides. Everything else follows, and every derived value carries its
reason, so that `build --explain` can show both. `llm_args` in the engine config overrides any single value; values
that depend on it follow (a shorter max_seq_len shortens the windows).

The memory cap: `memory_bytes` covers weights and KV cache together, of one GPU (one rank of the reference runtime), so
the cache gets what that one's part of the weights leaves. The trap:
`max_attention_window` sizes the memory while the model's own window masks. It needs one entry a layer, no nulls, and
never less than the model's window; left out, a runtime would derive it from the single `sliding_window` of config.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from puzzle_trtllm.architecture import KvDtype, PuzzleArchitecture
from puzzle_trtllm.build.derived_values import DerivedValue, Values, to_nested
from puzzle_trtllm.build.expert_layout import check_expert_layout
from puzzle_trtllm.build.fixed_values import check_fixed_values
from puzzle_trtllm.build.gpu_args import (
    CAPACITY_POLICY,
    DEFAULT_TOKENS_PER_BLOCK,
    FREE_FRACTION,
    Room,
    batch_size,
    find_room,
    moe_backend,
    put_gpu_args,
    the_gpu,
)
from puzzle_trtllm.build.parallelism import check_kv_heads, check_parallelism
from puzzle_trtllm.build.planner.layout import Layout
from puzzle_trtllm.build.planner.weights import weights_per_gpu
from puzzle_trtllm.build.window_shares import format_shares
from puzzle_trtllm.engine import EngineConfig
from puzzle_trtllm.errors import ConfigError
from puzzle_trtllm.kv_layout import blocks_of_a_sequence
from puzzle_trtllm.llm_args_schema import check_llm_args
from puzzle_trtllm.parallelism import Parallelism
from puzzle_trtllm.scenario import Scenario
from puzzle_trtllm.sharding import count_shard_bytes, shards_of

DEFAULT_MAX_NUM_TOKENS = 8192
MIN_TOKENS_PER_BLOCK = 8
CHUNK_UNIT = 256
"""Tokens, of which TensorRT-LLM makes chunks of prompts where a window is below its max_seq_len + 1: always here."""
DTYPE_KEY = "kv_cache_config.dtype"
CACHE_BYTES_KEY = "kv_cache_config.max_gpu_total_bytes"
REUSE_KEY = "kv_cache_config.enable_block_reuse"
V2_KEY = "kv_cache_config.use_kv_cache_manager_v2"
_COUNTS = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "max_seq_len",
    "max_batch_size",
    "max_num_tokens",
    "kv_cache_config.tokens_per_block",
)


def derive_llm_args(
    architecture: PuzzleArchitecture, config: EngineConfig, scenario: Scenario, *, file: str
) -> list[DerivedValue]:
    """All arguments for one engine, in the order they are written. `file` names the engine config in errors.

    Raises ConfigError for an override that TensorRT-LLM does not know or that contradicts the engine config, an
    impossible layout, a scenario longer than the model, or a memory cap that leaves no room for one sequence.
    """
    if "model" in config.llm_args:
        raise ConfigError("is passed by the loader of the engine", file=file, key="llm_args.model")
    check_llm_args(config.llm_args, target=config.target, file=f"{file}: llm_args")
    if config.gpu is not None:
        the_gpu(config, file)
    if config.runtime == "tensorrt_llm":
        check_fixed_values(architecture, file=file)
    values = Values(config.llm_args)
    _parallel(values, config, file)
    _max_seq_len(values, architecture, scenario, file)
    _check_sizes(values, file)
    _check_ranks(values, architecture, config, file)
    _check_decisions(values, config, file)
    if config.runtime == "tensorrt_llm":
        room = find_room(architecture, config, values, scenario, max_num_tokens=_max_num_tokens(values, 0), file=file)
        _batch(values, *batch_size(room))
        put_gpu_args(values, scenario, room)
    else:
        _batch(values, scenario.concurrency, f"scenario {scenario.name}: concurrency")
        room = None
    _kv_cache(values, architecture, config, file)
    if room is not None:
        _divide_memory(values, config, room)
    result = list(values.finish())
    nested = to_nested(result)
    if config.runtime == "tensorrt_llm":
        check_expert_layout(architecture, nested, gpu=the_gpu(config, file), file=file)
        _check_kernels(nested, config, scenario, file)
    _check_windows(architecture, config, nested, file)
    _check_memory(architecture, config, nested, file)
    check_llm_args(nested, target=config.target, file=file)
    return result


def one_sequence_bytes(architecture: PuzzleArchitecture, llm_args: Mapping[str, Any]) -> int:
    """KV bytes of one sequence of max_seq_len on one rank, in whole blocks."""
    kv = llm_args["kv_cache_config"]
    heads = architecture.num_key_value_heads
    own = heads if llm_args.get("enable_attention_dp") else max(1, heads // llm_args["tensor_parallel_size"])
    size: int = kv["tokens_per_block"]
    windows = [block.sliding_window for block in architecture.blocks]
    blocks = sum(blocks_of_a_sequence(window, llm_args["max_seq_len"], size) for window in windows)
    kv_dtype: KvDtype = "fp8" if kv["dtype"] == "fp8" else "bf16"
    return blocks * size * architecture.kv_bytes_per_token_and_layer(kv_dtype) // heads * own


def _parallel(values: Values, config: EngineConfig, file: str) -> None:
    values.put("backend", "pytorch", "the only backend of TensorRT-LLM that runs gpt-oss")
    tp = values.put("tensor_parallel_size", config.num_gpus, f"num_gpus of the engine config ({config.parallel})")
    if config.parallel == "dep":
        values.put("moe_expert_parallel_size", tp, "parallel: dep deals the experts out to all GPUs")
        values.put("enable_attention_dp", True, "parallel: dep runs attention on whole sequences, one GPU each")
    elif config.runtime == "tensorrt_llm" and tp > 1:
        backend, _ = moe_backend(the_gpu(config, file))
        reason = f"{backend} deals whole experts out to all GPUs: their width has no aligned cut for tensor parallelism"
        values.put("moe_expert_parallel_size", tp, reason)
    elif tp > 1:
        values.put("moe_expert_parallel_size", tp, "whole experts to every rank, as on GPUs")


def _check_sizes(values: Values, file: str) -> None:
    """Overrides that something is divided by or multiplied with. Raises ConfigError."""
    for key in _COUNTS:
        count = values.get(key, 1)
        if count is None or count < 1:
            raise ConfigError("must be positive", file=file, key=key, found=json.dumps(count), expected="at least 1")
    key = "kv_cache_config.free_gpu_memory_fraction"
    fraction = values.get(key)
    if fraction is not None and not 0 < fraction <= 1:
        raise ConfigError("must be above 0 and at most 1", file=file, key=key, found=fraction)


def _check_decisions(values: Values, config: EngineConfig, file: str) -> None:
    """Overrides that contradict a key of the engine config, by which memory is counted and scales are folded."""
    decided: tuple[tuple[str, object, str, str], ...] = (
        (DTYPE_KEY, _cache_dtype(config), "kv_dtype", config.kv_dtype),
        ("enable_attention_dp", config.parallel == "dep", "parallel", config.parallel),
    )
    for key, value, decided_by, decision in decided:
        found = values.get(key, value)
        if found != value:
            raise _disagrees(key, found, value, decided_by, decision, file)


def _disagrees(key: str, found: object, value: object, decided_by: str, decision: object, file: str) -> ConfigError:
    message = f"disagrees with {decided_by}: {decision} of the engine config"
    expected = f"{json.dumps(value)}; to change it, set {decided_by}"
    return ConfigError(message, file=file, key=key, found=json.dumps(found), expected=expected)


def _check_kernels(llm_args: Mapping[str, Any], config: EngineConfig, scenario: Scenario, file: str) -> None:
    """Overrides with which TensorRT-LLM starts, and serves wrong numbers or none of the scenario's requests."""
    kv = llm_args["kv_cache_config"]
    if kv["enable_block_reuse"] and _mixes_prefixes(config, kv["max_attention_window"] or ()):
        message = "1.2 mixes up what different windows have of a common prefix"
        expected = "false, or a newer target"
        raise ConfigError(message, file=file, key=REUSE_KEY, found="true", expected=expected)
    block = kv["tokens_per_block"]
    if block & (block - 1):
        key = "kv_cache_config.tokens_per_block"
        raise ConfigError("its kernels need a power of two", file=file, key=key, found=block)
    dtype = llm_args.get("dtype", "auto")
    if dtype not in ("auto", "bfloat16"):
        message = "gpt-oss is BF16, and overflows float16"
        raise ConfigError(message, file=file, key="dtype", found=dtype, expected="auto or bfloat16")
    prompt, step = min(scenario.longest_input, llm_args["max_seq_len"]), llm_args["max_num_tokens"]
    if not llm_args["enable_chunked_prefill"] and prompt > step:
        expected = f"true, or max_num_tokens of at least {prompt}, the longest prompt of scenario {scenario.name}"
        message = f"a prompt must fit in one step of {step} tokens"
        raise ConfigError(message, file=file, key="enable_chunked_prefill", found="false", expected=expected)
    if prompt > step and step < CHUNK_UNIT:
        message = f"chunks of prompts are multiples of {CHUNK_UNIT} tokens: one of {prompt} would wait for ever"
        raise ConfigError(message, file=file, key="max_num_tokens", found=step, expected=f"at least {CHUNK_UNIT}")


def _cache_dtype(config: EngineConfig) -> str:
    """TensorRT-LLM's name for kv_dtype; "auto" is the model's own dtype."""
    return "fp8" if config.kv_dtype == "fp8" else "auto"


def _check_ranks(values: Values, a: PuzzleArchitecture, config: EngineConfig, file: str) -> None:
    """Before anything is counted per GPU. Raises ConfigError."""
    nested = to_nested(list(values.finish()))
    check_parallelism(a, config, nested, file=file)
    if config.runtime == "tensorrt_llm":
        check_kv_heads(a, nested, file=file)


def _max_seq_len(values: Values, a: PuzzleArchitecture, scenario: Scenario, file: str) -> None:
    wanted = scenario.sequence_tokens
    reason = f"scenario {scenario.name}: {scenario.longest_sequence}"
    max_seq_len = values.put("max_seq_len", wanted, reason)
    if max_seq_len is None or max_seq_len > a.max_position_embeddings:
        raise ConfigError(
            "sequences longer than the model's positions",
            file=file,
            key="max_seq_len",
            found=max_seq_len,
            expected=f"at most {a.max_position_embeddings}",
        )


def _batch(values: Values, max_batch_size: int, reason: str) -> None:
    batch = values.put("max_batch_size", max_batch_size, reason) or 0
    reason = "TensorRT-LLM's default" if batch <= DEFAULT_MAX_NUM_TOKENS else "one token for every sequence"
    values.put("max_num_tokens", _max_num_tokens(values, batch), reason)
    values.put("enable_chunked_prefill", True, "a long prompt must not hold up the sequences that are decoding")


def _max_num_tokens(values: Values, batch: int) -> int:
    return int(values.get("max_num_tokens") or max(DEFAULT_MAX_NUM_TOKENS, batch))


def _divide_memory(values: Values, config: EngineConfig, room: Room) -> None:
    """The KV pool: how much of the GPU, for whom it is reserved, and its division among windows."""
    fraction = FREE_FRACTION[config.parallel]
    reason = f"of what is free once the model is loaded; about {room.pool_bytes / 2**30:.1f} GiB on {room.gpu.name}"
    values.put("kv_cache_config.free_gpu_memory_fraction", fraction, reason)
    reason = "a sequence that starts can end: none is evicted half way"
    values.put("scheduler_config.capacity_scheduler_policy", CAPACITY_POLICY, reason)
    windows = values.get("kv_cache_config.max_attention_window") or []
    if len(room.shares) > 1 and not values.get(V2_KEY):
        if config.target != "1.2":  # which has V1 alone, and refuses the key
            values.put(V2_KEY, False, "V2 ignores window shares")
        distinct = ", ".join(str(window) for window in sorted(set(windows)))
        reason = (
            f"memory for windows {distinct} as {room.num_sequences} sequences are counted in it; equal parts otherwise"
        )
        values.merge("env_overrides", {"TRTLLM_WINDOW_SIZE_SHARES": format_shares(room.shares)}, reason)


def _kv_cache(values: Values, a: PuzzleArchitecture, config: EngineConfig, file: str) -> None:
    max_seq_len = values.get("max_seq_len")
    values.put(DTYPE_KEY, _cache_dtype(config), f"kv_dtype: {config.kv_dtype} of the engine config")
    windows = [min(block.sliding_window or max_seq_len, max_seq_len) for block in a.blocks]
    values.put(
        "kv_cache_config.max_attention_window", windows, "one entry a layer: its window; max_seq_len where it sees all"
    )
    size, reason = _tokens_per_block(a, config)
    values.put("kv_cache_config.tokens_per_block", size, reason)
    if _mixes_prefixes(config, windows):
        values.put(REUSE_KEY, False, "TensorRT-LLM 1.2 mixes up what different windows have of a common prefix")
    else:
        values.put(REUSE_KEY, True, "requests with a common prefix share blocks")
    if config.memory_bytes is not None:
        weight_bytes = _weight_bytes_of_a_rank(a, config, to_nested(list(values.finish())))
        left = config.memory_bytes - weight_bytes
        reason = f"memory_bytes {config.memory_bytes} - {weight_bytes} of weights"
        given = values.put(CACHE_BYTES_KEY, left, reason)
        if given != left:
            raise _disagrees(CACHE_BYTES_KEY, given, left, "memory_bytes", config.memory_bytes, file)


def _mixes_prefixes(config: EngineConfig, windows: Sequence[int]) -> bool:
    """Whether the cache manager would take the blocks that it finds of a prompt in one window for found in all.

    V1 does in 1.2 and 1.2.1: `addSequence` sets the prepopulated length window by window, until pull request 10875.
    """
    return config.runtime == "tensorrt_llm" and config.target == "1.2" and len(set(windows)) > 1


def _tokens_per_block(a: PuzzleArchitecture, config: EngineConfig) -> tuple[int, str]:
    smallest = min((w for w in a.windows if w is not None), default=DEFAULT_TOKENS_PER_BLOCK)
    if config.runtime == "tensorrt_llm" or smallest >= DEFAULT_TOKENS_PER_BLOCK:
        return DEFAULT_TOKENS_PER_BLOCK, "TensorRT-LLM's default"
    size = max(1 << (smallest.bit_length() - 1), MIN_TOKENS_PER_BLOCK)
    return size, f"blocks no larger than the smallest window, {smallest}"


def _check_windows(a: PuzzleArchitecture, config: EngineConfig, llm_args: Mapping[str, Any], file: str) -> None:
    """Raises ConfigError for windows that a runtime would mask wrongly with, or TensorRT-LLM divide memory by."""
    longest = llm_args["max_seq_len"]
    key = "kv_cache_config.max_attention_window"
    given = llm_args["kv_cache_config"]["max_attention_window"]
    if not given or len(given) != a.num_layers:
        found = f"{len(given or [])} entries"
        raise ConfigError("needs one entry a layer", file=file, key=key, found=found, expected=a.num_layers)
    for layer, (window, block) in enumerate(zip(given, a.blocks, strict=True)):
        needed = min(block.sliding_window or longest, longest)
        place = f"{key}[{layer}]"
        if window < needed:
            message = "smaller than the model's window"
            raise ConfigError(message, file=file, key=place, found=window, expected=f"at least {needed}")
        if window > longest and config.runtime == "tensorrt_llm":
            message = "longer than max_seq_len: TensorRT-LLM cuts it to max_seq_len + 1, another pool than ours"
            raise ConfigError(message, file=file, key=place, found=window, expected=f"at most {longest}")


def _check_memory(a: PuzzleArchitecture, config: EngineConfig, llm_args: Mapping[str, Any], file: str) -> None:
    if config.memory_bytes is None:
        return
    weight_bytes = _weight_bytes_of_a_rank(a, config, llm_args)
    left = config.memory_bytes - weight_bytes
    needed = one_sequence_bytes(a, llm_args)
    if left < needed:
        raise ConfigError(
            f"leaves no room for the KV cache of one sequence of {llm_args['max_seq_len']} tokens",
            file=file,
            key="memory_bytes",
            found=config.memory_bytes,
            expected=f"at least {weight_bytes + needed}: {weight_bytes} weights + {needed} KV",
        )


def _weight_bytes_of_a_rank(a: PuzzleArchitecture, config: EngineConfig, llm_args: Mapping[str, Any]) -> int:
    """Of the GPU, or the reference runtime's rank, that holds most."""
    sizes = Parallelism.from_llm_args(llm_args)
    if config.runtime == "reference":
        return max(count_shard_bytes(shard) for shard in shards_of(a, sizes))
    return weights_per_gpu(a, Layout(kind=config.parallel, gpus_per_replica=sizes.tensor)).total
