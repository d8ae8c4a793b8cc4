"""One load from several processes, so that the client is never what limits it.

One Python process reads some thousands of responses a second; a server with many requests in flight and a response a
token sends more. Then `workers` processes, each with a connection of its own, share the load:

    closed loop   every worker holds its part of the concurrency and takes the next request from one shared counter, so
                  the whole load is in flight until no request is left, whichever worker is faster
    open loop     request i belongs to worker i mod N, and every worker keeps the one schedule

Results are not averaged: workers send back every request's record, and metrics are computed over all of them, as if one
process had made them. That needs one clock: `time.perf_counter_ns` is the machine's monotonic clock, the same in all
processes (`require_shared_clock`). A worker that dies ends the run with an error: fewer requests are a lighter load.

Workers are spawned, not forked (gRPC has threads): a script that measures with several needs the usual
`if __name__ == "__main__":`.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from puzzle_trtllm.child_processes import end_with_parent, interrupts_blocked
from puzzle_trtllm.errors import BenchError, PuzzleError
from puzzle_trtllm.serve.bench.load import Answer, IsTruncated, hold_concurrency
from puzzle_trtllm.serve.bench.open_loop import DEAD_AFTER_REQUESTS, OpenLoopRun, follow_schedule
from puzzle_trtllm.serve.bench.progress import LoadProgress
from puzzle_trtllm.serve.bench.target import Connect
from puzzle_trtllm.serve.client.request import GenerationRequest
from puzzle_trtllm.serve.metrics.records import RequestRecord

IN_FLIGHT_PER_WORKER = 64
"""Closed loop: what `workers="auto"` gives to one process."""
TOKENS_PER_S_PER_WORKER = 2_000
"""Open loop: likewise; about half of what one process can read when every token is a response (docs/performance.md)."""
REPORT_S = 0.25
START_DELAY_NS = 100_000_000
"""Until the first request, so that the word to start has reached every worker."""
CONNECT_TIMEOUT_S = 120


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """When requests are sent: `concurrency` at a time, or each at its moment (ns after the start)."""

    concurrency: int | None = None
    times_ns: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class WorkersRun:
    """What all workers brought together."""

    run: OpenLoopRun
    """Answers in the order of the requests."""
    workers: int
    busiest_cpu: float
    """CPU seconds a second of the process that used most."""


@dataclass(frozen=True, kw_only=True)
class _Job:
    url: str
    connect: Connect
    requests: tuple[GenerationRequest, ...]
    """All of them in a closed loop, the worker's own in an open one."""
    pattern: Pattern
    """Of this worker alone."""
    is_truncated: IsTruncated


@dataclass(frozen=True, kw_only=True)
class _News:
    """What has happened in a worker since it last said so."""

    tokens: int = 0
    ended: int = 0
    answered: int = 0
    problems: int = 0
    first_error: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Share:
    """A worker's result: answers without their requests, by the index in the worker's list."""

    indexes: tuple[int, ...]
    answers: tuple[Answer, ...]
    max_send_delay_ms: float
    cpu: float


def choose_workers(*, concurrency: int | None = None, tokens_per_s: float = 0.0) -> int:
    """How many processes a load gets by default: one, unless it is large; never more than the cores we may use."""
    wanted = concurrency / IN_FLIGHT_PER_WORKER if concurrency is not None else tokens_per_s / TOKENS_PER_S_PER_WORKER
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, math.ceil(wanted)))


def require_shared_clock() -> None:
    """Raise BenchError where processes have clocks of their own."""
    found = time.get_clock_info("perf_counter").implementation
    if "MONOTONIC" not in found and "mach_absolute_time" not in found:
        raise BenchError("times of several processes cannot be compared here", key="workers", found=found, expected=1)


