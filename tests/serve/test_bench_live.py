"""Bench, evaluation and report against a live tritonserver with the reference runtime, on a toy model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from puzzle_trtllm.build.engine_build import build_engine
from puzzle_trtllm.chat import ChatTokenizer
from puzzle_trtllm.engine import EngineConfig
from puzzle_trtllm.errors import BenchError, ServeError
from puzzle_trtllm.scenario import Scenario
from puzzle_trtllm.serve.bench.interleaved import run_interleaved
from puzzle_trtllm.serve.bench.runner import run_bench, run_open_loop
from puzzle_trtllm.serve.client.triton_client import TritonLlmClient, generate
from puzzle_trtllm.serve.evaluate.runner import evaluate
from puzzle_trtllm.serve.report import load_measurements, make_report
from puzzle_trtllm.serve.triton.launch import TritonServer
from tests.serve.scripted import SCRIPTED, metrics_of, scripted_engine, short_lived, wait_until

SCENARIO = Scenario(name="toy", input_tokens=16, output_tokens=24, concurrency=4, num_requests=10, warmup_requests=2)


@pytest.fixture(scope="module")
def engine(make_checkpoint, tmp_path_factory):
    config = EngineConfig(runtime="reference", kv_dtype="bf16", memory_bytes=1_000_000, llm_args={"dtype": "float32"})
    return build_engine(
        make_checkpoint([(4, 32), (4, None)], seed=1), tmp_path_factory.mktemp("e") / "engine", config=config
    )


@pytest.fixture(scope="module")
def server(engine):
    with short_lived(TritonServer(engine)) as server:
        yield server


def counters(server):
    """(requests by Triton's own count, generated tokens by the model's)."""
    metrics = metrics_of(server)
    requests = sum(value for key, value in metrics.items() if key.startswith("nv_inference_request_success"))
    return requests, metrics.get("puzzle_output_tokens_total", 0)


STOOD_STILL = ("the last one arrived before the first one was answered", "never reached, so there is no steady window")


def held(run: Callable[..., Any], server, **options) -> tuple[Any, int]:
    """What `run` measured and how many tries that took: one in which the machine, or one of two workers, stood still
    for as long as the load lasts measures nothing, and says so."""
    for tries in range(1, 4):
        try:
            return run(server.grpc_url, quiet=True, **options), tries
        except BenchError as error:
            if not any(words in str(error) for words in STOOD_STILL):
                raise
    raise AssertionError("no load was held")


def test_bench_counts_what_the_server_counts(server, engine):
    before = counters(server)
    result = run_bench(server.grpc_url, scenario=SCENARIO, engine=engine.path, quiet=True)
    # 2 requests of the warm-up and 10 measured ones, 24 tokens each; the model publishes its count once a second.
    expected = (before[0] + 12, before[1] + 288)
    wait_until(lambda: counters(server) == expected, what=f"the server's counters reach {expected}")
    assert (result.requests.completed, result.requests.total) == (10, 10)
    assert (result.lengths, result.token_counts) == ("exact", "server")
    assert result.scalars["mean_output_tokens"] == 24  # end-of-sequence is ignored
    assert 0 < result.steady_window_tokens <= 240
    assert result.distributions["ttft_ms"].max <= result.distributions["e2e_ms"].max <= result.wall_s * 1000
    assert result.provenance.engine.manifest.memory_bytes == 1_000_000


def test_several_workers_count_what_the_server_counts(server, engine):
    before = counters(server)
    result, tries = held(run_bench, server, scenario=SCENARIO, engine=engine.path, workers=2, seed=13)
    expected = (before[0] + 12 * tries, before[1] + 288 * tries)
    wait_until(lambda: counters(server) == expected, what=f"the server's counters reach {expected}")
    assert (result.requests.completed, result.client.workers, result.scalars["mean_output_tokens"]) == (10, 2, 24)


def test_a_scenario_longer_than_the_engine_is_one_clear_line(server, engine):
    # Behind a test that has waited until its counts had arrived: they come once a second.
    too_long = SCENARIO.model_copy(update={"input_tokens": 600, "warmup_requests": 0})
    before = counters(server)
    with pytest.raises(BenchError, match=r"scenario toy: longer than .*max_seq_len \(found 600 in \+ 24 out = 624"):
        run_bench(server.grpc_url, scenario=too_long, engine=engine.path, quiet=True)
    assert counters(server) == before
    # Without the engine folder nobody knows the limit but the server.
    with pytest.raises(BenchError, match=r"zero successful requests.*too long \(found 600 tokens"):
        run_bench(server.grpc_url, scenario=too_long, tokenizer_folder=engine.model_path, quiet=True)


def test_an_open_loop_sends_what_its_schedule_says(server, engine):
    scenario = SCENARIO.model_copy(update={"num_requests": 8})
    options = {"scenario": scenario, "request_rate": 2, "arrival": "constant", "engine": engine.path}
    result, _ = held(run_open_loop, server, **options)
    assert (result.requests.completed, result.requests.total, result.lengths) == (8, 8, "exact")
    assert result.scalars["mean_output_tokens"] == 24
    assert result.wall_s >= 7 / 2  # seven gaps of half a second, however fast the server is


def test_evaluation_grades_what_the_model_really_says(server, engine, tmp_path):
    tokenizer = ChatTokenizer.from_folder(engine.model_path)
    prompt = tokenizer.render_chat([{"role": "user", "content": "12+30="}], reasoning_effort="high")
    said = generate(url=server.grpc_url, input_ids=tokenizer.encode(prompt), max_tokens=12)
    plain = tokenizer.decode(said.token_ids)
    assert plain == said.text.strip(), f"choose another seed: this toy says {plain!r}, which is no plain answer"
    problems = tmp_path / "problems.jsonl"
    records = [
        {"id": "as it says", "prompt": "12+30=", "answer": said.text},
        {"id": "not as it says", "prompt": "12+30=", "answer": said.text + " or so"},
    ]
    problems.write_text("".join(json.dumps(record) + "\n" for record in records))
    result = evaluate(
        server.grpc_url,
        problems=problems,
        tokenizer_folder=engine.model_path,
        concurrency=2,
        max_tokens=12,
        grader="exact",
        quiet=True,
    )
    high = result.efforts["high"]
    assert [answer.correct for answer in high.answers] == [True, False]
    assert {answer.num_output_tokens for answer in high.answers} == {said.num_output_tokens}
    assert list(result.efforts) == ["low", "medium", "high"]
    # A random model has other words for each effort, so the effort did reach the prompt.
    assert result.efforts["low"].answers[0].final != high.answers[0].final


def test_report_from_the_files_that_bench_and_evaluate_write(server, engine, tmp_path):
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"id": "a", "prompt": "1+1=", "answer": "2"}\n')
    rounds = run_interleaved(
        {"parent": server.grpc_url}, scenario=SCENARIO, rounds=2, engines={"parent": engine.path}, quiet=True
    )
    evaluation = evaluate(
        server.grpc_url,
        problems=problems,
        tokenizer_folder=engine.model_path,
        concurrency=1,
        max_tokens=8,
        quiet=True,
    )
    benches = [r.save(tmp_path / f"bench{i}.json") for i, r in enumerate(rounds.servers["parent"].rounds)]
    files = [*benches, evaluation.save(tmp_path / "evaluation.json")]
    engines = load_measurements({"parent": files, "child": files})
    document = make_report(engines, baselines=["parent"], child="child", out=tmp_path / "out", quiet=True)
    assert document["child"]["per_token_speedup"] == pytest.approx(1.0)  # the same measurement twice
    assert len(document["child"]["output_tokens_per_s_rounds"]) == 2
    # 40 tokens: 32 in the window layer and 40 in the full one, x 2 x 2 KV heads x 16 x 2 bytes.
    assert document["child"]["kv_bytes_per_sequence"] == (32 + 40) * 2 * 2 * 16 * 2
    assert document["child"]["weight_bytes"] == engine.manifest.weight_bytes
    assert document["child"]["efforts"]["low"]["accuracy_retention_reason"] == "parent solved no problem at low effort"
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000


def test_a_server_that_is_overloaded_is_told(make_checkpoint, tmp_path):
    # An engine of set speed, 4 requests at a time of 20 tokens at 10 ms each: never more than 20 in a second, however
    # fast the machine is at the moment.
    engine = scripted_engine(tmp_path / "engine", make_checkpoint([(4, None)]), step_ms=10, max_batch_size=4)
    load = SCENARIO.model_copy(update={"output_tokens": 20})
    with short_lived(TritonServer(engine, **SCRIPTED)) as server:
        alone = run_bench(server.grpc_url, scenario=load, tokenizer_folder=engine.model_path, quiet=True)
        result, _ = held(
            run_open_loop,
            server,
            scenario=load.model_copy(update={"num_requests": 120}),
            request_rate=60,
            arrival="poisson",
            tokenizer_folder=engine.model_path,
        )
    queue = result.queue
    assert queue.queue_grew, queue
    assert queue.achieved_requests_per_s < 0.8 * queue.offered_requests_per_s
    assert result.distributions["ttft_ms"].p99 > 2 * alone.distributions["ttft_ms"].p50


def test_a_model_that_is_not_there_is_one_clear_line(server):
    async def connect():
        async with TritonLlmClient(server.grpc_url, model="tensorrt_llm_2"):
            pass

    with pytest.raises(ServeError, match="unknown model: 'tensorrt_llm_2' is not found"):
        asyncio.run(connect())


def test_an_unreachable_server_is_one_clear_line(engine):
    with pytest.raises(ServeError, match=r"127\.0\.0\.1:9: failed to connect"):
        run_bench("127.0.0.1:9", scenario=SCENARIO, engine=engine.path, quiet=True)
