"""One load from several processes: nothing is lost, nothing is sent twice, and a worker's death is an error."""

from __future__ import annotations

import os
import signal
import time

import pytest

from puzzle_trtllm.errors import BenchError, ServeError
from puzzle_trtllm.scenario import Scenario
from puzzle_trtllm.serve.bench.runner import run_bench, run_open_loop
from puzzle_trtllm.serve.bench.workers import choose_workers
from tests.serve.fake_client import FakeClient, one_token_a_response

LOAD = Scenario(name="shared", input_tokens=6, output_tokens=4, concurrency=5, num_requests=23, warmup_requests=2)


@pytest.fixture(scope="module")
def tokenizer_folder(make_checkpoint):
    return make_checkpoint([(4, None)])


def bench(script, tokenizer_folder, run=run_bench, **options):
    client = FakeClient(script)
    options = {"scenario": LOAD, "workers": 2, **options}
    return run("host:1", tokenizer_folder=tokenizer_folder, connect=client.connect, quiet=True, **options)


def test_every_request_is_sent_once_and_measured(tokenizer_folder):
    before_ns = time.perf_counter_ns()
    result = bench(one_token_a_response, tokenizer_folder)
    assert (result.requests.completed, result.requests.total) == (23, 23)
    assert (result.scalars["mean_output_tokens"], result.distributions["itl_ms"].count) == (4, 23 * 3)
    # The steady window needs all five in flight at one moment of one clock.
    assert 0 < result.steady_window_s <= result.wall_s < (time.perf_counter_ns() - before_ns) / 1e9
    assert result.client.workers == 2 and result.client.busiest_cpu > 0


def test_an_open_loop_keeps_one_schedule(tokenizer_folder):
    result = bench(one_token_a_response, tokenizer_folder, run_open_loop, request_rate=100, arrival="constant")
    assert result.requests.completed == 23
    assert result.queue.offered_requests_per_s == pytest.approx(100, rel=0.1)
    assert 22 / 100 <= result.wall_s < 22 / 100 + 1


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