def drive_in_workers(
    url: str,
    requests: Sequence[GenerationRequest],
    pattern: Pattern,
    *,
    workers: int,
    connect: Connect,
    is_truncated: IsTruncated,
    progress: LoadProgress,
) -> WorkersRun:
    """Send `requests` as `pattern` says, from `workers` processes.

    Raises BenchError when a worker dies, or when the server has answered nothing; ServeError when it does not answer.
    """
    require_shared_clock()
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    shares = _split(requests, pattern, workers)
    crew = _Crew(num_requests=len(requests), dead_after=pattern.concurrency or DEAD_AFTER_REQUESTS, progress=progress)
    try:
        with interrupts_blocked():
            for share, part in shares:
                job = _Job(
                    url=url,
                    connect=connect,
                    requests=tuple(requests[index] for index in share),
                    pattern=part,
                    is_truncated=is_truncated,
                )
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs, job, counter), daemon=True)
                process.start()
                theirs.close()
                crew.add(process, ours)
        results = crew.run()
    finally:
        crew.end()
    answers: dict[int, Answer] = {}
    for (share, _), result in zip(shares, results, strict=True):
        for index, answer in zip(result.indexes, result.answers, strict=True):
            answers[share[index]] = replace(answer, request=requests[share[index]])
    if len(answers) != len(requests):
        raise BenchError("the workers lost requests", found=len(answers), expected=len(requests))
    return WorkersRun(
        run=OpenLoopRun(
            answers=[answers[index] for index in sorted(answers)],
            max_send_delay_ms=max(result.max_send_delay_ms for result in results),
        ),
        workers=len(results),
        busiest_cpu=max(result.cpu for result in results),
    )


def _split(
    requests: Sequence[GenerationRequest], pattern: Pattern, workers: int
) -> list[tuple[Sequence[int], Pattern]]:
    """(indexes of the requests it must know, its pattern) of each worker; none is left without work."""
    if pattern.concurrency is None:
        parts = [range(first, len(requests), workers) for first in range(min(workers, len(requests)))]
        return [(part, Pattern(times_ns=tuple(pattern.times_ns[index] for index in part))) for part in parts]
    workers = min(workers, pattern.concurrency)
    each, extra = divmod(pattern.concurrency, workers)
    return [(range(len(requests)), Pattern(concurrency=each + (place < extra))) for place in range(workers)]


class _Crew:
    """The workers as their parent sees them."""

    def __init__(self, *, num_requests: int, dead_after: int, progress: LoadProgress) -> None:
        self._members: list[tuple[BaseProcess, Connection]] = []
        self._dead_after = min(dead_after, num_requests)
        self._progress = progress
        self._ended = self._answered = 0

    def add(self, process: BaseProcess, pipe: Connection) -> None:
        self._members.append((process, pipe))

    def run(self) -> list[_Share]:
        """Wait until all are connected, start them together, and collect what they bring."""
        pipes = [pipe for _, pipe in self._members]
        for index, pipe in enumerate(pipes):
            if not pipe.poll(CONNECT_TIMEOUT_S):
                raise BenchError(f"load worker {index + 1} did not start within {CONNECT_TIMEOUT_S} s")
            self._receive(index)
        start_ns = time.perf_counter_ns() + START_DELAY_NS
        for index, pipe in enumerate(pipes):
            try:
                pipe.send(start_ns)
            except OSError:
                raise self._death(index) from None
        results: dict[int, _Share] = {}
        while len(results) < len(pipes):
            waiting = [index for index in range(len(pipes)) if index not in results]
            readable = wait([pipes[index] for index in waiting])
            for index in [index for index in waiting if pipes[index] in readable]:
                message = self._receive(index)
                if isinstance(message, _Share):
                    results[index] = message
        return [results[index] for index in range(len(pipes))]

    def end(self) -> None:
        """Nobody outlives the run."""
        for process, _ in self._members:
            process.terminate()
        for process, pipe in self._members:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
            pipe.close()

    def _receive(self, index: int) -> object:
        try:
            message = self._members[index][1].recv()
        except (EOFError, OSError):
            raise self._death(index) from None
        if isinstance(message, Exception):
            raise message
        if isinstance(message, _News):
            self._take_in(message)
        return message

    def _take_in(self, news: _News) -> None:
        self._progress.add(tokens=news.tokens, ended=news.ended, problems=news.problems)
        self._ended += news.ended
        self._answered += news.answered
        if self._ended >= self._dead_after and not self._answered:
            raise BenchError(
                f"zero successful requests: the first {self._ended} failed, one of them with: {news.first_error}"
            )

    def _death(self, index: int) -> BenchError:
        process = self._members[index][0]
        process.join(5)
        return BenchError(
            f"load worker {index + 1} of {len(self._members)} died, so the load was not held; run again",
            key="workers",
            found=f"exit code {process.exitcode}",
        )


