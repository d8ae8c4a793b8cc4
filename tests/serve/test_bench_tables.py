"""What bench prints: every number in its row and column, and what a reader must know below them."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from puzzle_trtllm.scenario import OpenScenario, ReplayScenario, Scenario
from puzzle_trtllm.scenario import Spread as LengthSpread
from puzzle_trtllm.serve.bench.result import (
    BenchResult,
    ClientFacts,
    InterleavedResult,
    OpenLoopResult,
    ServerRounds,
    metric_facts,
    show_lengths,
)
from puzzle_trtllm.serve.metrics.catalogue import DISTRIBUTIONS, SCALARS
from puzzle_trtllm.serve.metrics.queue import OfferedLoad
from puzzle_trtllm.serve.metrics.records import RequestCounts
from puzzle_trtllm.serve.metrics.statistics import Distribution
from tests.serve.measurements import PROVENANCE

LENGTHS = {"name": "tiny", "input_tokens": 1024, "output_tokens": 128, "num_requests": 64}
SCENARIO = Scenario(**LENGTHS, concurrency=8)
TTFT = Distribution(count=60, mean=1.0, min=0.5, p50=2.0, p90=3.0, p95=4.0, p99=5.0, max=6.0)
MEASURED = {
    "name": "parent",
    "url": "host:1",
    "seed": 0,
    "lengths": "exact",
    "token_counts": "server",
    "requests": RequestCounts(completed=60, failed=4),
    "errors": {"UNAVAILABLE": 4},
    "steady_window_s": 2.5,
    "steady_window_tokens": 3086,
    "wall_s": 3.0,
    "scalars": {"output_tokens_per_s": 1234.5},
    "distributions": {"ttft_ms": TTFT},
    "absent": {},
    "units": metric_facts("unit"),
    "formulas": metric_facts("formula"),
    "provenance": PROVENANCE,
}


def bench(**changes) -> BenchResult:
    return BenchResult.model_validate({**MEASURED, "scenario": SCENARIO, **changes})


def printed(result) -> list[str]:
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(result)
    return [line.strip() for line in console.export_text().splitlines()]


def caption(result) -> str:
    """What stands below the table, whose width it is wrapped to."""
    lines = printed(result)
    return " ".join(lines[next(i for i, line in enumerate(lines) if line.startswith("└")) + 1 :])


def cells(result) -> dict[str, list[str]]:
    """First cell of a row -> the others."""
    rows = ([cell.strip() for cell in line.strip("│┃").split("│")] for line in printed(result) if line.startswith("│"))
    return {first: others for first, *others in rows}


def test_every_statistic_stands_in_its_column():
    lines = printed(bench())
    assert [column.strip() for column in lines[2].strip("┃").split("┃")] == [
        "metric", "unit", "mean", "p50", "p90", "p95", "p99",
    ]  # fmt: skip
    assert cells(bench()) == {
        "output_tokens_per_s": ["tok/s", "1,234", "", "", "", ""],
        "ttft_ms": ["ms", "1.00", "2.00", "3.00", "4.00", "5.00"],
    }
    assert lines[0] == "parent: tiny, 1,024 in, 128 out"
    assert caption(bench()) == "8 in flight for 2.5 s; requests: 60 completed, 4 failed"


def test_no_digit_is_lost_in_80_columns():
    latencies = {metric.tag: Distribution.of([123_456.0]) for metric in DISTRIBUTIONS}
    rates = {metric.tag: 654_321.0 for metric in SCALARS}
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(bench(scalars=rates, distributions=latencies))
    text = console.export_text()
    assert text.count("123,456") == 5 * len(DISTRIBUTIONS) and text.count("654,321") == len(SCALARS)


def test_what_makes_numbers_doubtful_stands_below_them():
    assert "tokens counted by the tokenizer" in caption(bench(token_counts="tokenizer"))
    alone = ClientFacts(workers=1, busiest_cpu=0.8)
    assert caption(bench(client=alone)).endswith("4 failed client: 1 process, 80% of a core")
    busy = ClientFacts(workers=3, busiest_cpu=0.81)
    assert caption(bench(client=busy)).endswith(
        "client: 3 processes, 81% of a core; ITS OWN SPEED MAY BE IN THESE NUMBERS: raise --workers"
    )


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({}, "1,024 in, 128 out"),
        ({"input_spread": LengthSpread(uniform=0.5)}, "about 1,024 in, 128 out"),
        ({"output_spread": LengthSpread(normal=8)}, "1,024 in, about 128 out"),
        (
            {"trace": {"file": "t", "sha256": "ab" * 32, "longest_sequence": 2048, "shared_blocks": False}},
            "about 1,024 in, about 128 out",
        ),
    ],
)
def test_lengths_that_are_means_say_so(changes, shown):
    assert show_lengths(Scenario.model_validate({**LENGTHS, "concurrency": 8, **changes})) == shown


@pytest.mark.parametrize(
    ("scenario", "arrivals"),
    [
        (OpenScenario(**LENGTHS, request_rate=4.0), "poisson arrivals"),
        (ReplayScenario(**LENGTHS, speed=2.0), "arrivals of the trace at 2 times its speed"),
    ],
)
@pytest.mark.parametrize(("grew", "verdict"), [(False, "steady"), (True, "THE QUEUE GREW WITHOUT BOUND")])
def test_an_open_loop_tells_what_was_offered_and_achieved(scenario, arrivals, grew, verdict):
    queue = OfferedLoad(
        offered_requests_per_s=4.0,
        achieved_requests_per_s=3.0,
        mean_in_flight_by_third=(1.5, 2.5, 3.5),
        queue_grew=grew,
        max_send_delay_ms=0.1,
    )
    told = caption(OpenLoopResult.model_validate({**MEASURED, "scenario": scenario, "queue": queue}))
    offered = f"{arrivals}, 4.00 requests/s offered, 3.00 achieved; in flight 1.5 to 3.5, {verdict}"
    assert told.startswith(offered)
    assert told.endswith("for 2.5 s; requests: 60 completed, 4 failed")


def test_servers_in_turn_have_a_row_each():
    rounds = [bench(scalars={"output_tokens_per_s": speed}) for speed in (1000.0, 3000.0, 2000.0)]
    other = [bench(scalars={"output_tokens_per_s": 10.0}, distributions={}, requests=RequestCounts(completed=64))]
    servers = {"parent": ServerRounds.of(rounds), "child": ServerRounds.of(other)}
    result = InterleavedResult(scenario=SCENARIO, servers=servers, order=[["parent", "child"]])
    assert cells(result) == {
        "parent": ["2,000", "1,000 3,000 2,000", "2.00 ms", "-", "60 completed, 4 failed"],
        "child": ["10", "10", "-", "-", "64 completed"],
    }
