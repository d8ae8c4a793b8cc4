"""The bodies of /v1/chat/completions and /v1/completions.

What OpenAI's API has and we cannot do is refused by name (several choices, log-probabilities, tools, structured
output); what cannot change the answer (`user`, `store`, ...) is accepted; what nobody knows is refused, because a
misspelt parameter would otherwise be one that silently does nothing. Beyond OpenAI's: `top_k`, `min_tokens`,
`ignore_eos`, `continuous_usage_stats`, as other servers call them, and of what load generators always send (vLLM's
`repetition_penalty`) the value that changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from typing_extensions import Self

from puzzle_trtllm.serve.openai.errors import ApiError, unsupported
from puzzle_trtllm.serve.triton.request import MAX_STOP_LENGTH, MAX_STOP_STRINGS

T = TypeVar("T")
Items = Annotated[list[T], Field(fail_fast=True)]
"""A list whose first wrong item is told: collecting all of them took seconds, and a gigabyte, for one of 300,000."""

MAX_PROMPTS = 256
"""Prompts of one /v1/completions request."""

_REFUSED: Mapping[str, str] = {
    "logprobs": "this server gives no log-probabilities",
    "top_logprobs": "this server gives no log-probabilities",
    "prompt_logprobs": "this server gives no log-probabilities",
    "echo": "this server does not repeat prompts, and gives no log-probabilities of them",
    "suffix": "this server completes at the end only",
    "logit_bias": "this server does not bias tokens",
    "tools": "this server calls no tools: put what the model needs into the messages",
    "functions": "this server calls no functions: put what the model needs into the messages",
    "audio": "this server speaks text only",
    "prediction": "this server takes no predicted output",
    "web_search_options": "this server does not search",
}
_ASKED_BY_ZERO = ("logprobs", "prompt_logprobs")
"""0 asks for no alternatives, but for the log-probability of every token."""
_WITHOUT_EFFECT = frozenset(
    [
        "user",
        "metadata",
        "store",
        "service_tier",
        "parallel_tool_calls",
        "safety_identifier",
        "prompt_cache_key",
        "tool_choice",
        "function_call",
    ]
)
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "modalities": (None, ["text"]),
    "response_format": (None, {"type": "text"}),
    "repetition_penalty": (None, 1.0),
    "min_p": (None, 0.0),
}


class StreamOptions(BaseModel):
    """`stream_options`."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    continuous_usage_stats: bool = False
    """With `include_usage`: the counts so far in every chunk."""
    include_obfuscation: Literal[False] | None = None
    """Padding that hides the lengths of chunks from who watches the network; there is none."""


class Message(BaseModel):
    """One turn. Content may be a text or a list of text parts."""

    model_config = ConfigDict(extra="forbid")

    role: str
    content: str | Items[dict[str, Any]] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    """What an assistant's turn thought, as this server gave it."""
    refusal: None = None
    audio: None = None
    annotations: list[Any] | None = None
    tool_calls: Annotated[list[Any] | None, Field(max_length=0)] = None
    function_call: None = None

    def text(self) -> str:
        """Raises ApiError for parts that are no text."""
        if isinstance(self.content, str) or self.content is None:
            return self.content or ""
        for part in self.content:
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ApiError(f"messages: a content part of type {part.get('type')!r}; only text", param="messages")
        return "".join(part["text"] for part in self.content)


class _Generation(BaseModel):
    """What both requests have."""

    model_config = ConfigDict(extra="forbid")

    model: str
    max_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=2**31 - 1)
    seed: int | None = Field(default=None, ge=0, lt=2**64)
    stop: str | Items[str] | None = None
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    min_tokens: int | None = Field(default=None, ge=0, le=2**31 - 1)
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @classmethod
    def parse(cls, body: Any) -> Self:
        """Raises ApiError, status 400, in the words of the first thing that is wrong."""
        if not isinstance(body, dict):
            raise ApiError("the request body is not a JSON object")
        for name, why in _REFUSED.items():
            if _is_asked(name, body.get(name)):
                raise unsupported(name, why)
        for name, values in _ONLY.items():
            if body.get(name) not in values:
                raise unsupported(name, f"only {values[-1]!r}, found {body[name]!r}")
        rest = {k: v for k, v in body.items() if k not in _REFUSED and k not in _ONLY and k not in _WITHOUT_EFFECT}
        for name in rest:
            if name not in cls.model_fields:
                raise ApiError(f"unknown parameter: {name}", param=name, code="unknown_parameter")
        try:
            request = cls.model_validate(rest)
        except ValidationError as error:
            raise _first(error) from None
        _check_stops(request.stops)
        if request.stream_options is not None and not request.stream:
            raise ApiError("stream_options: only with stream: true", param="stream_options")
        return request

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


class ChatRequest(_Generation):
    """/v1/chat/completions."""

    messages: Items[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1)
    """The same as `max_tokens`, and wins: reasoning and answer together."""
    reasoning_effort: Literal["low", "medium", "high"] | None = None


class CompletionRequest(_Generation):
    """/v1/completions. A prompt is a text or token ids; a list of prompts gives a choice each."""

    prompt: str | Items[int] | Items[str] | Items[Items[int]]

    def prompts(self) -> list[str | list[int]]:
        """Raises ApiError for no or too many prompts."""
        given = self.prompt
        several = isinstance(given, list) and (not given or not isinstance(given[0], int))
        prompts: list[Any] = list(given) if several else [given]
        if not 1 <= len(prompts) <= MAX_PROMPTS or any(not prompt for prompt in prompts):
            raise ApiError(f"prompt: expected 1 to {MAX_PROMPTS} prompts, none of them empty", param="prompt")
        if self.stream and len(prompts) > 1:
            raise ApiError("prompt: only one prompt with stream: true", param="prompt")
        return prompts


def _is_asked(name: str, value: Any) -> bool:
    """Whether the value of a parameter that we do not have wants something. False equals 0."""
    return value not in (None, False, [], {}) or (name in _ASKED_BY_ZERO and value == 0 and value is not False)


def _check_stops(stops: list[str]) -> None:
    if "" in stops:
        raise ApiError("stop: an empty stop string", param="stop")
    if len(stops) > MAX_STOP_STRINGS:
        raise ApiError(f"stop: {len(stops)} strings, expected at most {MAX_STOP_STRINGS}", param="stop")
    longest = max(map(len, stops), default=0)
    if longest > MAX_STOP_LENGTH:
        raise ApiError(f"stop: a string of {longest} characters, expected at most {MAX_STOP_LENGTH}", param="stop")


def _first(error: ValidationError) -> ApiError:
    problem = error.errors()[0]
    place = ".".join(str(part) for part in problem["loc"] if not str(part).startswith(("list[", "constrained-")))
    param = str(problem["loc"][0]) if problem["loc"] else None
    if problem["type"] == "extra_forbidden":
        return ApiError(f"unknown parameter: {place}", param=place, code="unknown_parameter")
    if problem["type"] == "missing":
        return ApiError(f"missing parameter: {place}", param=place, code="missing_required_parameter")
    return ApiError(f"{place}: {problem['msg']}", param=param, code="invalid_value")
