"""The folder of a TensorRT-LLM engine: launch scripts, the dataset of trtllm-bench, the plugin."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from puzzle_trtllm.build.derived_values import to_nested
from puzzle_trtllm.build.engine_build import build_engine, explain
from puzzle_trtllm.build.launch import launch_scripts, write_dataset
from puzzle_trtllm.engine import EngineConfig, load_engine_config
from puzzle_trtllm.scenario import Scenario, load_scenario
from tests.build.golden_deployments import MODELS
from tests.front_door.cli import invoke
from tests.models import trtllm_standin

CHILD = MODELS["child"]


@pytest.fixture
def toy_engine(make_checkpoint, tmp_path):
    """A child's engine for TensorRT-LLM in a folder whose name holds a space."""
    scenario = tmp_path / "tiny.yaml"
    scenario.write_text("name: tiny\ninput_tokens: 20\noutput_tokens: 10\nconcurrency: 2\nnum_requests: 3\n")
    config = EngineConfig(runtime="tensorrt_llm", gpu="h100-80gb", num_gpus=2, kv_dtype="fp8", scenario=str(scenario))
    checkpoint = make_checkpoint([(4, 16), (2, None)], kv_scales=[(0.5, 2.0)] * 2)
    return build_engine(checkpoint, tmp_path / "my engine", config=config)


@pytest.mark.parametrize(
    ("target", "option", "wins"),
    [
        ("1.2", "--extra_llm_api_options", "llm_args.yaml wins over flags"),
        ("1.3", "--config", "llm_args.yaml wins over flags"),
        ("late", "--config", "flags given here win over llm_args.yaml"),
    ],
)
def test_scripts_speak_the_language_of_their_line(target, option, wins):
    config = load_engine_config("h100x1-short").model_copy(update={"target": target})
    values = to_nested(explain(CHILD, config=config))
    scripts = launch_scripts(config, values, load_scenario(config.scenario), plugin=True)
    for name in ("trtllm-serve.sh", "trtllm-bench.sh"):
        assert f'{option} "$ENGINE/llm_args.yaml"' in scripts[name]
    assert wins in scripts["trtllm-serve.sh"]


def test_a_shipped_config_is_built_for_the_line_that_is_installed(make_checkpoint, tmp_path):
    checkpoint, out = make_checkpoint([(4, 16), (2, None)], kv_scales=[(0.5, 2.0)] * 2), tmp_path / "engine"
    config = EngineConfig(runtime="tensorrt_llm", gpu="h100-80gb", kv_dtype="fp8", scenario="cpu-demo")
    engine = build_engine(checkpoint, out, config=config, target="late")
    assert "--config" in (out / "launch" / "trtllm-serve.sh").read_text()
    assert engine.manifest.provenance["engine_config"]["target"] == "late"
    result = invoke("build", CHILD, "--config", "h100x1-long", "--target", "1.3", "--explain")
    assert result.exit_code == 0 and "in 1.3 and will remove" in result.stderr


