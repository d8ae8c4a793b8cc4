"""An open loop: requests leave on a schedule of their own, whether or not earlier ones have been answered.

The schedule is drawn before the run: constant gaps of 1 / rate, or exponential ones of that mean (a Poisson process,
what many independent users look like). Equal seeds give equal schedules, so two servers see the same bursts.

The trap is coordinated omission: a client that falls behind its schedule and measures from the moment it really sent
hides exactly the waiting that it was to measure. Here a request's clock starts at its scheduled arrival.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from puzzle_trtllm.scenario import Arrival
from puzzle_trtllm.serve.bench.load import Answer, IsTruncated, LoadObserver, Stream, give_up_on_a_dead_server, send
from puzzle_trtllm.serve.client.request import GenerationRequest

DEAD_AFTER_REQUESTS = 8
"""A server that has answered nothing when so many requests have failed is given up on."""


@dataclass(frozen=True, kw_only=True)
class OpenLoopRun:
    """Answers in the order of the schedule, and how late the client was at worst."""

    answers: list[Answer]
    max_send_delay_ms: float


def arrival_times_ns(num_requests: int, *, request_rate: float, arrival: Arrival, seed: int) -> list[int]:
    """When each request arrives, ns after the start, ascending; the first one at 0. `request_rate` per second."""
    rng = random.Random(f"arrivals {seed}")  # a stream of its own: prompts are drawn from the plain seed
    gaps = (
        rng.expovariate(request_rate) if arrival == "poisson" else 1 / request_rate for _ in range(num_requests - 1)
    )
    return [round(seconds * 1e9) for seconds in accumulate(gaps, initial=0.0)]


async def follow_schedule(
    stream: Stream,
    requests: Sequence[GenerationRequest],
    *,
    times_ns: Sequence[int],
    is_truncated: IsTruncated,
    observer: LoadObserver,
    start_ns: int | None = None,
) -> OpenLoopRun:
    """Send request i at `times_ns[i]` after `start_ns`, or after now. The number in flight has no limit.

    Raises BenchError with the first reason when the first DEAD_AFTER_REQUESTS requests that ended all failed; not with
    a given start: who shares requests with other processes (workers.py) sees too few of them to tell.
    """
    answers: dict[int, Answer] = {}
    shared = start_ns is not None
    start_ns = time.perf_counter_ns() if start_ns is None else start_ns
    delays_ns = [0]

    async def one(index: int) -> None:
        due_ns = start_ns + times_ns[index]
        while (early_ns := due_ns - time.perf_counter_ns()) > 0:
            await asyncio.sleep(early_ns / 1e9)
        delays_ns.append(-early_ns)
        answers[index] = await send(stream, requests[index], is_truncated, observer, sent_ns=due_ns)
        observer.on_end(answers[index].record)
        if not shared:
            give_up_on_a_dead_server(answers, min(DEAD_AFTER_REQUESTS, len(requests)))

    tasks = [asyncio.create_task(one(index)) for index in range(len(requests))]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return OpenLoopRun(answers=[answers[index] for index in sorted(answers)], max_send_delay_ms=max(delays_ns) / 1e6)
