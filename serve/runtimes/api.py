"""The slice of TensorRT-LLM's LLM API that everything above the runtimes is written against.

Names, fields and defaults follow `tensorrt_llm.llmapi` (SamplingParams in tensorrt_llm/sampling_params.py,
RequestOutput and CompletionOutput in tensorrt_llm/executor/result.py). With the `tensorrt_llm` runtime the real classes
are used; with `reference` these. As there since 1.2, whoever gives a temperature, a top_k or a top_p samples; without
any of them it is greedy, as with temperature 0 or top_k 1.
"""

from __future__ import annotations

import math
import operator
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

_Number = TypeVar("_Number", int, float)


class RequestError(RuntimeError):
    """A request that the engine cannot run as it stands; the engine lives on."""


class GenerationError(RuntimeError):
    """A request on which the engine failed, through no fault that the caller could mend; the engine lives on."""


class EngineDeadError(RuntimeError):
    """The engine process is gone; every open request ends with this, and so does every new one."""


@dataclass(kw_only=True)
class SamplingParams:
    """How to continue a prompt. Raises ValueError for impossible values."""

    max_tokens: int = 32
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    end_id: int | None = None
    pad_id: int | None = None
    n: int = 1
    best_of: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    add_special_tokens: bool = True
    exclude_input_from_output: bool = True
    return_perf_metrics: bool = False
    logprobs: int | None = None
    """Not None: fill `cumulative_logprob`."""

    def __post_init__(self) -> None:
        for names, kind in ((_INTEGERS, operator.index), (_NUMBERS, _finite)):
            for name in names:
                value = getattr(self, name)
                setattr(self, name, None if value is None else _convert(kind, name, value))
        if self.stop_token_ids is not None:
            self.stop_token_ids = [_convert(operator.index, "stop_token_ids", each) for each in self.stop_token_ids]
        _check(all(isinstance(s, str) and s for s in self.stop_strings), "stop", self.stop, "text that is not empty")
        _check(self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        _check(self.temperature is None or self.temperature >= 0, "temperature", self.temperature, "at least 0")
        _check(self.top_k is None or self.top_k >= 0, "top_k", self.top_k, "at least 0 (0 means all)")
        _check(self.top_p is None or 0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        penalty = self.repetition_penalty
        _check(penalty is None or penalty > 0, "repetition_penalty", penalty, "above 0")
        _check(self.min_tokens is None or self.min_tokens >= 0, "min_tokens", self.min_tokens, "at least 0")
        _check(self.exclude_input_from_output, "exclude_input_from_output", False, "True")
        _check(self.n == 1 and self.best_of in (None, 1), "n / best_of", (self.n, self.best_of), "1")

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


@dataclass(kw_only=True)
class KvCacheConfig:
    """The keys of `kv_cache_config` that the reference runtime honours."""

    dtype: str = "auto"
    """auto (the compute dtype's 16-bit form, or float32) | fp8"""
    max_attention_window: list[int] | None = None
    max_gpu_total_bytes: int = 0
    """Bytes for all KV pools together; 0 leaves it to `free_gpu_memory_fraction`."""
    free_gpu_memory_fraction: float = 0.9
    tokens_per_block: int = 32
    enable_block_reuse: bool = True
    """Keep the blocks of ended requests while there is room, for prompts that begin alike."""


@dataclass(kw_only=True)
class RequestPerfMetrics:
    """Times of one request, nanoseconds of CLOCK_MONOTONIC, and its KV blocks over all window groups."""

    arrival_time_ns: int
    first_scheduled_time_ns: int
    first_token_time_ns: int
    last_token_time_ns: int
    num_total_allocated_blocks: int = 0
    """Held at any time: shared with others and new ones."""
    num_new_allocated_blocks: int = 0
    num_reused_blocks: int = 0
    """Blocks of the prompt that were in the cache, so that nothing of them was computed; `missed` are its others."""
    num_missed_blocks: int = 0


@dataclass(kw_only=True)
class CompletionOutput:
    """One continuation, as far as it has got."""

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    finish_reason: str | None = None
    """None while running; then stop | length | cancelled."""
    stop_reason: int | str | None = None
    """The stop string or stop token id that ended it; None for the end-of-sequence token or the length."""


class RequestOutput(Protocol):
    """What `generate_async` returns: await it for the end, iterate it for every step, abort it at any time."""

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestPerfMetrics | None

    @property
    def finished(self) -> bool: ...
    def abort(self) -> None: ...
    def result(self, timeout: float | None = None) -> RequestOutput: ...
    async def aresult(self) -> RequestOutput: ...
    def __aiter__(self) -> AsyncIterator[RequestOutput]: ...


class Runtime(Protocol):
    """A module with these names: `tensorrt_llm`, or our `puzzle_trtllm.serve.runtimes.reference`."""

    LLM: Any
    """`LLM(model, **llm_args)`; `.generate(inputs, sampling_params)`, `.generate_async(inputs, sampling_params,
    streaming=)` where inputs is text or a list of token ids, `.get_stats(timeout)` -> list of dicts (numActiveRequests,
    numQueuedRequests, kvCacheStats: {maxNumBlocks, usedNumBlocks, freeNumBlocks}), `.tokenizer`, `.shutdown()`."""
    SamplingParams: Any
    KvCacheConfig: Any


_INTEGERS = ("max_tokens", "top_k", "seed", "min_tokens", "end_id")
_NUMBERS = ("temperature", "top_p", "frequency_penalty", "presence_penalty", "repetition_penalty")


def _convert(kind: Callable[[Any], _Number], name: str, value: Any) -> _Number:
    """A plain number of what may be numpy's or torch's: requests cross to the engine's process."""
    try:
        return kind(value)
    except (TypeError, ValueError):
        expected = "an integer" if kind is operator.index else "a finite number"
        raise ValueError(f"{name}: found {value!r}, expected {expected}") from None


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _check(holds: bool, name: str, found: object, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name}: found {found}, expected {expected}")