# --- in the worker --------------------------------------------------------------------------------------------------


def _work(pipe: Connection, job: _Job, counter: Any) -> None:
    end_with_parent()
    try:
        asyncio.run(_load(pipe, job, counter))
    except PuzzleError as error:
        with contextlib.suppress(OSError):
            pipe.send(error)
    except (OSError, EOFError):
        pass  # the parent is gone


async def _load(pipe: Connection, job: _Job, counter: Any) -> None:
    async with job.connect(job.url) as target:
        pipe.send("ready")
        start_ns = await asyncio.to_thread(pipe.recv)
        listener = _Listener()
        speaker = asyncio.create_task(_speak(pipe, listener))
        began_s, cpu_s = time.perf_counter(), time.process_time()
        load = asyncio.create_task(_drive(target.stream, job, counter, listener, start_ns))
        await asyncio.wait((load, speaker), return_when=asyncio.FIRST_COMPLETED)
        if not load.done():  # only an error ends the speaker
            load.cancel()
            await speaker
        indexes, answers, delay_ms = await load
        cpu = (time.process_time() - cpu_s) / (time.perf_counter() - began_s)
        speaker.cancel()
        pipe.send(listener.take())
        bare = tuple(replace(answer, request=_NO_REQUEST) for answer in answers)
        pipe.send(_Share(indexes=indexes, answers=bare, max_send_delay_ms=delay_ms, cpu=cpu))


_NO_REQUEST = GenerationRequest(prompt="")
"""The parent has the requests; prompts need not travel back."""


async def _drive(
    stream: Any, job: _Job, counter: Any, listener: _Listener, start_ns: int
) -> tuple[tuple[int, ...], list[Answer], float]:
    if job.pattern.concurrency is None:
        run = await follow_schedule(
            stream,
            job.requests,
            times_ns=job.pattern.times_ns,
            is_truncated=job.is_truncated,
            observer=listener,
            start_ns=start_ns,
        )
        return tuple(range(len(job.requests))), run.answers, run.max_send_delay_ms
    await asyncio.sleep(max(0, start_ns - time.perf_counter_ns()) / 1e9)
    taken: list[int] = []
    answers = await hold_concurrency(
        stream,
        job.requests,
        concurrency=job.pattern.concurrency,
        is_truncated=job.is_truncated,
        observer=listener,
        turns=_turns(counter, len(job.requests), taken),
    )
    return tuple(sorted(taken)), answers, 0.0


def _turns(counter: Any, num_requests: int, taken: list[int]) -> Iterator[int]:
    """The next request that no worker has taken yet."""
    while True:
        with counter.get_lock():
            index = counter.value
            counter.value = index + 1
        if index >= num_requests:
            return
        taken.append(index)
        yield index


class _Listener:
    """A LoadObserver that counts."""

    def __init__(self) -> None:
        self._tokens = self._ended = self._answered = self._problems = 0
        self._first_error: str | None = None

    def on_tokens(self, count: int) -> None:
        self._tokens += count

    def on_end(self, record: RequestRecord) -> None:
        self._ended += 1
        self._answered += record.is_answered
        self._problems += record.status != "completed"
        self._first_error = self._first_error or record.error

    def take(self) -> _News:
        """What was counted since the last call."""
        news = _News(
            tokens=self._tokens,
            ended=self._ended,
            answered=self._answered,
            problems=self._problems,
            first_error=self._first_error,
        )
        self._tokens = self._ended = self._answered = self._problems = 0
        return news


async def _speak(pipe: Connection, listener: _Listener) -> None:
    """Tell the parent what happens; raises OSError when it is gone."""
    while True:
        await asyncio.sleep(REPORT_S)
        pipe.send(listener.take())
