"""What a load needs of the outside: a connection to a server, and a tokenizer to make prompts with.

tritonclient is imported only when a connection is made.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

from puzzle_trtllm.chat import ChatTokenizer
from puzzle_trtllm.engine import Engine
from puzzle_trtllm.errors import BenchError
from puzzle_trtllm.scenario import Load
from puzzle_trtllm.serve.client.request import GenerationChunk, GenerationRequest


class Target(Protocol):
    """A connected client."""

    @property
    def gives_token_ids(self) -> bool:
        """False for a stock llmapi server, which takes no token ids either."""
        ...

    @property
    def num_instances(self) -> int:
        """Engines in the server, each on GPUs of its own."""
        ...

    def stream(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]: ...


Connect = Callable[[str], AbstractAsyncContextManager[Target]]
"""url -> a context manager that gives a connected client; tests give a scripted one."""


def connect_triton(url: str) -> AbstractAsyncContextManager[Target]:
    """Our streaming gRPC client for the Triton server at `url`. Entering it raises ServeError when nobody answers."""
    from puzzle_trtllm.serve.client.triton_client import TritonLlmClient

    return TritonLlmClient(url)


def check_length(load: Load, engine: str | Path | None) -> None:
    """Raise BenchError when the engine behind the server says that the scenario's sequences do not fit.

    Only an engine folder tells its limit; without one the server's own refusal, or a truncated answer, has to.
    """
    if engine is None:
        return
    limit = Engine.open(str(engine)).max_seq_len
    if limit is not None and load.sequence_tokens > limit:
        raise BenchError(
            "longer than the engine's max_seq_len",
            file=f"scenario {load.name}",
            found=f"{load.longest_sequence} = {load.sequence_tokens} tokens",
            expected=f"at most {limit}",
        )


def prompt_tokenizer(*, engine: str | Path | None, tokenizer_folder: str | Path | None) -> ChatTokenizer:
    """The given tokenizer, or the engine's own.

    Raises BenchError when there is neither, CheckpointError for one with tokens that the engine does not have.
    """
    opened = None if engine is None else Engine.open(str(engine))
    if tokenizer_folder is None and opened is not None:
        tokenizer_folder = opened.model_path
    if tokenizer_folder is None:
        raise BenchError("missing: prompts need a tokenizer", key="--tokenizer", expected="it or --engine")
    tokenizer = ChatTokenizer.from_folder(tokenizer_folder)
    if opened is not None:
        tokenizer.check_vocabulary(opened.architecture.vocab_size)
    return tokenizer
