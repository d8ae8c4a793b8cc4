"""Closed and open loops are told apart by one key, and nobody gets the one for the other."""

from __future__ import annotations

import pytest

from puzzle_trtllm.errors import ConfigError
from puzzle_trtllm.scenario import OpenScenario, Scenario, load_any_scenario, load_scenario

LENGTHS = "name: x\ninput_tokens: 1\noutput_tokens: 1\nnum_requests: 9\n"


def written(tmp_path, text):
    file = tmp_path / "x.yaml"
    file.write_text(LENGTHS + text)
    return file


def test_a_concurrency_makes_a_closed_loop(tmp_path):
    file = written(tmp_path, "concurrency: 3\n")
    assert load_any_scenario(file) == load_scenario(file)
    assert isinstance(load_scenario(file), Scenario)


def test_a_request_rate_makes_an_open_loop_of_poisson_arrivals(tmp_path):
    scenario = load_any_scenario(written(tmp_path, "request_rate: 2.5\n"))
    assert isinstance(scenario, OpenScenario)
    assert (scenario.request_rate, scenario.arrival, scenario.sequence_tokens) == (2.5, "poisson", 2)
    assert load_any_scenario(written(tmp_path, "request_rate: 2\narrival: constant\n")).arrival == "constant"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("concurrency: 3\nrequest_rate: 2\n", "request_rate: excludes concurrency"),
        ("request_rate: 0\n", r"request_rate: .*greater than 0"),
        ("request_rate: .inf\n", r"request_rate: .*finite"),
        ("request_rate: 1\narrival: bursts\n", r"arrival: .*'poisson' or 'constant'"),
        ("concurrency: 3\narrival: poisson\n", "arrival: unknown key"),
        ("", "concurrency: missing key"),
    ],
)
def test_a_file_that_is_neither_is_one_line(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_any_scenario(written(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_who_needs_a_concurrency_refuses_an_open_loop(tmp_path):
    with pytest.raises(ConfigError, match=r"request_rate: is an open loop.*found 2\.0, expected concurrency"):
        load_scenario(written(tmp_path, "request_rate: 2\n"))
