"""A client without a server: answers are scripted, and what was asked is kept."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable

from puzzle_trtllm.errors import ServeError
from puzzle_trtllm.serve.client.request import GenerationChunk, GenerationRequest

Script = Callable[[int, GenerationRequest], "list[list[int]] | ServeError"]
"""(index of the request, request) -> token ids response by response, or the error it ends with."""


class FakeClient:
    """Stands in for TritonLlmClient; also the `connect` of a run: `connect=client.connect`."""

    def __init__(self, script: Script, *, gives_token_ids: bool = True, finish_reason: str = "length") -> None:
        self.script = script
        self.gives_token_ids = gives_token_ids
        self.finish_reason = finish_reason
        self.num_instances = 1
        self.requests: list[GenerationRequest] = []
        self.in_flight: list[int] = []
        """Requests in flight, noted at every start."""
        self._open = 0

    def connect(self, url: str) -> FakeClient:
        self.url = url
        return self

    async def __aenter__(self) -> FakeClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        self._open += 1
        self.in_flight.append(self._open)
        responses = self.script(len(self.requests), request)
        self.requests.append(request)
        try:
            await asyncio.sleep(0.001)
            if isinstance(responses, ServeError):
                raise responses
            so_far = 0
            for index, token_ids in enumerate(responses):
                so_far += len(token_ids)
                yield GenerationChunk(
                    text="".join("x" for _ in token_ids),
                    token_ids=token_ids if self.gives_token_ids else [],
                    num_output_tokens=so_far if self.gives_token_ids else None,
                    finish_reason=self.finish_reason if index == len(responses) - 1 else None,
                    received_ns=time.perf_counter_ns(),
                )
                await asyncio.sleep(0.0005)
        finally:
            self._open -= 1


def one_token_a_response(_index: int, request: GenerationRequest) -> list[list[int]]:
    """As many tokens as were asked for."""
    return [[7]] * (request.max_tokens or 1)
