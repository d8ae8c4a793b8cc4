"""The arguments of TensorRT-LLM's `LLM` as the reference runtime understands them.

It accepts every argument of TensorRT-LLM's schema. The ones below change what it does; the others concern NVIDIA GPUs
or speed alone and are named once in the log, so that nobody believes they had an effect.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
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
_NOT_PARALLEL = ("pipeline_parallel_size", "context_parallel_size", "moe_cluster_parallel_size")


@dataclass(frozen=True, kw_only=True)
class EngineArguments:
    """What is honoured, with TensorRT-LLM's names."""

    model: str
    dtype: str = "auto"
    max_batch_size: int = 256
    max_num_tokens: int = 8192
    max_seq_len: int
    stream_interval: int = 1
    load_format: str = "auto"
    """auto | dummy: random weights for a folder that holds nothing but config.json"""
    cuda_graph_config: Mapping[str, Any] | None = field(default_factory=dict)
    """Decode batches to record (smaller ones are always padded): `batch_sizes`, or a choice up to `max_batch_size`.
    None: none."""
    kernels: str = "auto"
    """auto | native | triton | torch; of the reference runtime alone, to force one of its implementations"""
    cores: Sequence[int] | None = None
    """Those that the engine computes on, instead of those of its front; of the reference runtime alone"""
    kv_cache_config: KvCacheConfig = field(default_factory=KvCacheConfig)
    """Its bytes are those of one rank, as with TensorRT-LLM."""
    parallelism: Parallelism = ONE_RANK

    def __post_init__(self) -> None:
        kv = self.kv_cache_config
        names = ("max_batch_size", "max_num_tokens", "max_seq_len", "stream_interval")
        counts = {name: getattr(self, name) for name in names}
        counts["kv_cache_config.tokens_per_block"] = kv.tokens_per_block
        for i, window in enumerate(kv.max_attention_window or ()):
            counts[f"kv_cache_config.max_attention_window[{i}]"] = window
        for key, value in counts.items():
            if not (isinstance(value, int) and value >= 1):
                raise EngineError("out of range", key=key, found=value, expected="an integer, at least 1")
        existing = range(os.cpu_count() or 1)
        if self.cores is not None and not (self.cores and all(core in existing for core in self.cores)):
            raise EngineError("no such cores", key="cores", found=self.cores, expected=f"some of 0..{existing[-1]}")
        share = kv.free_gpu_memory_fraction
        if not (isinstance(share, (int, float)) and 0 < share <= 1):
            key = "kv_cache_config.free_gpu_memory_fraction"
            raise EngineError("out of range", key=key, found=share, expected="above 0 and at most 1")
        if self.load_format not in ("auto", "dummy"):
            raise EngineError("unknown", key="load_format", found=self.load_format, expected="auto or dummy")


def read_arguments(model: str | Path, arguments: Mapping[str, Any]) -> tuple[EngineArguments, list[str]]:
    """Split LLM arguments into the honoured ones and the names of those that have no effect here.

    Raises EngineError for what the reference runtime would have to get wrong: parallelism that it does not have, or
    this model cannot have.
    """
    architecture = PuzzleArchitecture.from_path(model)
    parallelism = Parallelism.from_llm_args(arguments)
    for name in _NOT_PARALLEL:
        if (arguments.get(name) or 1) > 1:
            raise _impossible(name, arguments[name], "1: the reference runtime has tensor and expert parallelism only")
    if arguments.get("enable_attention_dp") and parallelism.tensor > 1:
        raise _impossible("enable_attention_dp", True, "false: the reference runtime deals out attention heads")
    for problem in chain(parallelism.problems(architecture), parallelism.width_problems(architecture)):
        raise _impossible(*problem)
    honoured = {f.name for f in fields(EngineArguments)} - {"model", "parallelism"}
    kv_names = {f.name for f in fields(KvCacheConfig)}
    own: dict[str, Any] = {"max_seq_len": architecture.max_position_embeddings}
    own |= {name: value for name, value in arguments.items() if name in honoured and value is not None}
    kv = _read_section(own.pop("kv_cache_config", {}))
    own["kv_cache_config"] = KvCacheConfig(**{name: value for name, value in kv.items() if name in kv_names})
    if "cuda_graph_config" in arguments:
        section = arguments["cuda_graph_config"]
        own["cuda_graph_config"] = None if section is None else _read_section(section)
    ignored = [name for name in arguments if name not in honoured | _PARALLEL | _WITHOUT_MEANING_HERE]
    ignored += [f"kv_cache_config.{name}" for name in kv if name not in kv_names]
    return EngineArguments(model=str(model), parallelism=parallelism, **own), ignored


def _read_section(section: object) -> dict[str, Any]:
    """What is given of a nested argument, a mapping or one of TensorRT-LLM's objects."""
    values = section if isinstance(section, Mapping) else vars(section)
    return {name: value for name, value in values.items() if value is not None}


def _impossible(key: str, found: object, expected: str) -> EngineError:
    return EngineError("impossible parallelism", key=key, found=found, expected=expected)
