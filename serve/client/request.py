"""What a client asks for and what it gets, free of any transport.

All times are `time.perf_counter_ns()` of the client's clock: differences mean something, the values do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from puzzle_trtllm.errors import ServeError


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One prompt, as text or as token ids, and how to continue it. None leaves the server's default.

    Without temperature, top_k and top_p it is greedy, as with temperature 0; older servers (TensorRT-LLM before 1.2)
    take a temperature alone for greedy, too.
    """

    prompt: str | None = None
    input_ids: Sequence[int] | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    stop: Sequence[str] | None = None
    ignore_eos: bool | None = None
    """Generate up to max_tokens whatever the model says; needs a server with our extra tensors."""
    min_tokens: int | None = None
    streaming: bool = True
    request_id: str = ""
    """A `stop` with the same id cancels the request; otherwise free."""

    def __post_init__(self) -> None:
        """Raises ServeError (INVALID_ARGUMENT) unless exactly one of prompt and input_ids is given."""
        if (self.prompt is None) == (self.input_ids is None):
            raise ServeError(
                "a request needs exactly one of prompt and input_ids",
                found="both" if self.prompt is not None else "neither",
                status="INVALID_ARGUMENT",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationChunk:
    """What one response brought: only what is new since the response before."""

    text: str
    token_ids: list[int]
    """Empty where the server gives no token ids (a stock llmapi server)."""
    num_output_tokens: int | None
    """All tokens generated so far; None where the server gives no token ids."""
    finish_reason: str | None
    """stop | length | ... on the last chunk, else None."""
    received_ns: int


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """A finished generation and when its parts arrived."""

    text: str
    token_ids: list[int]
    num_output_tokens: int | None
    """None where the server gives no token ids."""
    finish_reason: str | None
    sent_ns: int
    first_token_ns: int
    """Arrival of the first response with a token; without streaming that is the only response."""
    token_times_ns: list[int] = field(repr=False)
    """Arrival of each token; tokens of one response share their time. Without token ids: one time a response."""
    end_ns: int
