"""Sweeps: the knee by hand, every point measured once, and what the table and the CSV say."""

from __future__ import annotations

import csv
import io

import pytest

from puzzle_trtllm.errors import BenchError
from puzzle_trtllm.scenario import Scenario
from puzzle_trtllm.serve.bench.result import BenchResult
from puzzle_trtllm.serve.bench.runner import run_bench
from puzzle_trtllm.serve.bench.sweep import (
    SweepResult,
    find_knee,
    point_scenario,
    point_seed,
    run_sweep,
    sweep_table,
)
from puzzle_trtllm.serve.metrics.units import show_number
from tests.front_door.cli import invoke
from tests.serve.fake_client import FakeClient, one_token_a_response
from tests.serve.scripted import scripted_engine

TINY = Scenario(name="tiny", input_tokens=6, output_tokens=4, concurrency=2, num_requests=6)


class Server:
    """A `run_bench` on a server that is full at 100 tok/s and gives 30 to each request until then."""

    def __init__(self, template: BenchResult, fails_at: int | None = None):
        self.template, self.fails_at, self.calls = template, fails_at, []

    def __call__(self, url, *, scenario, seed, **_):
        if scenario.concurrency == self.fails_at:
            raise BenchError("the server is gone")
        self.calls.append((scenario.concurrency, scenario.num_requests, seed))
        speed = min(100.0, 30.0 * scenario.concurrency)
        return self.template.model_copy(update={"scenario": scenario, "scalars": {"output_tokens_per_s": speed}})


@pytest.fixture(scope="module")
def template(make_checkpoint):
    client = FakeClient(one_token_a_response)
    folder = make_checkpoint([(4, None)])
    return run_bench("host:1", scenario=TINY, connect=client.connect, tokenizer_folder=folder, quiet=True)


@pytest.mark.parametrize(
    ("curve", "knee"),
    [
        ({1: 30, 2: 60, 4: 95, 8: 100}, 4),  # 95 is at least 90
        ({1: 30, 2: 60, 4: 89, 8: 100, 16: 99}, 8),  # 89 is not
        ({1: 30, 2: 60, 4: 90, 8: 100}, 4),  # 90 just is
        ({1: 30, 2: 60, 4: 120}, None),  # still rising
        ({1: 100, 2: 60}, 1),  # more in flight makes it slower
        ({1: 100}, None),  # one point has no curve
    ],
)
def test_the_knee_is_the_first_with_nine_tenths_of_the_best(curve, knee):
    assert find_knee(curve) == knee


def test_points_are_measured_in_ascending_order_with_the_same_waves_and_seeds_of_their_own(template):
    server = Server(template)
    sweep = run_sweep("host:1", scenario=TINY, concurrencies=[8, 1, 4, 4, 2], seed=50, bench=server)
    # Three waves each, but at least 8 requests.
    assert [call[:2] for call in server.calls] == [(1, 8), (2, 8), (4, 12), (8, 24)]
    assert len({seed for *_, seed in server.calls}) == 4
    assert (sweep.knee, [point.output_tokens_per_s for point in sweep.points]) == (4, [30, 60, 100, 100])


def test_no_prompt_comes_twice_in_sweeps_of_different_seeds_and_all_do_in_those_of_one(make_checkpoint):
    """A prefix cache would answer it: concurrency 2 at seed 0 must not be concurrency 1 at seed 1."""
    folder = make_checkpoint([(4, None)])

    def prompts(seed, num_requests=None):
        client = FakeClient(one_token_a_response)
        run_sweep(
            "host:1",
            scenario=TINY,
            concurrencies=[1, 2, 4],
            num_requests=num_requests,
            seed=seed,
            connect=client.connect,
            tokenizer_folder=folder,
            quiet=True,
        )
        return [tuple(request.input_ids) for request in client.requests]

    sent = [*prompts(0), *prompts(1), *prompts(0, num_requests=9)]
    assert len(sent) == len(set(sent)) == 28 + 28 + 27
    assert sorted(prompts(1)) == sorted(sent[28:56])


