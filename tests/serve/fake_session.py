"""A session between fakes: Triton's senders remember, and the runtime's steps are pushed by the test."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np

from puzzle_trtllm.serve.runtimes.api import CompletionOutput, SamplingParams
from puzzle_trtllm.serve.triton.outbox import Outbox
from puzzle_trtllm.serve.triton.request import RequestLimits
from puzzle_trtllm.serve.triton.session import Session
from tests.serve.scripted import HANG_S, wait_until


class Sender:
    """Triton's response sender, remembering; as there, nothing may be sent or asked after the final flag.

    `room` is the number of responses that shared memory still takes, `room_for_errors` that of errors; flags alone need
    none. As in Triton, a send that fails has closed the sender if it carried the final flag, and is the only one of a
    model not decoupled.
    """

    def __init__(self, *, room: float = math.inf, room_for_errors: float = math.inf, decoupled: bool = True) -> None:
        self.responses: list[tuple[object, int]] = []
        self.cancelled = False
        self.query_error: Exception | None = None
        self.failed_queries = 0
        self.room = {dict: room, tuple: room_for_errors, type(None): math.inf}
        self.allowed = math.inf if decoupled else 1
        self.closed = False
        self.gate = threading.Event()
        self.gate.set()

    @property
    def final(self) -> bool:
        return bool(self.responses) and self.responses[-1][1] == 1

    def send(self, response=None, flags: int = 0) -> None:
        assert self.gate.wait(HANG_S)
        assert not self.final, "sent after the final response"
        if self.closed:
            raise RuntimeError("Response sender has been closed.")
        if response is not None and self.allowed == 0:
            raise RuntimeError("Non-decoupled model cannot send more than one response.")
        self.closed = flags == 1
        self.allowed -= response is not None
        if self.room[type(response)] == 0:
            raise RuntimeError("Failed to increase the shared memory pool size")
        self.room[type(response)] -= 1
        self.responses.append((response, flags))

    def is_cancelled(self) -> bool:
        assert not self.final, "asked after the final response"
        if self.query_error is not None:
            self.failed_queries += 1
            raise self.query_error
        return self.cancelled

    @property
    def error(self) -> tuple[str, str]:
        wait_until(lambda: self.final, what="a final response")
        response = next(response for response, _ in reversed(self.responses) if response is not None)
        assert isinstance(response, tuple), response
        return response


class Encoder:
    FINAL = 1
    error_of_tensors: Exception | None = None

    def response(self, tensors):
        if self.error_of_tensors is not None:
            raise self.error_of_tensors
        return {name: array.tolist() for name, array in tensors}

    def error(self, status: str, message: str):
        return (status, message)


class Result:
    """A RequestOutput whose steps the test pushes: text, an exception, or None for the end."""

    def __init__(self, prompt) -> None:
        self.prompt = prompt
        self.prompt_token_ids = [1, 2, 3]
        self.outputs = [CompletionOutput()]
        self.finished = False
        self.aborted = False
        self.queue: asyncio.Queue = asyncio.Queue()
        self.loop = asyncio.get_running_loop()
        self.metrics = None

    def push(self, *steps) -> None:
        for step in steps:
            self.loop.call_soon_threadsafe(self.queue.put_nowait, step)

    def abort(self) -> None:
        self.aborted = True

    def __aiter__(self):
        return self

    async def __anext__(self):
        step = await self.queue.get()
        if isinstance(step, Exception):
            raise step
        if step is StopAsyncIteration:
            raise StopAsyncIteration
        completion = self.outputs[0]
        if step is None or step == "cancelled":
            self.finished, completion.finish_reason = True, step or "stop"
        else:
            completion.text += step
            completion.token_ids.append(len(completion.token_ids))
        return self


class Llm:
    def __init__(self) -> None:
        self.results: list[Result] = []
        self.submit_error: Exception | None = None
        self.healthy = True
        self.stats: list | Exception = []

    def generate_async(self, inputs, sampling_params, streaming=False):
        if self.submit_error is not None:
            raise self.submit_error
        self.results.append(Result(inputs))
        return self.results[-1]

    def get_stats(self, timeout=None):
        if isinstance(self.stats, Exception):
            raise self.stats
        return self.stats

    def _check_health(self) -> bool:
        return self.healthy


@contextmanager
def open_service(*, shared_memory: int = 1 << 30) -> Iterator[SimpleNamespace]:
    """A running session with room for two requests: llm, encoder, outbox, session.

    `shared_memory`: bytes of it that are free.
    """
    llm, encoder = Llm(), Encoder()
    outbox = Outbox(encoder, room=lambda: shared_memory, log=lambda message: None)
    session = Session(
        llm=llm, sampling_params=SamplingParams, outbox=outbox, limits=RequestLimits(max_seq_len=16),
        max_open_requests=2, sweep_period_s=0.005, log=lambda message: None,
    )  # fmt: skip
    try:
        yield SimpleNamespace(llm=llm, encoder=encoder, outbox=outbox, session=session)
    finally:
        session.stop()
        outbox.close()


def begin(service, *, request_id: str = "", sender: Sender | None = None, **flags) -> tuple[Sender, Result]:
    """Accept a request and wait until the runtime has it."""
    sender, before = sender or Sender(), len(service.llm.results)
    accept(service, sender, request_id=request_id, **flags)
    wait_until(lambda: len(service.llm.results) > before, what="submission")
    return sender, service.llm.results[-1]


def accept(service, sender: Sender, *, request_id: str = "", text: str = "hi", **flags) -> Sender:
    inputs = {"text_input": np.array([text.encode()], dtype=object)}
    inputs |= {name: np.array([value]) for name, value in flags.items()}
    service.session.accept(request_id, inputs, sender)
    return sender
