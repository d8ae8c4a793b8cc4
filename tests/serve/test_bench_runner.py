"""`run_bench` and `run_interleaved` end to end, but for the server."""

from __future__ import annotations

import csv
import io
import json
from types import SimpleNamespace

import pytest

from puzzle_trtllm.errors import BenchError, CheckpointError, ConfigError, ServeError
from puzzle_trtllm.scenario import Scenario
from puzzle_trtllm.serve.bench import measure, target
from puzzle_trtllm.serve.bench.interleaved import run_interleaved
from puzzle_trtllm.serve.bench.result import BenchResult, InterleavedResult
from puzzle_trtllm.serve.bench.runner import run_bench
from puzzle_trtllm.serve.evaluate.result import EvaluationResult
from tests.serve.fake_client import FakeClient, one_token_a_response
from tests.serve.measurements import PROVENANCE
from tests.serve.scripted import scripted_engine
from tests.toys import toy_architecture

TINY = Scenario(name="tiny", input_tokens=6, output_tokens=4, concurrency=2, num_requests=8, warmup_requests=3)


@pytest.fixture(scope="module")
def tokenizer_folder(make_checkpoint):
    return make_checkpoint([(4, None)])


def bench(client, tokenizer_folder, **options):
    return run_bench(
        "host:1",
        **{"scenario": TINY, "quiet": True, "connect": client.connect, "tokenizer_folder": tokenizer_folder, **options},
    )


def test_the_result_says_what_was_measured_and_how(tokenizer_folder):
    result = bench(FakeClient(one_token_a_response), tokenizer_folder, seed=5, name="toy")
    assert (result.name, result.url, result.seed, result.lengths, result.token_counts) == (
        "toy",
        "host:1",
        5,
        "exact",
        "server",
    )
    assert (result.requests.completed, result.requests.total, result.errors) == (8, 8, {})
    assert result.scalars["mean_output_tokens"] == 4
    assert result.output_tokens_per_s == pytest.approx(result.steady_window_tokens / result.steady_window_s)
    assert result.scalars["requests_per_s"] == pytest.approx(result.output_tokens_per_s / 4)
    assert 0 < result.steady_window_s <= result.wall_s
    # 8 requests of 4 tokens have 3 gaps each.
    assert (result.distributions["ttft_ms"].count, result.distributions["itl_ms"].count) == (8, 24)
    assert set(result.units) == set(result.formulas) >= set(result.scalars) | set(result.distributions)
    assert result.provenance.hardware.cpu_cores >= 1
    assert result.provenance.versions["puzzle-trtllm"]


def test_a_tokenizer_of_another_model_than_the_engines_is_refused(tokenizer_folder, make_checkpoint, tmp_path):
    client, engine = (
        FakeClient(one_token_a_response),
        scripted_engine(tmp_path / "e", make_checkpoint([(4, None)], vocab_size=40)),
    )
    with pytest.raises(CheckpointError, match="tokens outside the model's vocabulary"):
        bench(client, tokenizer_folder, engine=engine.path)
    assert client.requests == []


def test_warm_up_requests_are_sent_first_and_not_measured(tokenizer_folder):
    client = FakeClient(one_token_a_response)
    result = bench(client, tokenizer_folder)
    assert len(client.requests) == 3 + 8
    assert result.requests.total == 8
    assert len({tuple(request.input_ids) for request in client.requests}) == 11


def test_requests_ask_for_exact_lengths(tokenizer_folder):
    client = FakeClient(one_token_a_response)
    bench(client, tokenizer_folder)
    assert {(len(r.input_ids), r.max_tokens, r.ignore_eos, r.streaming) for r in client.requests} == {
        (6, 4, True, True)
    }


def test_a_result_survives_its_file(tokenizer_folder, tmp_path):
    result = bench(FakeClient(one_token_a_response), tokenizer_folder)
    assert BenchResult.load(result.save(tmp_path / "bench.json")) == result


def test_a_file_of_another_kind_or_with_unknown_keys_is_refused(tokenizer_folder, tmp_path):
    file = bench(FakeClient(one_token_a_response), tokenizer_folder).save(tmp_path / "bench.json")
    with pytest.raises(
        ConfigError, match=r"bench\.json: kind: another kind of file \(found bench, expected evaluation\)"
    ):
        EvaluationResult.load(file)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"surprise": 1}))
    with pytest.raises(ConfigError, match=r"bench\.json: surprise: Extra inputs are not permitted"):
        BenchResult.load(file)