def test_each_point_is_measured_on_the_sweeps_engine_and_says_the_seed_to_repeat_it(template, tmp_path):
    calls = []

    def bench(url, *, scenario, **options):
        calls.append(options)
        return template.model_copy(update={"scenario": scenario})

    run_sweep("host:1", scenario=TINY, concurrencies=[1, 2], seed=3, engine=tmp_path, bench=bench, quiet=True)
    loads = [point_scenario(TINY, concurrency, None) for concurrency in (1, 2)]
    assert calls == [{"seed": point_seed(3, load), "engine": tmp_path, "quiet": True} for load in loads]


@pytest.mark.parametrize(
    ("most", "said"), [(8, "throughput): 4"), (2, "none: throughput was still rising at the largest")]
)
def test_the_table_says_what_the_knee_is_and_where(template, most, said):
    concurrencies = [n for n in (1, 2, 4, 8) if n <= most]
    sweep = run_sweep("host:1", scenario=TINY, concurrencies=concurrencies, bench=Server(template))
    assert "knee (smallest concurrency with 90% of the best throughput)" in sweep_table(sweep).caption
    assert said in sweep_table(sweep).caption


def test_the_table_has_a_row_a_point_and_marks_the_knee(template):
    sweep = run_sweep("host:1", scenario=TINY, concurrencies=[1, 2, 4, 8], bench=Server(template))
    columns = {column.header: list(column.cells) for column in sweep_table(sweep).columns}
    assert columns["in flight"] == ["1", "2", "4 *", "8"]
    assert columns["tok/s"] == ["30.0", "60.0", "100", "100"]
    assert columns["TTFT p50 ms"] == [show_number(p.distributions["ttft_ms"].p50) for p in sweep.points]
    assert columns["ITL p99 ms"] == [show_number(p.distributions["itl_ms"].p99) for p in sweep.points]
    assert columns["requests"] == [str(p.requests) for p in sweep.points]


def test_a_given_number_of_requests_is_that_of_every_point():
    assert point_scenario(TINY, 4, 40).num_requests == 40
    with pytest.raises(BenchError, match="fewer requests than are to be in flight"):
        point_scenario(TINY, 4, 3)


def test_a_sweep_that_broke_off_goes_on_where_it_was(template, tmp_path):
    out = tmp_path / "sweep.json"
    with pytest.raises(BenchError, match="gone"):
        run_sweep("host:1", scenario=TINY, concurrencies=[1, 2, 4], out=out, bench=Server(template, fails_at=4))
    assert [point.scenario.concurrency for point in SweepResult.load(out).points] == [1, 2]
    server = Server(template)
    sweep = run_sweep("host:1", scenario=TINY, concurrencies=[1, 2, 4, 8], out=out, bench=server)
    assert [concurrency for concurrency, *_ in server.calls] == [4, 8]
    assert SweepResult.load(out) == sweep
    assert run_sweep("host:1", scenario=TINY, concurrencies=[4], out=out, bench=Server(template, fails_at=4)) == sweep


def test_a_point_with_another_number_of_requests_is_measured_again(template, tmp_path):
    out = tmp_path / "sweep.json"
    run_sweep("host:1", scenario=TINY, concurrencies=[1, 2], out=out, bench=Server(template))
    server = Server(template)
    sweep = run_sweep("host:1", scenario=TINY, concurrencies=[2], num_requests=30, out=out, bench=server)
    assert [call[:2] for call in server.calls] == [(2, 30)]
    assert [point.scenario.num_requests for point in sweep.points] == [8, 30]


def test_a_point_that_broke_off_is_measured_again_with_prompts_that_it_has_not_sent(make_checkpoint, tmp_path):
    """A prefix cache would answer some of them. Points that were not begun keep the seeds of an unbroken sweep."""
    folder, out, sent = make_checkpoint([(4, None)]), tmp_path / "sweep.json", []

    def sweep(*concurrencies, breaks_off_after=None):
        def until_somebody_presses_ctrl_c(index, request):
            if index == breaks_off_after:
                raise KeyboardInterrupt
            sent.append(tuple(request.input_ids))
            return one_token_a_response(index, request)

        connect = FakeClient(until_somebody_presses_ctrl_c).connect
        options = {"out": out, "connect": connect, "tokenizer_folder": folder, "quiet": True}
        return run_sweep("host:1", scenario=TINY, concurrencies=concurrencies, **options)

    for breaks_off_after in (5, 5, 8 + 5):  # twice the first point, then the second
        with pytest.raises(KeyboardInterrupt):
            sweep(1, 2, breaks_off_after=breaks_off_after)
    result = sweep(1, 2, 4)
    assert len(sent) == len(set(sent)) == 5 + 5 + (8 + 5) + 8 + 12
    assert [point.seed for point in result.points] == [result.begun_seeds[index] for index in (2, 4, 5)]
    assert result.points[-1].seed == point_seed(0, point_scenario(TINY, 4, None))