class TestEngineFolder:
    def test_its_files(self, toy_engine):
        assert {path.name for path in toy_engine.path.iterdir()} == {
            "engine.json",
            "llm_args.yaml",
            "model",
            "plugin",
            "launch",
        }
        config = json.loads((toy_engine.model_path / "config.json").read_text())
        assert (config["model_type"], config["architectures"]) == ("gpt_oss", ["GptOssPuzzleForCausalLM"])

    def test_a_model_that_upstream_knows_gets_no_plugin(self, make_checkpoint, tmp_path):
        config = EngineConfig(runtime="tensorrt_llm", gpu="h100-80gb", scenario="cpu-demo")
        engine = build_engine(make_checkpoint([(4, 16), (4, None)]), tmp_path / "engine", config=config)
        assert not (engine.path / "plugin").exists()
        assert "custom_module_dirs" not in (engine.path / "launch" / "trtllm-serve.sh").read_text()

    def test_the_reference_runtime_gets_neither(self, make_checkpoint, tmp_path):
        config = EngineConfig(runtime="reference", scenario="cpu-demo")
        engine = build_engine(make_checkpoint([(4, 16), (2, None)]), tmp_path / "engine", config=config)
        assert {path.name for path in engine.path.iterdir()} == {"engine.json", "llm_args.yaml", "model"}

    def test_the_plugins_path_shadows_no_importable_name(self, toy_engine):
        """Its parent goes on sys.path of every worker: all it holds must be new names."""
        names = [path.stem for path in (toy_engine.path / "plugin").iterdir()]
        assert names == ["puzzle_trtllm_plugin"]
        assert not {*names} & {*sys.stdlib_module_names, *sys.builtin_module_names}
        assert not {*names} & {*importlib.metadata.packages_distributions(), "tensorrt_llm", "puzzle_trtllm"}
        assert importlib.util.find_spec("puzzle_trtllm_plugin") is None

    def test_no_folder_of_ours_is_called_like_the_real_one(self):
        root = Path(importlib.util.find_spec("puzzle_trtllm").origin).parent
        assert not [path for path in root.rglob("tensorrt_llm") if path.is_dir()]

    def test_importing_it_as_trtllm_serve_does_registers_the_child(self, toy_engine, monkeypatch):
        trtllm_standin.install(monkeypatch, "1.2")
        monkeypatch.syspath_prepend(str(toy_engine.path / "plugin"))
        importlib.import_module("puzzle_trtllm_plugin")
        try:
            assert "GptOssPuzzleForCausalLM" in trtllm_standin.REGISTRY
        finally:
            for name in ("puzzle_trtllm_plugin", "puzzle_trtllm.models.trtllm.modeling"):
                sys.modules.pop(name, None)

    def test_launch_scripts_say_where_things_are_and_pass_arguments_on(self, toy_engine, tmp_path):
        tools = tmp_path / "bin"
        tools.mkdir()
        for name in ("trtllm-serve", "trtllm-bench", "python3"):
            (tools / name).write_text('#!/bin/sh\necho "$TRTLLM_WINDOW_SIZE_SHARES"\nprintf "%s\\n" "$0" "$@"\n')
            (tools / name).chmod(0o755)
        lines = {}
        for script in {*(toy_engine.path / "launch").glob("*.sh")} - {toy_engine.path / "launch" / "environment.sh"}:
            command = [str(script), "--extra", "a b"]
            environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
            ran = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd="/")
            lines[script.name] = ran.stdout.splitlines()
        shares = toy_engine.llm_args["env_overrides"]["TRTLLM_WINDOW_SIZE_SHARES"]
        assert {output[0] for output in lines.values()} == {shares}
        assert all(output[-2:] == ["--extra", "a b"] for output in lines.values())
        engine, plugin = str(toy_engine.path), str(toy_engine.path / "plugin" / "puzzle_trtllm_plugin")
        serve, bench, triton = (lines[f"{name}.sh"] for name in ("trtllm-serve", "trtllm-bench", "tritonserver"))
        assert f"{engine}/model" in serve and serve[serve.index("--custom_module_dirs") + 1] == plugin
        assert serve[serve.index("--extra_llm_api_options") + 1] == f"{engine}/llm_args.yaml"
        assert bench[bench.index("--dataset") + 1] == f"{engine}/launch/bench-dataset.jsonl"
        assert bench[bench.index("--custom_module_dirs") + 1] == plugin
        assert [bench[bench.index(flag) + 1] for flag in ("--tp", "--ep", "--concurrency")] == ["2", "2", "2"]
        assert triton[2:6] == ["-m", "puzzle_trtllm", "serve", engine]

    def test_the_dataset_has_the_scenarios_lengths(self, toy_engine):
        text = (toy_engine.path / "launch" / "bench-dataset.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        assert [row["task_id"] for row in rows] == [0, 1, 2]
        assert {(len(row["input_ids"]), row["output_tokens"]) for row in rows} == {(20, 10)}
        assert len({row["input_ids"][0] for row in rows}) > 1

    def test_lengths_that_scatter_do_so_in_the_dataset(self, tmp_path):
        spreads = {"input_spread": {"uniform": 0.5}, "output_spread": {"normal": 5}}
        scenario = Scenario(name="x", input_tokens=40, output_tokens=30, concurrency=1, num_requests=200, **spreads)
        write_dataset(tmp_path / "d", scenario, vocab_size=500)
        rows = [json.loads(line) for line in (tmp_path / "d").open()]
        for lengths, low, high in (
            ([len(row["input_ids"]) for row in rows], 20, 60),
            ([row["output_tokens"] for row in rows], 15, 45),
        ):
            assert low <= min(lengths) < low + 6 and high - 6 < max(lengths) <= high

    def test_the_dataset_holds_no_control_tokens_and_is_the_same_twice(self, tmp_path):
        scenario = Scenario(name="x", input_tokens=2000, output_tokens=1, concurrency=1, num_requests=3)
        for name in ("a", "b"):
            write_dataset(tmp_path / name, scenario, vocab_size=201088)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
        ids = [i for line in (tmp_path / "a").open() for i in json.loads(line)["input_ids"]]
        assert min(ids) >= 0 and 190_000 < max(ids) < 199_998  # 199998 is <|startoftext|>, the first special token
