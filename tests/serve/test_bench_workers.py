"""One load from several processes: nothing is lost, nothing is sent twice, and a worker's death is an error."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

import pytest

from puzzle_trtllm.errors import BenchError, ServeError
from puzzle_trtllm.scenario import Scenario
from puzzle_trtllm.serve.bench.runner import run_bench, run_open_loop
from puzzle_trtllm.serve.bench.workers import choose_workers
from puzzle_trtllm.serve.client.request import GenerationChunk, GenerationRequest
from tests.serve.fake_client import FakeClient, one_token_a_response
from tests.serve.virtual_time import VirtualTime

LOAD = Scenario(name="shared", input_tokens=6, output_tokens=4, concurrency=5, num_requests=23, warmup_requests=2)


@pytest.fixture(scope="module")
def tokenizer_folder(make_checkpoint):
    return make_checkpoint([(4, None)])


class Together(FakeClient):
    """Answers a worker when all that may be in flight are: else the first to start could have answered everything."""

    def __init__(self, script, folder: Path) -> None:
        super().__init__(script)
        self.folder = folder

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        if multiprocessing.parent_process() is not None:
            (self.folder / uuid.uuid4().hex).touch()
            while len(list(self.folder.iterdir())) < LOAD.concurrency:
                await asyncio.sleep(0.01)
        async with aclosing(super().stream(request)) as chunks:
            async for chunk in chunks:
                yield chunk


class OnTime(FakeClient):
    """Has virtual time in the process that is connected."""

    async def __aenter__(self) -> FakeClient:
        clock, self.perf_counter_ns = VirtualTime(), time.perf_counter_ns
        clock.rule(asyncio.get_running_loop())
        time.perf_counter_ns = clock.perf_counter_ns
        return self

    async def __aexit__(self, *_: object) -> None:
        time.perf_counter_ns = self.perf_counter_ns


def bench(script, tokenizer_folder, run=run_bench, client=None, **options):
    client = client or FakeClient(script)
    options = {"scenario": LOAD, "workers": 2, **options}
    return run("host:1", tokenizer_folder=tokenizer_folder, connect=client.connect, quiet=True, **options)


def test_every_request_is_sent_once_and_measured(tokenizer_folder, tmp_path):
    before_ns = time.perf_counter_ns()
    result = bench(None, tokenizer_folder, client=Together(one_token_a_response, tmp_path))
    assert (result.requests.completed, result.requests.total) == (23, 23)
    assert (result.scalars["mean_output_tokens"], result.distributions["itl_ms"].count) == (4, 23 * 3)
    # The steady window needs all five in flight at one moment of one clock.
    assert 0 < result.steady_window_s <= result.wall_s < (time.perf_counter_ns() - before_ns) / 1e9
    assert result.client.workers == 2 and result.client.busiest_cpu > 0


def test_an_open_loop_keeps_one_schedule(tokenizer_folder):
    client = OnTime(one_token_a_response)
    result = bench(None, tokenizer_folder, run_open_loop, client, request_rate=100, arrival="constant")
    assert result.requests.completed == 23
    assert result.queue.offered_requests_per_s == pytest.approx(100, rel=0.1)
    assert 22 / 100 <= result.wall_s < 22 / 100 + 0.1


def dies(index, request):
    if index == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return one_token_a_response(index, request)


def test_a_dead_worker_is_an_error_not_a_lighter_load(tokenizer_folder):
    with pytest.raises(BenchError, match=r"workers: load worker \d of 2 died, .* \(found exit code -9\)"):
        bench(dies, tokenizer_folder)


def refuses(index, request):
    return ServeError("the queue is full", status="UNAVAILABLE")


def test_a_server_that_answers_nothing_is_given_up_on(tokenizer_folder):
    load = LOAD.model_copy(update={"num_requests": 5_000, "warmup_requests": 0})
    with pytest.raises(BenchError, match=r"zero successful requests: .*the queue is full"):
        bench(refuses, tokenizer_folder, scenario=load)


def test_large_loads_get_more_processes_and_never_more_than_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert [choose_workers(concurrency=n) for n in (1, 64, 65, 128, 4096)] == [1, 1, 2, 2, 8]
    assert [choose_workers(tokens_per_s=n) for n in (0, 2000, 2001, 1e6)] == [1, 1, 2, 8]