def test_a_sweep_that_measured_nothing_yet_does_not_stand_in_the_way_of_another(template, tmp_path):
    out = tmp_path / "sweep.json"
    with pytest.raises(BenchError, match="gone"):
        run_sweep("host:1", scenario=TINY, concurrencies=[1], seed=1, out=out, bench=Server(template, fails_at=1))
    sweep = run_sweep("host:1", scenario=TINY, concurrencies=[1], seed=2, out=out, bench=Server(template))
    assert len(sweep.points) == 1 and SweepResult.load(out) == sweep


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"seed": 1}, "seed"),
        ({"engine": "other"}, "engine"),
        ({"scenario": TINY.model_copy(update={"name": "x"})}, r"scenario\.name"),
        ({"scenario": TINY.model_copy(update={"max_tpot_ms": 5.0})}, r"scenario\.max_tpot_ms"),
        ({"url": "host:2"}, "url"),
    ],
)
def test_another_sweep_is_not_mixed_in(template, tmp_path, change, key):
    """And what differs is named: of whole scenarios the line would show the beginnings, which are alike."""
    out = tmp_path / "sweep.json"
    options = {"url": "host:1", "scenario": TINY, "concurrencies": [1], "out": out, "bench": Server(template)}
    run_sweep(**options)
    with pytest.raises(BenchError, match=rf"sweep\.json: {key}: holds another sweep"):
        run_sweep(**{**options, **change})


def test_points_of_an_engine_that_was_changed_since_are_not_mixed_in(make_checkpoint, tmp_path, monkeypatch):
    client, out = FakeClient(one_token_a_response), tmp_path / "sweep.json"
    engine = scripted_engine(tmp_path / "e", make_checkpoint([(4, None)]))

    def sweep(*concurrencies, folder=engine.path):
        options = {"scenario": TINY, "engine": folder, "out": out, "connect": client.connect, "quiet": True}
        return run_sweep("host:1", concurrencies=concurrencies, **options)

    sweep(1)
    monkeypatch.chdir(tmp_path)
    assert len(sweep(1, 2, folder="e").points) == 2  # the same one
    (engine.path / "llm_args.yaml").write_text("stream_interval: 20")
    with pytest.raises(BenchError, match=r"sweep\.json: engine: holds points of another engine.*built otherwise"):
        sweep(1, 2, 4)


@pytest.mark.parametrize("concurrencies", [[], [0, 2]])
def test_nothing_to_sweep_over_is_an_error(concurrencies):
    with pytest.raises(BenchError, match="nothing to sweep over"):
        run_sweep("host:1", scenario=TINY, concurrencies=concurrencies)


def test_the_csv_has_a_row_a_point_and_an_empty_cell_for_what_is_absent(template, tmp_path):
    no_itl = {tag: d for tag, d in template.distributions.items() if tag != "itl_ms"}
    short = template.model_copy(update={"distributions": no_itl})
    file = SweepResult.of(TINY, 0, None, [template, short]).save_csv(tmp_path / "sweep.csv")
    full_row, short_row = csv.DictReader(io.StringIO(file.read_text()))
    assert float(full_row["output_tokens_per_s"]) == template.output_tokens_per_s
    assert float(full_row["itl_ms_p99"]) == template.distributions["itl_ms"].p99
    assert (short_row["itl_ms_p99"], short_row["concurrency"], short_row["completed"]) == ("", "2", "6")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--sweep", "1,2", "--concurrency", "2"), "--sweep: excludes --concurrency"),
        (("--sweep", "1,two"), "--sweep: must be concurrencies (found 1,two"),
    ],
)
def test_wrong_options_are_one_line(options, line):
    result = invoke("bench", *options)
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert result.stderr.startswith(f"error: {line}")
