"""Closed and open loops are told apart by one key, and nobody gets the one for the other."""

from __future__ import annotations

import json
import random
import statistics

import pytest

from puzzle_trtllm.errors import ConfigError
from puzzle_trtllm.scenario import OpenScenario, Scenario, Spread, load_any_scenario, load_scenario

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
        ("concurrency: 3\ninput_spread: {}\n", "input_spread: .*either uniform or normal"),
        ("concurrency: 3\ninput_spread: {uniform: 0.5, normal: 3}\n", "input_spread: .*either uniform or normal"),
        ("concurrency: 3\noutput_spread: {uniform: 1.5}\n", "output_spread.uniform: .*less than or equal to 1"),
        ("concurrency: 3\noutput_spread: {normal: 0}\n", "output_spread.normal: .*greater than 0"),
        ("concurrency: 3\noutput_spread: {normal: .inf}\n", "output_spread.normal: .*finite"),
        ("concurrency: 2147483648\n", "concurrency: .*less than or equal to 2147483647"),
        ("concurrency: 3\nmax_ttft_ms: .inf\n", "max_ttft_ms: .*finite"),
        ("concurrency: 3\ntrace: {}\n", "trace: is no key of a file"),
    ],
)
def test_a_file_that_is_neither_is_one_line(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_any_scenario(written(tmp_path, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["max_tpot_ms", "max_itl_ms"])
def test_the_limit_on_tpot_is_read_under_its_older_name_too(tmp_path, name):
    scenario = load_scenario(written(tmp_path, f"concurrency: 3\n{name}: 50\n"))
    assert scenario.max_tpot_ms == 50
    assert Scenario.model_validate_json(scenario.model_dump_json(), strict=True) == scenario
    older = json.dumps({"max_itl_ms" if key == "max_tpot_ms" else key: v for key, v in scenario.model_dump().items()})
    assert Scenario.model_validate_json(older, strict=True) == scenario
    with pytest.raises(ConfigError, match=r"max_tpot_ms: .*greater than 0"):
        load_scenario(written(tmp_path, "concurrency: 3\nmax_tpot_ms: 0\n"))


def test_two_names_of_one_limit_are_one_too_many(tmp_path):
    with pytest.raises(ConfigError, match="max_itl_ms: unknown key"):
        load_scenario(written(tmp_path, "concurrency: 3\nmax_tpot_ms: 50\nmax_itl_ms: 60\n"))


def test_a_name_is_one_line_as_comments_of_shell_scripts_are(tmp_path):
    file = written(tmp_path, "concurrency: 3\n")
    text = file.read_text()
    assert text.startswith("name: ")
    file.write_text('name: "x\\nrm -rf ~"\n' + text.partition("\n")[2])
    with pytest.raises(ConfigError, match=r"name: must be one line of printable text"):
        load_any_scenario(file)


def test_who_needs_a_concurrency_refuses_an_open_loop(tmp_path):
    with pytest.raises(ConfigError, match=r"request_rate: is an open loop.*found 2\.0, expected concurrency"):
        load_scenario(written(tmp_path, "request_rate: 2\n"))


def test_a_spread_makes_the_longest_sequence_longer(tmp_path):
    spread = "concurrency: 1\ninput_spread: {uniform: 0.5}\noutput_spread: {normal: 20}\n"
    file = written(tmp_path, spread)
    file.write_text(file.read_text().replace("tokens: 1\n", "tokens: 100\n"))
    load = load_scenario(file)
    assert (load.sequence_tokens, load.longest_sequence) == (310, "150 in + 160 out")


@pytest.mark.parametrize(("spread", "low", "high"), [({"uniform": 0.5}, 50, 150), ({"normal": 20}, 40, 160)])
def test_lengths_keep_their_mean_and_their_bounds(spread, low, high):
    source = random.Random(1)
    lengths = [Spread(**spread).draw(100, source) for _ in range(5000)]
    assert Spread(**spread).bounds(100) == (low, high)
    assert low <= min(lengths) < low + 15 and high - 15 < max(lengths) <= high
    # Standard error of the mean: at most 50 / sqrt(3) / sqrt(5000) = 0.41 tokens.
    assert statistics.mean(lengths) == pytest.approx(100, abs=1.7)


def test_a_normal_spread_keeps_whole_lengths_within_three_deviations_and_above_zero():
    assert Spread(normal=0.5).bounds(10) == (9, 11)  # 8.5 and 11.5
    assert Spread(normal=20).bounds(3) == (1, 63)
    assert Spread(uniform=1).bounds(3) == (1, 6)


def test_counts_reach_to_what_32_bits_hold(tmp_path):
    assert load_scenario(written(tmp_path, "concurrency: 2147483647\n")).concurrency == 2**31 - 1


@pytest.mark.parametrize("name", ["long", "short"])
def test_a_nodes_load_is_eight_times_that_of_one_gpu(name):
    one, node = load_scenario(name), load_scenario(f"{name}-node")
    assert (node.input_tokens, node.output_tokens) == (one.input_tokens, one.output_tokens)
    assert (node.concurrency, node.num_requests) == (8 * one.concurrency, 8 * one.num_requests)
