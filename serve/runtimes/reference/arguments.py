"""The arguments of TensorRT-LLM's `LLM` as the reference runtime understands them.

It accepts every argument of TensorRT-LLM's schema. The ones below change what it does; the others concern NVIDIA GPUs
or speed alone and are named once in the log, so that nobody believes they had an effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Any

from puzzle_trtllm.architecture import PuzzleArchitecture
from puzzle_trtllm.errors import EngineError
from puzzle_trtllm.parallelism import ONE_RANK, Parallelism
from puzzle_trtllm.serve.runtimes.api import KvCacheConfig

_WITHOUT_MEANING_HERE = frozenset({"backend", "tokenizer", "skip_tokenizer_init", "trust_remote_code"})
_PARALLEL = frozenset({"tensor_parallel_size", "moe_expert_parallel_size", "moe_tensor_parallel_size"})
_NESTED = frozenset({"kv_cache_config", "cuda_graph_config"})
_NOT_PARALLEL = ("pipeline_parallel_size", "context_parallel_size", "moe_cluster_parallel_size")


@dataclass(frozen=True, kw_only=True)
class EngineArguments:
    """What is honoured, with TensorRT-LLM's names."""

    model: str
    dtype: str = "auto"
    max_batch_size: int = 256
    max_num_tokens: int = 8192
    max_seq_len: int | None = None
    stream_interval: int = 1
    load_format: str = "auto"
    """auto | dummy: random weights for a folder that holds nothing but config.json"""
    cuda_graph_batch_sizes: tuple[int, ...] | None = None
    """Of `cuda_graph_config`: decode batches to record (smaller ones are always padded); none when empty, a choice up
    to the next argument when None."""
    cuda_graph_max_batch_size: int | None = None
    kernels: str = "auto"
    """auto | native | triton | torch; of the reference runtime alone, to force one of its implementations"""
    kv_cache_config: KvCacheConfig = field(default_factory=KvCacheConfig)
    """Its bytes are those of one rank, as with TensorRT-LLM."""
    parallelism: Parallelism = ONE_RANK

    def __post_init__(self) -> None:
        kv = self.kv_cache_config
        counts = {name: getattr(self, name) for name in ("max_batch_size", "max_num_tokens", "stream_interval")}
        counts |= {"max_seq_len": self.max_seq_len or 1, "kv_cache_config.tokens_per_block": kv.tokens_per_block}
        for i, window in enumerate(kv.max_attention_window or ()):
            counts[f"kv_cache_config.max_attention_window[{i}]"] = window
        for key, value in counts.items():
            if not (isinstance(value, int) and value >= 1):
                raise EngineError("out of range", key=key, found=value, expected="an integer, at least 1")
        share = kv.free_gpu_memory_fraction
        if not (isinstance(share, (int, float)) and 0 < share <= 1):
            key = "kv_cache_config.free_gpu_memory_fraction"
            raise EngineError("out of range", key=key, found=share, expected="above 0 and at most 1")
        if self.load_format not in ("auto", "dummy"):
            raise EngineError("unknown", key="load_format", found=self.load_format, expected="auto or dummy")


def read_arguments(model: str | Path, arguments: Mapping[str, Any]) -> tuple[EngineArguments, list[str]]:
    """Split LLM arguments into the honoured ones and the names of those that have no effect here.

    Raises EngineError for what the reference runtime would have to get wrong: parallelism it does not have.
    """
    parallelism = Parallelism.from_llm_args(arguments)
    for name in _NOT_PARALLEL:
        if (arguments.get(name) or 1) > 1:
            raise _impossible(name, arguments[name], "1: the reference runtime has tensor and expert parallelism only")
    if arguments.get("enable_attention_dp") and parallelism.tensor > 1:
        raise _impossible("enable_attention_dp", True, "false: the reference runtime deals out attention heads")
    made = {"model", "kv_cache_config", "parallelism", "cuda_graph_batch_sizes", "cuda_graph_max_batch_size"}
    honoured = {f.name for f in fields(EngineArguments)} - made
    kv_names = {f.name for f in fields(KvCacheConfig)}
    kv = arguments.get("kv_cache_config") or {}
    kv = kv if isinstance(kv, Mapping) else vars(kv)
    kv = {name: value for name, value in kv.items() if value is not None}
    ignored = [name for name in arguments if name not in honoured | _PARALLEL | _WITHOUT_MEANING_HERE | _NESTED]
    ignored += [f"kv_cache_config.{name}" for name in kv if name not in kv_names]
    own = {name: value for name, value in arguments.items() if name in honoured and value is not None}
    return (
        EngineArguments(
            model=str(model),
            kv_cache_config=KvCacheConfig(
                **{n: value for n, value in kv.items() if n in kv_names and value is not None}
            ),
            parallelism=parallelism,
            **_cuda_graphs(arguments),
            **own,
        ),
        ignored,
    )


def check_ranks(arguments: EngineArguments, architecture: PuzzleArchitecture) -> None:
    """Raise EngineError when this model cannot be dealt out so."""
    sizes = arguments.parallelism
    for key, found, expected in chain(sizes.problems(architecture), sizes.width_problems(architecture)):
        raise _impossible(key, found, expected)


def _impossible(key: str, found: object, expected: str) -> EngineError:
    return EngineError("impossible parallelism", key=key, found=found, expected=expected)


def _cuda_graphs(arguments: Mapping[str, Any]) -> dict[str, Any]:
    config = arguments.get("cuda_graph_config", {})
    if config is None:
        return {"cuda_graph_batch_sizes": ()}
    values = config if isinstance(config, Mapping) else vars(config)
    sizes = values.get("batch_sizes")
    return {
        "cuda_graph_batch_sizes": tuple(sizes) if sizes else None,
        "cuda_graph_max_batch_size": values.get("max_batch_size"),
    }
