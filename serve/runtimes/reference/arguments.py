"""The arguments of TensorRT-LLM's `LLM` as the reference runtime understands them.

It accepts every argument of TensorRT-LLM's schema. The ones below change what it does; the others concern NVIDIA GPUs
or speed alone and are named once in the log, so that nobody believes they had an effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from puzzle_trtllm.errors import EngineError
from puzzle_trtllm.serve.runtimes.api import KvCacheConfig

_WITHOUT_MEANING_HERE = frozenset({"backend", "tokenizer", "skip_tokenizer_init", "trust_remote_code"})


@dataclass(frozen=True, kw_only=True)
class EngineArguments:
    """What is honoured, with TensorRT-LLM's names."""

    model: str
    dtype: str = "auto"
    max_batch_size: int = 256
    max_num_tokens: int = 8192
    max_seq_len: int | None = None
    stream_interval: int = 1
    kv_cache_config: KvCacheConfig = field(default_factory=KvCacheConfig)

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_num_tokens", "stream_interval"):
            if getattr(self, name) < 1:
                raise EngineError("out of range", key=name, found=getattr(self, name), expected="at least 1")


def read_arguments(model: str | Path, arguments: Mapping[str, Any]) -> tuple[EngineArguments, list[str]]:
    """Split LLM arguments into the honoured ones and the names of those that have no effect here.

    Raises EngineError for what the reference runtime would have to get wrong: parallelism it does not have.
    """
    parallel = {
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "moe_expert_parallel_size",
        "moe_tensor_parallel_size",
    }
    for name in sorted(parallel & arguments.keys()):
        if (arguments[name] or 1) > 1:
            raise EngineError(
                "the reference runtime runs on one rank", key=name, found=arguments[name], expected="1 or unset"
            )
    honoured = {f.name for f in fields(EngineArguments)} - {"model", "kv_cache_config"}
    kv_names = {f.name for f in fields(KvCacheConfig)}
    kv = arguments.get("kv_cache_config") or {}
    kv = kv if isinstance(kv, Mapping) else vars(kv)
    ignored = [
        name for name in arguments if name not in honoured | parallel | _WITHOUT_MEANING_HERE | {"kv_cache_config"}
    ]
    ignored += [f"kv_cache_config.{name}" for name in kv if name not in kv_names]
    own = {name: value for name, value in arguments.items() if name in honoured and value is not None}
    return (
        EngineArguments(
            model=str(model),
            kv_cache_config=KvCacheConfig(**{name: value for name, value in kv.items() if name in kv_names}),
            **own,
        ),
        ignored,
    )
