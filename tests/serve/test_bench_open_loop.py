"""The open loop: its schedule, and that it is kept whatever the server does."""

from __future__ import annotations

import asyncio
import statistics
import time
from itertools import pairwise

import pytest

from puzzle_trtllm.errors import BenchError, ConfigError, ServeError
from puzzle_trtllm.scenario import OpenScenario, Scenario
from puzzle_trtllm.serve.bench.open_loop import arrival_times_ns, follow_schedule
from puzzle_trtllm.serve.bench.result import BenchResult, OpenLoopResult
from puzzle_trtllm.serve.bench.runner import run_bench, run_open_loop
from puzzle_trtllm.serve.client.request import GenerationRequest
from tests.front_door.cli import invoke
from tests.serve.fake_client import FakeClient, one_token_a_response
from tests.serve.test_bench_load import Listener

pytestmark = pytest.mark.usefixtures("virtual_time")

OPEN = OpenScenario(
    name="tiny",
    input_tokens=6,
    output_tokens=4,
    request_rate=200,
    arrival="constant",
    num_requests=30,
    warmup_requests=2,
)


@pytest.fixture(scope="module")
def tokenizer_folder(make_checkpoint):
    return make_checkpoint([(4, None)])


def test_constant_arrivals_have_equal_gaps():
    assert arrival_times_ns(4, request_rate=8, arrival="constant", seed=3) == [0, 125_000_000, 250_000_000, 375_000_000]


