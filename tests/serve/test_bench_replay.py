"""Replaying a trace: its moments, its lengths, and prompts that share what its blocks share."""

from __future__ import annotations

import json

import pytest

from puzzle_trtllm.errors import BenchError
from puzzle_trtllm.scenario import OpenScenario, ReplayScenario, Scenario
from puzzle_trtllm.serve.bench.result import BenchResult, OpenLoopResult
from puzzle_trtllm.serve.bench.runner import run_bench, run_open_loop
from puzzle_trtllm.trace import read_trace
from tests.front_door.cli import assert_user_error, invoke
from tests.serve.fake_client import FakeClient, one_token_a_response

pytestmark = pytest.mark.usefixtures("virtual_time")

BASE = Scenario(name="base", input_tokens=1, output_tokens=1, concurrency=2, num_requests=2, warmup_requests=1)


@pytest.fixture(scope="module")
def tokenizer_folder(make_checkpoint):
    return make_checkpoint([(4, None)])


@pytest.fixture
def trace_file(tmp_path):
    lines = [
        {"timestamp": 100 + 40 * i, "input_length": 6 + i % 2, "output_length": 2 + i % 3, "hash_ids": [7, 100 + i]}
        for i in range(12)
    ]
    file = tmp_path / "trace.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def replay(client, trace, tokenizer_folder, **options):
    return run_open_loop(
        "host:1",
        scenario=BASE,
        trace=trace,
        tokenizer_folder=tokenizer_folder,
        connect=client.connect,
        quiet=True,
        **options,
    )


def test_moments_lengths_and_blocks_are_the_traces(trace_file, tokenizer_folder, tmp_path):
    client = FakeClient(one_token_a_response)
    trace = read_trace(trace_file, block_tokens=4)
    result = replay(client, trace, tokenizer_folder, speed=2)
    sent = client.requests[1:]  # the warm-up's came first
    assert [(len(r.input_ids), r.max_tokens) for r in sent] == [(6 + i % 2, 2 + i % 3) for i in range(12)]
    assert len({tuple(request.input_ids[:4]) for request in sent}) == 1
    assert len({tuple(request.input_ids[4:]) for request in sent}) == 12
    # 11 gaps of 40 ms at twice the speed.
    assert result.queue.offered_requests_per_s == pytest.approx(50, rel=0.25)
    assert result.wall_s >= 11 * 0.020
    load = result.scenario
    assert isinstance(load, ReplayScenario)
    assert (load.name, load.speed, load.input_tokens, load.output_tokens, load.num_requests) == ("trace", 2, 6, 3, 12)
    assert (load.trace.file, load.trace.longest_sequence, load.trace.shared_blocks) == ("trace.jsonl", 11, True)
    assert OpenLoopResult.load(result.save(tmp_path / "replay.json")) == result
    again = FakeClient(one_token_a_response)
    replay(again, trace, tokenizer_folder, speed=9)
    assert [list(request.input_ids) for request in again.requests[1:]] == [list(r.input_ids) for r in sent]


def test_a_trace_is_replayed_at_its_own_speed_and_says_what_of_it_was_not(tmp_path, tokenizer_folder):
    file = tmp_path / "t.jsonl"
    file.write_text(
        "".join(f'{{"timestamp": {20 * i}, "input_length": 3, "output_length": 1, "turn": 1}}\n' for i in range(4))
    )
    result = replay(FakeClient(one_token_a_response), read_trace(file), tokenizer_folder)
    assert (result.scenario.speed, result.scenario.trace.ignored_keys) == (1.0, ("turn",))
    assert result.wall_s >= 0.060


def test_its_lengths_at_a_rate_or_a_concurrency_of_ours(trace_file, tokenizer_folder, tmp_path):
    trace = read_trace(trace_file, block_tokens=4)
    open_loops = [
        replay(FakeClient(one_token_a_response), trace, tokenizer_folder, request_rate=300, **options).scenario
        for options in ({}, {"arrival": "constant"})
    ]
    assert all(isinstance(load, OpenScenario) for load in open_loops)
    assert [load.arrival for load in open_loops] == ["poisson", "constant"]
    client = FakeClient(one_token_a_response)
    result = run_bench(
        "host:1",
        scenario=BASE,
        trace=trace,
        concurrency=3,
        tokenizer_folder=tokenizer_folder,
        connect=client.connect,
        quiet=True,
    )
    assert max(client.in_flight) == result.scenario.concurrency == 3
    assert result.scenario.trace.sha256 == trace.sha256
    assert BenchResult.load(result.save(tmp_path / "bench.json")) == result