def test_the_csv_has_a_row_a_request_from_which_the_metrics_can_be_computed(tokenizer_folder, tmp_path):
    def script(index, request):
        return ServeError("queue is full", status="UNAVAILABLE") if index == 5 else one_token_a_response(0, request)

    file = tmp_path / "requests.csv"
    result = bench(FakeClient(script), tokenizer_folder, warmup_requests=0, csv=file)
    rows = list(csv.DictReader(io.StringIO(file.read_text())))
    assert [row["status"] for row in rows] == ["completed"] * 5 + ["failed"] + ["completed"] * 2
    assert (rows[5]["error"], rows[5]["output_tokens"], rows[5]["first_token_s"]) == ("queue is full", "0", "")
    assert rows[0] | {"input_tokens": "6", "output_tokens": "4", "sent_s": "0.000000", "error": ""} == rows[0]
    answered = [{key: float(row[key]) for key in row if key.endswith("_s")} for row in rows if not row["error"]]
    for tag, values in (
        ("ttft_ms", [row["first_token_s"] - row["sent_s"] for row in answered]),
        ("tpot_ms", [(row["last_token_s"] - row["first_token_s"]) / 3 for row in answered]),
        ("e2e_ms", [row["end_s"] - row["sent_s"] for row in answered]),
    ):
        assert result.distributions[tag].max == pytest.approx(1000 * max(values), abs=0.01)


def test_failures_are_counted_with_their_reasons(tokenizer_folder):
    def script(index, request):
        return (
            ServeError("queue is full", status="UNAVAILABLE") if index in (5, 7) else one_token_a_response(0, request)
        )

    result = bench(FakeClient(script), tokenizer_folder, warmup_requests=0)
    assert (result.requests.completed, result.requests.failed) == (6, 2)
    assert result.errors == {"queue is full": 2}


def test_short_answers_are_truncated_not_completed(tokenizer_folder):
    result = bench(FakeClient(lambda *_: [[1], [2]]), tokenizer_folder)
    assert (result.requests.completed, result.requests.truncated) == (0, 8)


def test_against_a_stock_server_the_result_says_what_is_not_exact(tokenizer_folder):
    client = FakeClient(one_token_a_response, gives_token_ids=False)
    result = bench(client, tokenizer_folder)
    assert (result.lengths, result.token_counts) == ("nominal", "tokenizer")
    assert all(request.prompt and request.ignore_eos is None for request in client.requests)


def test_goodput_exists_where_the_scenario_sets_a_limit(tokenizer_folder):
    result = bench(FakeClient(one_token_a_response), tokenizer_folder)
    with pytest.raises(BenchError, match="goodput_fraction: missing metric: the load sets no latency limit"):
        result.scalar("goodput_fraction")
    strict = TINY.model_copy(update={"max_ttft_ms": 1e-6})
    assert bench(FakeClient(one_token_a_response), tokenizer_folder, scenario=strict).scalar("goodput_fraction") == 0
    easy = TINY.model_copy(update={"max_ttft_ms": 1e6, "max_tpot_ms": 1e6})
    result = bench(FakeClient(one_token_a_response), tokenizer_folder, scenario=easy)
    assert result.scalar("goodput_requests_per_s") == pytest.approx(result.scalar("requests_per_s"))


def test_an_absent_metric_is_an_error_with_its_reason(tokenizer_folder):
    result = bench(FakeClient(one_token_a_response), tokenizer_folder)
    with pytest.raises(BenchError, match="output_tokens_per_s_per_gpu: missing metric: the server's number of GPUs is"):
        result.scalar("output_tokens_per_s_per_gpu")


def test_what_cannot_be_measured_is_refused_before_anything_is_sent(tokenizer_folder):
    client = FakeClient(one_token_a_response)
    with pytest.raises(BenchError, match="tiny: num_requests: fewer requests than are to be in flight"):
        bench(client, tokenizer_folder, concurrency=9)
    with pytest.raises(BenchError, match="prompts need a tokenizer"):
        bench(client, None)
    with pytest.raises(ConfigError, match="no such scenario"):
        bench(client, tokenizer_folder, scenario="nonsense")
    assert client.requests == []