def test_poisson_gaps_are_exponential_with_the_mean_of_the_rate():
    gaps = [b - a for a, b in pairwise(arrival_times_ns(20_001, request_rate=50, arrival="poisson", seed=1))]
    # Mean 20 ms; the standard deviation of an exponential is its mean; P(gap > mean) = 1/e.
    assert statistics.mean(gaps) == pytest.approx(20e6, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(20e6, rel=0.03)
    assert sum(gap > 20e6 for gap in gaps) / len(gaps) == pytest.approx(0.3679, abs=0.015)


def test_equal_seeds_give_equal_arrivals_and_other_seeds_others():
    first, again, other = (arrival_times_ns(9, request_rate=5, arrival="poisson", seed=s) for s in (1, 1, 2))
    assert first == again != other


def follow(client, count, times_ns, **options):
    requests = [GenerationRequest(input_ids=[index], max_tokens=3) for index in range(count)]
    options = {"times_ns": times_ns, "is_truncated": lambda *_: False, "observer": Listener(), **options}
    return asyncio.run(follow_schedule(client.stream, requests, **options))


def test_arrivals_do_not_wait_for_answers():
    client = FakeClient(one_token_a_response)
    run = follow(client, 20, [0] * 20)
    assert client.in_flight == list(range(1, 21))
    assert [answer.request.input_ids for answer in run.answers] == [[index] for index in range(20)]


def test_the_clock_of_a_request_starts_at_its_scheduled_arrival():
    run = follow(FakeClient(one_token_a_response), 3, [0, 10_000_000, 15_000_000])
    sent = [answer.record.sent_ns for answer in run.answers]
    assert [time - sent[0] for time in sent] == [0, 10_000_000, 15_000_000]
    assert run.max_send_delay_ms == pytest.approx(0, abs=0.001)


def test_how_late_the_client_itself_was_is_told_in_milliseconds_and_part_of_the_latency():
    start_ns = time.perf_counter_ns() - 2_000_000_000
    run = follow(FakeClient(one_token_a_response), 2, [0, 2_050_000_000], start_ns=start_ns)
    assert run.max_send_delay_ms == pytest.approx(2_000)
    late, on_time = (answer.record for answer in run.answers)
    assert (late.sent_ns, on_time.sent_ns) == (start_ns, start_ns + 2_050_000_000)
    assert late.end_ns - late.sent_ns >= 2_000_000_000


def test_a_server_that_answers_nothing_is_given_up_on():
    client = FakeClient(lambda *_: ServeError("no", status="UNAVAILABLE"))
    with pytest.raises(BenchError, match="zero successful requests: the first 8 failed, the first with: no"):
        follow(client, 1000, [index * 1_000_000 for index in range(1000)])
    assert len(client.requests) < 1000


def bench(client, tokenizer_folder, **options):
    options = {"scenario": OPEN, "quiet": True, "connect": client.connect, **options}
    return run_open_loop("host:1", tokenizer_folder=tokenizer_folder, **options)


def test_the_result_says_what_was_offered_and_achieved(tokenizer_folder, tmp_path):
    client = FakeClient(one_token_a_response)
    result = bench(client, tokenizer_folder)
    assert len(client.requests) == 2 + 30
    assert result.requests.completed == 30
    assert result.queue.offered_requests_per_s == pytest.approx(200, rel=0.1)  # the schedule's, not the server's
    assert result.queue.achieved_requests_per_s > 0
    assert result.distributions["ttft_ms"].count < 30  # arrivals before the first answer met an idle server
    assert OpenLoopResult.load(result.save(tmp_path / "open.json")) == result


def test_the_csv_has_the_scheduled_arrivals(tokenizer_folder, tmp_path):
    bench(FakeClient(one_token_a_response), tokenizer_folder, csv=tmp_path / "open.csv")
    lines = (tmp_path / "open.csv").read_text().splitlines()
    sent = [float(line.split(",")[4]) for line in lines[1:]]
    schedule = arrival_times_ns(30, request_rate=OPEN.request_rate, arrival=OPEN.arrival, seed=0)
    assert sent == pytest.approx([time_ns / 1e9 for time_ns in schedule], abs=1e-6)


def test_an_open_loop_is_no_bench_result(tokenizer_folder, tmp_path):
    file = bench(FakeClient(one_token_a_response), tokenizer_folder).save(tmp_path / "open.json")
    with pytest.raises(ConfigError, match=r"kind: another kind of file \(found open_loop_bench, expected bench\)"):
        BenchResult.load(file)


def test_a_closed_scenario_becomes_open_by_a_rate(tokenizer_folder):
    closed = Scenario(name="closed", input_tokens=6, output_tokens=4, concurrency=2, num_requests=20)
    result = bench(FakeClient(one_token_a_response), tokenizer_folder, scenario=closed, request_rate=300)
    assert (result.scenario.request_rate, result.scenario.arrival) == (300, "poisson")
    with pytest.raises(BenchError, match="closed: request_rate: missing: a closed-loop scenario has none"):
        bench(FakeClient(one_token_a_response), tokenizer_folder, scenario=closed)


@pytest.mark.parametrize("count", [0, 1])
def test_one_request_has_no_rate(tokenizer_folder, count):
    client = FakeClient(one_token_a_response)
    with pytest.raises(
        BenchError, match=rf"num_requests: too few for an open loop \(found {count}, expected at least 2"
    ):
        bench(client, tokenizer_folder, num_requests=count)
    assert client.requests == []


def test_a_file_of_an_open_loop_is_refused_by_the_closed_one(tokenizer_folder, tmp_path):
    file = tmp_path / "open.yaml"
    file.write_text("name: x\ninput_tokens: 1\noutput_tokens: 1\nnum_requests: 9\nrequest_rate: 3\n")
    with pytest.raises(ConfigError, match="is an open loop"):
        run_bench("host:1", scenario=file, tokenizer_folder=tokenizer_folder, quiet=True)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--request-rate", "3", "--concurrency", "2"), "--concurrency: excludes a request rate"),
        (("--request-rate", "0"), "--request-rate: must be positive (found 0.0)"),
        (("--request-rate", "3", "--arrival", "bursts"), "--arrival: unknown (found bursts"),
        (("--arrival", "poisson"), "--arrival: needs --request-rate"),
    ],
)
def test_wrong_options_are_one_line(options, line):
    result = invoke("bench", *options)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {line}")
    assert len(result.stderr.splitlines()) == 1
