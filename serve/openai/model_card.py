"""The served model as its HTTP clients see it, and how their requests become ours.

Sampling: what a request leaves out comes from the model's own generation_config.json, and where that says nothing is
OpenAI's default, temperature 1. Whoever samples also gets a `top_p` (1 keeps every token), without which servers before
TensorRT-LLM 1.2 would be greedy; temperature 0 is greedy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from puzzle_trtllm.chat import ChatTokenizer
from puzzle_trtllm.engine import Engine
from puzzle_trtllm.errors import CheckpointError, PuzzleError
from puzzle_trtllm.harmony import speaks_harmony
from puzzle_trtllm.json_files import read_json_object
from puzzle_trtllm.serve.client.request import GenerationRequest
from puzzle_trtllm.serve.openai.errors import ApiError, unsupported
from puzzle_trtllm.serve.openai.protocol import ChatRequest, CompletionRequest
from puzzle_trtllm.serve.triton.request import max_text_length
from puzzle_trtllm.yaml_files import as_model

COMPLETION_TOKENS = 16
"""OpenAI's default of max_tokens at /v1/completions; a chat may fill the context."""


class _Sampling(BaseModel):
    """What generation_config.json may say of sampling, as a server takes it; null says nothing."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    do_sample: bool | None = None
    temperature: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=2**31 - 1)


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What the front knows of the engine behind it."""

    name: str
    tokenizer: ChatTokenizer
    max_seq_len: int
    """Prompt and answer together."""
    generation_config: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_engine(cls, engine: Engine, name: str | None = None) -> ModelCard:
        """Raises CheckpointError without a tokenizer, for a generation config that is none, or impossible defaults."""
        file = engine.model_path / "generation_config.json"
        given = read_json_object(file, CheckpointError) if file.is_file() else {}
        sampling = as_model(given, _Sampling, file, CheckpointError)
        limit = engine.max_seq_len or engine.architecture.max_position_embeddings
        return cls(
            name=name or engine.path.name,
            tokenizer=ChatTokenizer.from_folder(engine.model_path),
            max_seq_len=limit,
            generation_config=sampling.model_dump(exclude_none=True),
        )

    @cached_property
    def has_channels(self) -> bool:
        """Whether answers come in harmony's channels."""
        return speaks_harmony(self.tokenizer.tokenizer)

    def require(self, name: str) -> None:
        """Raises ApiError, 404, for another model's name."""
        if name != self.name:
            message = f"the model {name!r} does not exist; this server has {self.name!r}"
            raise ApiError(message, status=404, param="model", code="model_not_found")

    def of_chat(self, request: ChatRequest, request_id: str) -> GenerationRequest:
        """Render the model's own chat template. Raises ApiError where it refuses, or the prompt does not fit."""
        try:
            if request.reasoning_effort is not None and not self.tokenizer.template_takes("reasoning_effort"):
                raise unsupported("reasoning_effort", "this model's chat template has none")
            prompt = self.tokenizer.render_chat(
                [_turn(message.role, message.text(), message.reasoning_content) for message in request.messages],
                reasoning_effort=request.reasoning_effort,
            )
        except CheckpointError as error:
            raise ApiError(f"messages: {error}", param="messages") from None
        ids = self._encode(prompt, "messages")
        room = self._room(ids, "messages")
        wanted = request.max_completion_tokens or request.max_tokens or room
        # In channels a stop string ends the answer, not the thinking before it: answers.py watches for it.
        stops = [] if self.has_channels else request.stops
        return self._generation(request, ids, min(wanted, room), stops, request_id)

    def of_completion(self, request: CompletionRequest, prompt: str | list[int], request_id: str) -> GenerationRequest:
        """The prompt as it stands. Raises ApiError when it does not fit or holds impossible token ids."""
        ids = self._encode(prompt, "prompt") if isinstance(prompt, str) else prompt
        room = self._room(ids, "prompt")
        wanted = request.max_tokens or COMPLETION_TOKENS
        return self._generation(request, ids, min(wanted, room), request.stops, request_id)

    def _encode(self, text: str, param: str) -> list[int]:
        if len(text) > max_text_length(self.max_seq_len):
            message = (
                f"{param}: {len(text)} characters, and this model's context has room for {self.max_seq_len} tokens"
            )
            raise ApiError(message, param=param, code="context_length_exceeded")
        try:
            return self.tokenizer.encode(text)
        except PuzzleError as error:
            raise ApiError(f"{param}: {error}", param=param) from None

    def _room(self, ids: list[int], param: str) -> int:
        if not ids:
            raise ApiError(f"{param}: no tokens", param=param)
        if len(ids) >= self.max_seq_len:
            message = f"{param}: {len(ids)} tokens, and this model's context has room for {self.max_seq_len} in all"
            raise ApiError(message, param=param, code="context_length_exceeded")
        return self.max_seq_len - len(ids)

    def _generation(
        self,
        request: ChatRequest | CompletionRequest,
        ids: list[int],
        max_tokens: int,
        stops: list[str],
        request_id: str,
    ) -> GenerationRequest:
        return GenerationRequest(
            input_ids=ids,
            max_tokens=max_tokens,
            stop=stops or None,
            frequency_penalty=request.frequency_penalty or None,
            presence_penalty=request.presence_penalty or None,
            min_tokens=request.min_tokens,
            ignore_eos=request.ignore_eos,
            streaming=bool(request.stream) or (self.has_channels and bool(request.stops)),
            request_id=request_id,
            **self._sampling(request),
        )

    def _sampling(self, request: ChatRequest | CompletionRequest) -> dict[str, Any]:
        config = self.generation_config if self.generation_config.get("do_sample") else {}
        model_is_greedy = self.generation_config.get("do_sample") is False
        temperature = request.temperature
        if temperature is None:
            asked = request.top_p is not None or request.top_k is not None
            temperature = 0.0 if model_is_greedy and not asked else config.get("temperature", 1.0)
        if temperature == 0:
            return {}
        top_p = request.top_p if request.top_p is not None else config.get("top_p", 1.0)
        top_k = request.top_k if request.top_k is not None else config.get("top_k")
        return {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": request.seed}


def _turn(role: str, content: str, thinking: str | None) -> dict[str, str]:
    """A message as chat templates of reasoning models know it."""
    turn = {"role": role, "content": content}
    return turn | {"thinking": thinking} if thinking else turn