def test_text_is_sent_as_it_is_and_counted(tmp_path, tokenizer_folder):
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(f'{{"text_input": "{i}+30=", "output_length": 2, "timestamp": {i}}}\n' for i in range(9)))
    for gives_ids in (True, False):
        client = FakeClient(one_token_a_response, gives_token_ids=gives_ids)
        result = replay(client, read_trace(file), tokenizer_folder, speed=0.05)
        assert result.scenario.input_tokens > 1
        assert all((request.prompt is None) == gives_ids for request in client.requests)
    assert client.requests[1].prompt == "0+30="


def test_a_trace_without_moments_cannot_be_replayed_in_time(tmp_path, tokenizer_folder):
    file = tmp_path / "t.jsonl"
    file.write_text('{"input_length": 3, "output_length": 2}\n' * 4)
    client = FakeClient(one_token_a_response)
    with pytest.raises(BenchError, match=r"t\.jsonl: timestamp: missing: there is nothing to replay"):
        replay(client, read_trace(file), tokenizer_folder)
    assert client.requests == []


def test_a_trace_in_which_no_time_passes_is_refused_before_anything_is_sent(tmp_path, tokenizer_folder):
    file = tmp_path / "t.jsonl"
    file.write_text('{"timestamp": 5, "input_length": 3, "output_length": 2}\n' * 4)
    client = FakeClient(one_token_a_response)
    with pytest.raises(BenchError, match=r"t\.jsonl: timestamp: the same in every line: no time passes"):
        replay(client, read_trace(file), tokenizer_folder)
    assert client.requests == []


def test_a_trace_of_another_models_tokens_is_refused(tmp_path, tokenizer_folder):
    file, client = tmp_path / "t.jsonl", FakeClient(one_token_a_response)
    file.write_text(
        "".join(f'{{"timestamp": {i}, "input_ids": [7, {90 + 5 * i}], "output_length": 1}}\n' for i in (0, 1, 2))
    )
    with pytest.raises(
        BenchError, match=r"t\.jsonl: input_ids: .*another model's trace.*found 100, expected at most 95"
    ):
        replay(client, read_trace(file), tokenizer_folder)
    assert client.requests == []


def test_no_prompt_of_the_warm_up_comes_again(tmp_path, tokenizer_folder):
    """A prefix cache would answer it, and every prompt of the trace that begins like one."""
    file = tmp_path / "t.jsonl"
    file.write_text("".join(f'{{"timestamp": {20 * i}, "input_length": 8, "output_length": 1}}\n' for i in range(6)))
    client = FakeClient(one_token_a_response)
    base = BASE.model_copy(update={"warmup_requests": 4})
    run_open_loop(
        "host:1",
        scenario=base,
        trace=read_trace(file),
        tokenizer_folder=tokenizer_folder,
        connect=client.connect,
        quiet=True,
    )
    prompts = [tuple(request.input_ids) for request in client.requests]
    assert len(prompts) == len(set(prompts)) == 10


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--speed", "2"), "--speed: needs --trace"),
        (("--max-seconds", "2"), "--max-seconds: needs --trace"),
        (("--trace", "x.jsonl", "--sweep", "1,2"), "--sweep: excludes --trace"),
        (("--trace", "x.jsonl", "--speed", "2", "--concurrency", "2"), "--speed: excludes --concurrency"),
        (("--trace", "x.jsonl", "--speed", "2", "--request-rate", "2"), "--speed: excludes --request-rate"),
        (("--trace", "x.jsonl", "--arrival", "poisson"), "--arrival: needs --request-rate"),
        (("--trace", "x.jsonl", "--trace-time-unit", "h"), "--trace-time-unit: unknown"),
        (("--trace", "no.jsonl"), "no.jsonl: cannot be read"),
        (("--workers", "0"), "--workers: must be a number"),
    ],
)
def test_wrong_options_are_one_line(options, words):
    assert_user_error(invoke("bench", *options), words)