def test_a_scenario_that_the_engine_cannot_hold_is_refused_before_anything_is_sent(monkeypatch, tokenizer_folder):
    engine = SimpleNamespace(max_seq_len=9, architecture=toy_architecture([(4, None)]))
    monkeypatch.setattr(target.Engine, "open", lambda path: engine)
    monkeypatch.setattr(measure.Provenance, "collect", classmethod(lambda cls, engine: PROVENANCE))
    client = FakeClient(one_token_a_response)
    with pytest.raises(
        BenchError, match=r"scenario tiny: longer than the engine's max_seq_len \(found 6 in \+ 4 out = 10 .*at most 9"
    ):
        bench(client, tokenizer_folder, engine="engine")
    assert client.requests == []
    engine.max_seq_len = 10
    assert bench(client, tokenizer_folder, engine="engine").requests.completed == 8


@pytest.mark.parametrize(("runtime", "gpus"), [("tensorrt_llm", 2 * 3), ("reference", 0)])
def test_the_gpus_of_every_instance_in_the_server_count(tokenizer_folder, tmp_path, runtime, gpus):
    engine = scripted_engine(tmp_path / "engine", tokenizer_folder, tensor_parallel_size=2)
    manifest = json.loads((engine.path / "engine.json").read_text())
    (engine.path / "engine.json").write_text(json.dumps(manifest | {"runtime": runtime}))
    client = FakeClient(one_token_a_response)
    client.num_instances = 3
    result = bench(client, tokenizer_folder, engine=engine.path)
    assert result.num_instances == 3
    a_gpu = result.scalars.get("output_tokens_per_s_per_gpu")
    assert a_gpu == (pytest.approx(result.output_tokens_per_s / gpus) if gpus else None)


def test_zero_successful_requests_are_one_clear_line(tokenizer_folder):
    client = FakeClient(lambda *_: ServeError("model not ready", status="UNAVAILABLE"))
    with pytest.raises(BenchError, match=r"zero successful requests.*model not ready"):
        bench(client, tokenizer_folder)


class Recorder:
    """A `run_bench` that measures a given throughput."""

    def __init__(self, template, speeds):
        self.template, self.speeds, self.calls = template, {name: iter(values) for name, values in speeds.items()}, []

    def __call__(self, url, *, name, seed, warmup_requests, scenario, **_):
        self.calls.append((name, url, seed, warmup_requests))
        speed = next(self.speeds[name])
        return self.template.model_copy(update={"name": name, "scalars": {"output_tokens_per_s": speed}})


def test_servers_are_measured_in_turn_in_alternating_order(tokenizer_folder, tmp_path):
    template = bench(FakeClient(one_token_a_response), tokenizer_folder)
    recorder = Recorder(template, {"a": [10.0, 30.0, 20.0], "b": [5.0, 5.0, 8.0], "c": [1.0, 1.0, 1.0]})
    urls = {"a": "host:1", "b": "host:2", "c": "host:3"}
    result = run_interleaved(urls, scenario=TINY, rounds=3, seed=40, bench=recorder)
    assert [(name, seed) for name, _, seed, _ in recorder.calls] == [
        *(("a", 40), ("b", 40), ("c", 40)),
        *(("c", 41), ("b", 41), ("a", 41)),
        *(("a", 42), ("b", 42), ("c", 42)),
    ]
    assert [warmup for *_, warmup in recorder.calls] == [3] * 3 + [0] * 6
    assert all(url == urls[name] for name, url, *_ in recorder.calls)
    spread = result.servers["a"].output_tokens_per_s
    assert (spread.median, spread.low, spread.high, spread.rounds) == (20.0, 10.0, 30.0, (10.0, 30.0, 20.0))
    turns = [[r.turn for r in server.rounds] for server in result.servers.values()]
    assert turns[0] == turns[1] == turns[2]
    assert [turn.round for turn in turns[0]] == [0, 1, 2]
    again = run_interleaved({"a": "host:1"}, scenario=TINY, rounds=1, bench=Recorder(template, {"a": [1.0]}))
    assert again.servers["a"].rounds[0].turn != turns[0][0]  # of another comparison
    assert result.order == [["a", "b", "c"], ["c", "b", "a"], ["a", "b", "c"]]
    assert InterleavedResult.load(result.save(tmp_path / "rounds.json")) == result


def test_nothing_to_compare_is_an_error():
    with pytest.raises(BenchError, match="nothing to measure"):
        run_interleaved({})
    with pytest.raises(BenchError, match="an engine without a server"):
        run_interleaved({"a": "host:1"}, engines={"b": "folder"})
