"""YAML in, validated object out: every shipped file loads, every wrong one is one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from puzzle_trtllm.engine import ENGINE_CONFIG_FOLDER, load_engine_config
from puzzle_trtllm.errors import ConfigError
from puzzle_trtllm.scenario import SCENARIO_FOLDER, load_scenario

SCENARIOS = sorted(file.stem for file in SCENARIO_FOLDER.glob("*.yaml"))
ENGINE_CONFIGS = sorted(file.stem for file in ENGINE_CONFIG_FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_shipped_scenario_loads(name):
    assert load_scenario(name).name == name


@pytest.mark.parametrize("name", ENGINE_CONFIGS)
def test_every_shipped_engine_config_loads_and_its_scenario_exists(name):
    config = load_engine_config(name)
    assert load_scenario(config.scenario).name == config.scenario


def test_a_load_of_minutes_has_a_warm_up_and_only_one_of_hours_has_none():
    """A server's first requests compile kernels, which shows in a short run's throughput and latencies."""
    cold = {name for name in SCENARIOS if not load_scenario(name).warmup_requests}
    assert cold == {"long", "long-node", "isl1024-osl32768"}


def test_the_names_that_the_documentation_uses_are_shipped():
    assert {"long", "short", "cpu-demo"} <= set(SCENARIOS)
    assert "cpu-demo" in ENGINE_CONFIGS


def test_the_papers_scenarios():
    long, short = load_scenario("long"), load_scenario("short")
    assert (long.input_tokens, long.output_tokens, long.sequence_tokens) == (65536, 65536, 131072)
    assert (short.input_tokens, short.output_tokens, short.sequence_tokens) == (4096, 4096, 8192)


def test_the_grid_of_lengths_has_what_its_names_say():
    grid = {name for name in SCENARIOS if name.startswith("isl")}
    assert {(s.input_tokens, s.output_tokens) for s in map(load_scenario, grid)} == {
        *((1024, 1024), (8192, 1024), (32768, 1024)),
        *((1024, 8192), (1024, 32768)),
    }
    assert {f"isl{s.input_tokens}-osl{s.output_tokens}" for s in map(load_scenario, grid)} == grid


def test_cpu_twins_are_as_square_as_what_they_stand_for():
    long, short = load_scenario("cpu-long"), load_scenario("cpu-short")
    assert (long.input_tokens, short.input_tokens) == (long.output_tokens, short.output_tokens)
    assert long.input_tokens > short.input_tokens


def test_a_name_may_carry_its_suffix():
    assert load_scenario("long.yaml") == load_scenario("long")


GOOD = "name: x\ninput_tokens: 1\noutput_tokens: 1\nconcurrency: 1\nnum_requests: 1\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD + "bursts: 3\n", r"bursts: unknown key .*input_tokens, output_tokens"),
        (GOOD.replace("input_tokens: 1\n", ""), "input_tokens: missing key"),
        (GOOD.replace("input_tokens: 1", "input_tokens: 0"), r"input_tokens: .*greater than or equal to 1 .found 0"),
        (GOOD.replace("input_tokens: 1", "input_tokens: many"), "input_tokens: .*'many'"),
        (GOOD.replace("input_tokens: 1", "input_tokens: yes"), "input_tokens: .*valid integer .found True"),
        (GOOD.replace("input_tokens: 1", "input_tokens: '1'"), "input_tokens: .*valid integer .found '1'"),
        (GOOD.replace("input_tokens: 1", "input_tokens: 1.0"), "input_tokens: .*valid integer .found 1.0"),
        (GOOD.replace("num_requests: 1", f"num_requests: {2**31}"), "num_requests: .*less than or equal to 2147483647"),
        (GOOD.replace("num_requests: 1", "num_requests: 0100"), "not valid YAML: 0100 is no decimal integer.*line 5"),
        (GOOD.replace("num_requests: 1", "num_requests: 1:30"), "not valid YAML: 1:30 is no decimal integer"),
        (GOOD + "max_ttft_ms: true\n", "max_ttft_ms: .*valid number .found True"),
        (GOOD.replace("name: x", "name: 7"), "name: .*valid string .found 7"),
        (GOOD + "input_spread: {width: 1}\n", r"input_spread\.width: unknown key$"),
        ("- a\n- b\n", "must be a mapping .found list"),
        ("a: [1\nb: 2", "not valid YAML"),
        ("", "must be a mapping"),
        (b"name: caf\xe9\n", "not UTF-8 text"),
        (GOOD.replace("name: x", "name: 2020-13-45"), "not valid YAML: month must be in 1..12"),
        ("[" * 5000, "not valid YAML: .*recursion"),
        (GOOD + "concurrency: 2\n", "not valid YAML: key 'concurrency' occurs twice .*line 6"),
        (GOOD + "deep: [{a: 1, a: 1}]\n", "not valid YAML: key 'a' occurs twice .*line 6"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, content, message):
    file = tmp_path / "x.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message) as caught:
        load_scenario(file)
    assert str(caught.value).startswith(str(file)) and "\n" not in str(caught.value)


def test_an_integer_is_a_number_too(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text(GOOD + "max_ttft_ms: 100\ninput_spread: {uniform: 1}\n")
    assert load_scenario(file).max_ttft_ms == 100


def test_a_merge_may_be_overridden(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("<<: {name: x, input_tokens: 1, output_tokens: 1, concurrency: 1, num_requests: 1}\nconcurrency: 2")
    assert load_scenario(file).concurrency == 2


@pytest.mark.parametrize("name", ["nothing", "nothing.yaml", "/tmp/nothing/long.yaml", "sub/long"])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(ConfigError, match=r"no such scenario .*cpu-demo, .*long, long-node, short, short-node\)"):
        load_scenario(name)


def test_a_path_wins_over_a_shipped_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("long.yaml").write_text(GOOD)
    assert load_scenario("long.yaml").name == "x"
    assert load_scenario("long").name == "long"


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e3", 1000.0), ("1.5e3", 1500.0), ("2E+1", 20.0), ("1e-5", 1e-5), (".5e1", 5.0), ("1.e1", 10.0)],
)
def test_a_number_may_have_an_exponent(tmp_path, text, value):
    """YAML 1.1, PyYAML's, wants a point in it and a sign behind the e; else it is text there."""
    file = tmp_path / "x.yaml"
    file.write_text(f"{GOOD}max_ttft_ms: {text}\n")
    assert load_scenario(file).max_ttft_ms == value
    file.write_text(f"runtime: reference\nllm_args: {{a: {text}, b: '{text}', c: {text}x, d: e3}}\n")
    args = load_engine_config(file).llm_args
    assert (type(args["a"]), args) == (float, {"a": value, "b": text, "c": f"{text}x", "d": "e3"})


def test_what_is_to_be_whole_is_no_number_with_an_exponent(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text(GOOD.replace("num_requests: 1", "num_requests: 1e3"))
    with pytest.raises(ConfigError, match=r"num_requests: .*valid integer .found 1000\.0"):
        load_scenario(file)
