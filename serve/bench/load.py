"""A closed loop: `concurrency` requests in flight, the next one sent as soon as one ends.

Why closed: the question here is how much a server can do, and an open loop (a fixed arrival rate) above that only
measures the growth of its queue. The loop is written against a `stream` function, one request in, chunks out, so that
tests drive it with a scripted server; `puzzle_trtllm.serve.client` provides the real one.

The trap of every load generator is its own cost: what happens between two chunks is one append per token, and nothing
is computed before the run is over.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from puzzle_trtllm.errors import BenchError, ServeError
from puzzle_trtllm.serve.client.request import GenerationChunk, GenerationRequest
from puzzle_trtllm.serve.metrics.records import RequestRecord, RequestStatus

Stream = Callable[[GenerationRequest], AsyncGenerator[GenerationChunk, None]]
"""Sends one request and yields its chunks (`TritonLlmClient.stream`). Raises ServeError."""

IsTruncated = Callable[[GenerationRequest, int, "str | None"], bool]
"""(request, number of generated tokens, finish reason) -> whether the answer was cut."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One request, what came back, and its times."""

    request: GenerationRequest
    record: RequestRecord
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    pieces: tuple[tuple[int, int], ...] = ()
    """From a server that tells no counts: (arrival ns, characters of `text` so far) of each response with text."""


class LoadObserver(Protocol):
    """Is told what happens while a load runs; must return at once."""

    def on_tokens(self, count: int) -> None: ...
    def on_end(self, record: RequestRecord) -> None: ...


async def hold_concurrency(
    stream: Stream,
    requests: Sequence[GenerationRequest],
    *,
    concurrency: int,
    is_truncated: IsTruncated,
    observer: LoadObserver,
    turns: Iterator[int] | None = None,
) -> list[Answer]:
    """Run `requests` through `stream`, `concurrency` at a time; answers in the order of `requests`.

    turns: which request is sent next, where other processes send some of them (workers.py).

    A failed request is recorded and its place taken by the next one, but a server that has answered nothing when
    `concurrency` requests have failed is given up on: raises BenchError with the first reason. Not with `turns`: who
    shares requests sees too few of them to tell.
    """
    answers: dict[int, Answer] = {}
    waiting = iter(range(len(requests))) if turns is None else turns

    async def worker() -> None:
        for index in waiting:
            answers[index] = answer = await send(stream, requests[index], is_truncated, observer)
            observer.on_end(answer.record)
            if turns is None:
                give_up_on_a_dead_server(answers, concurrency)

    workers = [asyncio.create_task(worker()) for _ in range(min(concurrency, len(requests)))]
    try:
        await asyncio.gather(*workers)
    finally:
        for task in workers:
            task.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    return [answers[index] for index in sorted(answers)]


def give_up_on_a_dead_server(answers: dict[int, Answer], concurrency: int) -> None:
    """Raise BenchError when `concurrency` requests have ended and none was answered."""
    if len(answers) == concurrency and not any(answer.record.is_answered for answer in answers.values()):
        reason = next(iter(answers.values())).record.error
        raise BenchError(f"zero successful requests: the first {concurrency} failed, the first with: {reason}")


async def send(
    stream: Stream,
    request: GenerationRequest,
    is_truncated: IsTruncated,
    observer: LoadObserver,
    *,
    sent_ns: int | None = None,
) -> Answer:
    """Stream one request to its end and record it, however it ends. `sent_ns` starts its clock earlier than now."""
    times_ns: list[int] = []
    texts: list[str] = []
    pieces: list[tuple[int, int]] = []
    characters = 0
    token_ids: list[int] = []
    finish_reason, error = None, None
    status: RequestStatus = "completed"
    sent_ns = time.perf_counter_ns() if sent_ns is None else sent_ns
    try:
        async with aclosing(stream(request)) as chunks:
            async for chunk in chunks:
                new_tokens = _count_new_tokens(chunk, len(times_ns))
                times_ns.extend([chunk.received_ns] * new_tokens)
                texts.append(chunk.text)
                if chunk.num_output_tokens is None and chunk.text:
                    characters += len(chunk.text)
                    pieces.append((chunk.received_ns, characters))
                token_ids.extend(chunk.token_ids)
                finish_reason = chunk.finish_reason or finish_reason
                observer.on_tokens(new_tokens)
    except ServeError as problem:
        status, error = ("cancelled" if problem.status == "CANCELLED" else "failed"), str(problem)
    end_ns = time.perf_counter_ns()
    if status == "completed" and not times_ns:
        status, error = "failed", "the answer holds no token"
    elif status == "completed" and is_truncated(request, len(times_ns), finish_reason):
        status = "truncated"
    record = RequestRecord(sent_ns=sent_ns, end_ns=end_ns, status=status, token_times_ns=tuple(times_ns), error=error)
    return Answer(
        request=request,
        record=record,
        text="".join(texts),
        token_ids=tuple(token_ids),
        finish_reason=finish_reason,
        pieces=tuple(pieces),
    )


def _count_new_tokens(chunk: GenerationChunk, tokens_so_far: int) -> int:
    """Tokens that `chunk` brings by the server's own count; without one, a response with text counts as one."""
    if chunk.num_output_tokens is not None:
        return chunk.num_output_tokens - tokens_so_far
    return int(bool(chunk.text))


def errors_of(answers: Sequence[Answer]) -> Iterator[str]:
    """Reasons of the requests that were not answered, in order."""
    return (answer.record.error for answer in answers if answer.record.error is not None)
