"""Measurements put together from result files: all of one engine, or refused with the file and the key."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from puzzle_trtllm.build.engine_build import build_engine
from puzzle_trtllm.engine import EngineConfig
from puzzle_trtllm.errors import BenchError, ConfigError
from puzzle_trtllm.scenario import Scenario
from puzzle_trtllm.serve.bench.result import BenchResult, Turn
from puzzle_trtllm.serve.bench.runner import run_bench
from puzzle_trtllm.serve.evaluate.result import Decoding, EffortResult, EvaluationResult, GradedAnswer
from puzzle_trtllm.serve.metrics.provenance import EngineProvenance
from puzzle_trtllm.serve.metrics.records import RequestCounts
from puzzle_trtllm.serve.metrics.statistics import Distribution
from puzzle_trtllm.serve.report import assemble_measurement
from puzzle_trtllm.serve.report.files import load_measurement
from puzzle_trtllm.serve.report.notes import notes_on
from tests.serve.fake_client import FakeClient, one_token_a_response
from tests.serve.measurements import EMPTY_EVALUATION, PROVENANCE

TINY = Scenario(name="tiny", input_tokens=6, output_tokens=4, concurrency=2, num_requests=8)
CAP = 1_000_000


@pytest.fixture(scope="module")
def engine(make_checkpoint, tmp_path_factory):
    config = EngineConfig(runtime="reference", kv_dtype="bf16", memory_bytes=CAP)
    return build_engine(make_checkpoint([(4, None)]), tmp_path_factory.mktemp("engines") / "e", config=config)


@pytest.fixture(scope="module")
def bench(engine):
    client = FakeClient(one_token_a_response)
    return run_bench("host:1", scenario=TINY, engine=engine.path, connect=client.connect, quiet=True)


@pytest.fixture(scope="module")
def evaluation(bench):
    return EMPTY_EVALUATION.model_copy(update={"provenance": bench.provenance})


def of_another_engine(result):
    """The same result, made on an engine with a larger memory cap."""
    engine = result.provenance.engine
    manifest = engine.manifest.model_copy(update={"memory_bytes": 2 * CAP})
    return with_engine(result, engine.model_copy(update={"manifest": manifest}))


def with_engine(result, engine: EngineProvenance | None):
    return result.model_copy(update={"provenance": result.provenance.model_copy(update={"engine": engine})})


def save(folder, *results: BenchResult | EvaluationResult):
    return [result.save(folder / f"{index}-{result.kind}.json") for index, result in enumerate(results)]


def test_rounds_and_an_evaluation_of_one_engine_make_a_measurement(bench, evaluation, tmp_path):
    found = load_measurement("e", save(tmp_path, bench, bench, evaluation))
    assert (len(found.output_tokens_per_s.rounds), found.memory_bytes) == (2, CAP)
    assert found.evaluation.problems_fingerprint == "abc"


def test_ranks_and_instances_are_those_of_the_engine_and_of_the_server(engine, bench):
    found = assemble_measurement("e", engine=engine, rounds=[bench])
    assert (found.num_ranks, found.num_instances, found.sequences_held is None) == (1, 1, False)
    shared = replace(engine, llm_args={**engine.llm_args, "tensor_parallel_size": 2})
    of_shared = with_engine(bench, EngineProvenance.of(shared)).model_copy(update={"num_instances": 3})
    found = assemble_measurement("e", engine=shared, rounds=[of_shared])
    assert (found.num_ranks, found.num_instances, found.sequences_held) == (2, 3, None)


def effort(**changes):
    """Four problems, of which the first was solved."""
    statuses = {"p1": "completed", "p2": "truncated", "p3": "failed", "p4": "cancelled"}
    answers = [
        GradedAnswer(id=id, correct=id == "p1", final=None, num_output_tokens=10 * index, status=status)
        for index, (id, status) in enumerate(statuses.items(), 1)
    ]
    result = EffortResult(
        accuracy=0.5,
        accuracy_low=0.09,
        accuracy_high=0.91,
        num_problems=4,
        num_correct=1,
        requests=RequestCounts(completed=1, truncated=1, failed=1, cancelled=1),
        errors={},
        mean_output_tokens=15.0,
        measured_requests_per_s=2.5,
        wall_s=0.8,
        answers=answers,
    )
    return result.model_copy(update=changes)


def test_efforts_are_the_evaluations_and_only_answers_that_came_are_resampled(engine, bench, evaluation):
    high = effort()
    evaluated = evaluation.model_copy(update={"efforts": {"high": high}})
    found = assemble_measurement("e", engine=engine.path, rounds=[bench], evaluation=evaluated).efforts["high"]
    assert (found.accuracy, found.accuracy_low, found.accuracy_high) == (0.5, 0.09, 0.91)
    assert (found.mean_output_tokens, found.measured_requests_per_s, found.requests) == (15.0, 2.5, high.requests)
    assert found.outcomes == {"p1": (True, 10), "p2": (False, 20)}


def test_efforts_may_come_in_several_files_of_one_evaluation(bench, evaluation, tmp_path):
    low, high = (evaluation.model_copy(update={"efforts": {name: effort()}}) for name in ("low", "high"))
    medium = evaluation.model_copy(update={"efforts": {"medium": effort(accuracy=0.25)}, "concurrency": 4})
    found = load_measurement("e", save(tmp_path, bench, high, medium, low))
    assert list(found.efforts) == ["low", "medium", "high"]
    assert (found.efforts["medium"].accuracy, found.efforts["high"].accuracy) == (0.25, 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"problems_fingerprint": "other"}, r"problems_fingerprint: another evaluation than \S*1-evaluation\.json"),
        ({"max_tokens": 9}, r"max_tokens: another evaluation .*found 9, expected 8"),
        ({"decoding": Decoding(temperature=1, seed=5)}, r"decoding: another evaluation .*seed 5, expected greedy"),
        ({"token_counts": "tokenizer"}, "token_counts: another evaluation"),
        ({"efforts": {"high": effort()}}, r"high: an effort that is evaluated in two files .*1-evaluation\.json"),
    ],
)
def test_what_is_no_effort_of_the_same_evaluation_is_not_mixed_in(bench, evaluation, tmp_path, change, message):
    high = evaluation.model_copy(update={"efforts": {"high": effort()}})
    other = evaluation.model_copy(update={"efforts": {"low": effort()}, **change})
    with pytest.raises(BenchError, match=rf"2-evaluation\.json: {message}") as caught:
        load_measurement("e", save(tmp_path, bench, high, other))
    assert "\n" not in str(caught.value)


def test_latencies_are_of_the_median_round_requests_of_all_and_the_client_of_the_worst(engine, bench):
    def round_of(speed: float) -> BenchResult:
        scalars = bench.scalars | {"output_tokens_per_s": speed}
        latencies = {"ttft_ms": Distribution.of([speed])}
        requests = RequestCounts(completed=4, truncated=3, failed=2, cancelled=1)
        return bench.model_copy(update={"scalars": scalars, "distributions": latencies, "requests": requests})

    lazy, busy = (bench.client.model_copy(update={"busiest_cpu": cpu}) for cpu in (0.1, 0.9))
    of_clients = [bench.model_copy(update={"client": client}) for client in (lazy, busy, None)]
    assert assemble_measurement("e", engine=engine, rounds=of_clients).busiest_client_cpu == 0.9
    speeds = (30.0, 10.0, 20.0, 50.0, 40.0)
    found = assemble_measurement("e", engine=engine, rounds=[round_of(s) for s in speeds])
    assert found.output_tokens_per_s.rounds == speeds
    assert found.latencies["ttft_ms"].p50 == found.output_tokens_per_s.median == 30.0
    assert found.requests == RequestCounts(completed=20, truncated=15, failed=10, cancelled=5)


def test_rounds_of_different_scenarios_are_refused(engine, bench):
    other = bench.model_copy(update={"scenario": TINY.model_copy(update={"concurrency": 3})})
    for options in ({"rounds": [bench, other]}, {"rounds": [bench], "uncapped_rounds": [other]}):
        with pytest.raises(BenchError, match=r"e: rounds of different scenarios .found tiny 6/4 at 3.*expected tiny"):
            assemble_measurement("e", engine=engine, **options)
    with pytest.raises(BenchError, match="e: no bench results"):
        assemble_measurement("e", engine=engine, rounds=[])


def test_results_of_other_llm_args_are_refused_and_older_ones_told_none(engine, bench):
    edited = replace(engine, llm_args={**engine.llm_args, "stream_interval": 20})
    with pytest.raises(BenchError, match=r"e, round 1: provenance.engine.llm_args.stream_interval.* 20"):
        assemble_measurement("e", engine=edited, rounds=[bench])
    older = bench.provenance.engine.model_copy(update={"llm_args": None})
    assert assemble_measurement("e", engine=edited, rounds=[with_engine(bench, older)]).name == "e"


def test_results_that_do_not_name_their_engine_are_believed(bench, evaluation, tmp_path):
    unnamed = evaluation.model_copy(update={"provenance": PROVENANCE})
    found = load_measurement("e", save(tmp_path, bench, with_engine(bench, None), unnamed))
    assert len(found.output_tokens_per_s.rounds) == 2


def test_rounds_with_one_seed_are_told_where_the_engine_reuses_prefixes(engine, bench, tmp_path):
    def notes(*rounds):
        found = load_measurement("e", save(tmp_path, *rounds))
        return [note for note in notes_on([found], baselines=[], child="e") if "same prompts" in note]

    later = bench.model_copy(update={"seed": bench.seed + 1})
    assert notes(bench, later) == []
    assert notes(bench, later, bench) == [
        "e: rounds had the same prompts (bench --seed), and the engine reuses prefixes: unless its server was started "
        "anew, its cache answered part of them."
    ]
    forgetful = replace(engine, llm_args={**engine.llm_args, "kv_cache_config": {"enable_block_reuse": False}})
    of_forgetful = with_engine(bench, EngineProvenance.of(forgetful))
    assert not assemble_measurement("e", engine=forgetful, rounds=[of_forgetful, of_forgetful]).repeats_prompts


def test_rounds_of_several_machines_and_versions_are_told(engine, bench):
    def round_of(cores, torch):
        hardware = bench.provenance.hardware.model_copy(
            update={"cpu_model": "Z", "cpu_cores": cores, "memory_bytes": 0}
        )
        changes = {"hardware": hardware, "versions": {**bench.provenance.versions, "torch": torch}}
        return bench.model_copy(update={"provenance": bench.provenance.model_copy(update=changes)})

    def notes(*rounds):
        found = assemble_measurement("e", engine=engine, rounds=rounds)
        return [note for note in notes_on([found], baselines=[], child="e") if "several" in note]

    assert notes(round_of(2, "2.9"), round_of(2, "2.9")) == []
    assert notes(round_of(2, "2.9"), round_of(4, "2.9"), round_of(4, "2.10")) == [
        "e: its rounds were measured on or with several: Z, 2 cores; Z, 4 cores; torch 2.9 and 2.10."
    ]


def test_a_round_of_another_engine_is_refused(bench, evaluation, tmp_path):
    with pytest.raises(
        BenchError,
        match=r"1-bench\.json: provenance\.engine\.manifest\.memory_bytes: measured on another engine than .* now "
        r"holds \(found 2000000, expected 1000000\)",
    ):
        load_measurement("e", save(tmp_path, bench, of_another_engine(bench), evaluation))


def test_an_evaluation_of_another_engine_is_refused(bench, evaluation, tmp_path):
    with pytest.raises(
        BenchError, match=r"1-evaluation\.json: provenance\.engine\.manifest\.memory_bytes: measured on"
    ):
        load_measurement("e", save(tmp_path, bench, of_another_engine(evaluation)))


def test_a_folder_that_was_built_anew_since_is_refused(engine, bench, tmp_path):
    file = engine.path / "engine.json"
    content = file.read_text()
    changed = json.loads(content)
    changed["provenance"]["config"] = {"anything": "else"}
    file.write_text(json.dumps(changed))
    try:
        with pytest.raises(
            BenchError, match=r"0-bench\.json: provenance\.engine\.manifest\.provenance\.config"
        ) as caught:
            load_measurement("e", save(tmp_path, bench))
    finally:
        file.write_text(content)
    assert "\n" not in str(caught.value)


def in_turn(result, round, speed):
    scalars = result.scalars | {"output_tokens_per_s": speed}
    return result.model_copy(update={"turn": Turn(comparison="c", round=round), "scalars": scalars})


def test_the_order_of_files_is_not_the_order_of_turns(bench, tmp_path):
    rounds = [in_turn(bench, 2, 30.0), in_turn(bench, 0, 10.0), in_turn(bench, 1, 20.0)]
    found = load_measurement("e", save(tmp_path, *rounds))
    assert found.output_tokens_per_s.rounds == (10.0, 20.0, 30.0)
    assert [turn.round for turn in found.turns] == [0, 1, 2]


def test_a_round_without_a_turn_pairs_with_nothing(bench, tmp_path):
    assert load_measurement("e", save(tmp_path, bench, in_turn(bench, 0, 10.0))).turns is None
    twice = save(tmp_path, in_turn(bench, 0, 10.0), in_turn(bench, 0, 20.0))
    assert load_measurement("e", twice).turns is None


def test_a_measurement_has_one_turn_a_round(bench, tmp_path):
    file = load_measurement("e", save(tmp_path, in_turn(bench, 0, 10.0))).save(tmp_path / "e.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"turns": []}))
    with pytest.raises(ConfigError, match=r"e\.json: .*0 turns of 1 rounds"):
        load_measurement("e", [file])


def test_from_python_the_round_is_named(engine, bench):
    with pytest.raises(
        BenchError, match=r"e, round 2: provenance\.engine\.manifest\.memory_bytes: measured on another"
    ):
        assemble_measurement("e", engine=engine, rounds=[bench, of_another_engine(bench)])
