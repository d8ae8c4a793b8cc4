"""What crosses between the LLM front and the engine process: small, picklable, one report a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from puzzle_trtllm.serve.runtimes.api import GenerationError, RequestError, RequestPerfMetrics


@dataclass(frozen=True, kw_only=True)
class DecodingRule:
    """How one request's tokens are chosen and when it ends; resolved from SamplingParams by the front."""

    max_tokens: int
    greedy: bool = True
    temperature: float = 1.0
    top_k: int = 0
    """0 means all."""
    top_p: float = 1.0
    seed: int = 0
    end_ids: frozenset[int] = frozenset()
    """End of sequence: finish_reason stop, stop_reason None."""
    stop_ids: frozenset[int] = frozenset()
    """Stop tokens of the request: finish_reason stop, stop_reason the id."""
    min_tokens: int = 0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    with_logprob: bool = False
    report_every: int = 1
    """Tokens between reports (TensorRT-LLM's stream_interval); 0 reports only the end."""

    @property
    def has_penalty(self) -> bool:
        return (self.frequency_penalty, self.presence_penalty, self.repetition_penalty) != (0.0, 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Submit:
    request_id: int
    prompt_token_ids: list[int]
    rule: DecodingRule
    arrival_ns: int


@dataclass(frozen=True, kw_only=True)
class Abort:
    request_id: int


@dataclass(frozen=True, kw_only=True)
class Ready:
    """The engine is loaded; `facts` are shown by doctor and tests (dtype, blocks, bytes)."""

    facts: Mapping[str, Any]
    stats: dict[str, Any]
    """`ReferenceEngine.stats`, before the first step."""


@dataclass(frozen=True, kw_only=True)
class TokenUpdate:
    """New tokens of one request, and its end if this was it."""

    request_id: int
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | None = None
    cumulative_logprob: float | None = None
    metrics: RequestPerfMetrics | None = None
    error: RequestError | GenerationError | None = None


@dataclass(frozen=True, kw_only=True)
class StepReport:
    updates: list[TokenUpdate]
    stats: dict[str, Any]
    """`ReferenceEngine.stats`"""
