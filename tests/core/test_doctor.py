"""`doctor`: what is missing in plain words, what does not fit row by row, and exit codes that scripts can use."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import yaml
from typer.testing import CliRunner

from puzzle_trtllm.build.engine_build import build_engine
from puzzle_trtllm.cli import app
from puzzle_trtllm.doctor import machine
from puzzle_trtllm.engine import EngineConfig
from puzzle_trtllm.errors import EngineError
from puzzle_trtllm.models.trtllm.upstream import COMMAND_LINES, REQUIREMENTS, TRITON_EXPERTS
from tests.models import trtllm_standin

GPUS = "NVIDIA H100 80GB HBM3, 81559 MiB, 550.54.15, 9.0\n" * 2


@pytest.fixture
def gpu_host(monkeypatch, tmp_path):
    """A machine with two H100, tritonserver and the stand-in of TensorRT-LLM 1.2."""
    trtllm_standin.install(monkeypatch, "1.2")
    versions = {"tensorrt-llm": "1.2.1", "puzzle-trtllm": "0.1"}
    monkeypatch.setattr(machine, "_version", versions.get)
    commands = tmp_path / "commands.py"
    commands.write_text(" ".join(sorted({flag for row in COMMAND_LINES for flag in row.mentions})))
    found = {"tensorrt_llm": True}
    for row in COMMAND_LINES:
        found[row.modules[0]] = SimpleNamespace(origin=str(commands))
    monkeypatch.setattr(machine.importlib.util, "find_spec", found.get)
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '%s' '{GPUS}'\n")
    (tools / "tritonserver").write_text("#!/bin/sh\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    nccl = SimpleNamespace(version=lambda: (2, 27, 3))
    torch = sys.modules["torch"]
    monkeypatch.setattr(torch.cuda, "nccl", nccl, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    llm_args = ModuleType("tensorrt_llm.llmapi.llm_args")
    llm_args.TorchLlmArgs = lambda model, **arguments: arguments["backend"]
    monkeypatch.setitem(sys.modules, "tensorrt_llm.llmapi.llm_args", llm_args)
    return tools


@pytest.fixture
def bare_host(monkeypatch):
    """A machine without TensorRT-LLM, whatever this one has."""
    find_spec = machine.importlib.util.find_spec
    monkeypatch.setattr(
        machine.importlib.util, "find_spec", lambda name: None if name == "tensorrt_llm" else find_spec(name)
    )
    monkeypatch.setenv("PATH", "/nowhere")


def by_name(diagnosis):
    return {f"{c.group}: {c.name}": c for c in diagnosis.checks}


def test_a_bare_host_is_told_in_plain_words_what_is_missing(bare_host):
    checks = by_name(machine.diagnose())
    assert checks["TensorRT-LLM: package"].outcome == "missing"
    image = next(word for word in checks["TensorRT-LLM: package"].advice.split() if word.startswith("nvcr.io/"))
    assert (
        f"  {image} bash" in (Path(__file__).parents[2] / "docs" / "deploy.md").read_text()
    )  # the one that the guide starts
    assert checks["GPU: driver"].found == "no nvidia-smi"
    assert f"{len(REQUIREMENTS)} facts" in checks["TensorRT-LLM: table"].found
    assert not machine.diagnose().ready


def test_a_fitting_gpu_host_is_ready(gpu_host):
    diagnosis = machine.diagnose()
    assert [c for c in diagnosis.checks if c.outcome in ("missing", "wrong")] == []
    checks = by_name(diagnosis)
    assert diagnosis.ready
    assert checks["GPU: driver"].found == "550.54.15"
    assert checks["GPU: GPU 1"].found == "NVIDIA H100 80GB HBM3, 81559 MiB, compute capability 9.0"
    assert checks["GPU: NCCL"].found == "2.27.3; torch sees 2 GPUs"
    assert checks["TensorRT-LLM: package"].found == "1.2.1 (line 1.2)"
    assert {f"TensorRT-LLM: {row.key}" for row in (*REQUIREMENTS, *COMMAND_LINES)} <= set(checks)
    assert checks["Triton: tritonserver"].outcome == "ok"


def test_a_row_that_no_longer_holds_is_wrong_and_says_what_for(gpu_host, monkeypatch):
    monkeypatch.delattr(trtllm_standin.AttentionBlock, "load_weights")
    diagnosis = machine.diagnose()
    broken = by_name(diagnosis)["TensorRT-LLM: sinks-load"]
    assert broken.outcome == "wrong" and "AttributeError" in broken.found
    assert broken.advice.startswith("needed for: slices the sinks") and "modeling_gpt_oss.py" in broken.advice
    assert not diagnosis.ready


def test_a_missing_optional_row_is_a_note(gpu_host, monkeypatch):
    monkeypatch.delattr(trtllm_standin.MLPBlock, "compute_gate_output")
    diagnosis = machine.diagnose()
    assert by_name(diagnosis)["TensorRT-LLM: router-kernel"].outcome == "note" and diagnosis.ready


def test_a_router_that_takes_more_than_ours_is_wrong(gpu_host, monkeypatch):
    """Upstream once added `lora_params`, by name at every step: a replacement that does not take it fails there."""
    monkeypatch.setattr(trtllm_standin.MLPBlock, "compute_gate_output", lambda self, x, lora_params, tokens: x)
    router = by_name(machine.diagnose())["TensorRT-LLM: router-kernel"]
    assert router.outcome == "wrong" and router.found.startswith(
        "has a parameter that the plugin's own does not take: tokens"
    )


@pytest.mark.parametrize(
    ("version", "line"),
    [("1.2.1", "1.2"), ("1.3.0rc22", "1.3"), ("1.4.0rc1", "late"), ("2.0", "late"), ("1.1.0", None), ("?", None)],
)
def test_release_lines(version, line):
    assert machine.release_line(version) == line


def test_an_unsupported_version_is_wrong(gpu_host, monkeypatch):
    monkeypatch.setattr(machine, "_version", {"tensorrt-llm": "1.1.0"}.get)
    package = by_name(machine.diagnose())["TensorRT-LLM: package"]
    assert (package.outcome, package.found) == ("wrong", "1.1.0")


def test_a_driver_that_does_not_answer(gpu_host):
    (gpu_host / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed' >&2\nexit 9\n")
    driver = by_name(machine.diagnose())["GPU: driver"]
    assert (driver.outcome, driver.found) == ("wrong", "NVIDIA-SMI has failed")


def test_a_torch_that_sees_no_gpu_is_wrong(gpu_host, monkeypatch):
    monkeypatch.setattr(sys.modules["torch"].cuda, "device_count", lambda: 0)
    diagnosis = machine.diagnose()
    nccl = by_name(diagnosis)["GPU: NCCL"]
    assert (nccl.outcome, nccl.found) == ("wrong", "2.27.3; torch sees 0 GPUs")
    assert "CUDA_VISIBLE_DEVICES" in nccl.advice and not diagnosis.ready


class TestEngine:
    @pytest.fixture
    def engine(self, make_checkpoint, tmp_path):
        config = EngineConfig(runtime="tensorrt_llm", gpu="h100-80gb", scenario="cpu-demo")
        return build_engine(make_checkpoint([(4, 16), (2, None)]), tmp_path / "engine", config=config)

    def test_arguments_that_the_installed_classes_take(self, engine, gpu_host):
        assert by_name(machine.diagnose(engine.path))["engine: engine"].outcome == "ok"

    def test_arguments_that_they_refuse(self, engine, gpu_host, monkeypatch):
        def refuse(**arguments):
            raise ValueError("stream_interval\n  Extra inputs are not permitted")

        monkeypatch.setattr(sys.modules["tensorrt_llm.llmapi.llm_args"], "TorchLlmArgs", refuse)
        refused = by_name(machine.diagnose(engine.path))["engine: engine"]
        assert refused.outcome == "wrong"
        assert refused.found == "ValueError: stream_interval Extra inputs are not permitted"

    @pytest.mark.parametrize(
        ("arguments", "outcome", "found"),
        [
            ({}, "ok", "2 here, 1 needed"),
            ({"tensor_parallel_size": 2}, "ok", "2 here, 2 needed"),
            ({"tensor_parallel_size": 4}, "wrong", "2 here, 4 needed"),
            ({"tensor_parallel_size": 4, "gpus_per_node": 2}, "ok", "2 here, 2 needed of 4 in all"),
            ({"tensor_parallel_size": 16}, "wrong", "2 here, 8 needed of 16 in all"),
        ],
    )
    def test_its_gpus_against_those_of_this_node(self, engine, gpu_host, arguments, outcome, found):
        file = engine.path / "llm_args.yaml"
        file.write_text(yaml.safe_dump({**engine.llm_args, **arguments}))
        diagnosis = machine.diagnose(engine.path)
        gpus = by_name(diagnosis)["engine: GPUs"]
        assert (gpus.outcome, gpus.found) == (outcome, found)
        assert ("gpus_per_node" in gpus.advice) is (not diagnosis.ready) is (outcome == "wrong")

    @pytest.mark.parametrize(
        ("spoil", "outcome", "found"),
        [
            (lambda module, monkeypatch: None, "ok", "TRITON kernels"),
            (
                lambda module, monkeypatch: monkeypatch.setattr(
                    module, "IS_TRITON_KERNELS_AVAILABLE", False, raising=False
                ),
                "wrong",
                "the package triton_kernels cannot be imported",
            ),
            (lambda module, monkeypatch: monkeypatch.delattr(module, "TritonFusedMoE"), "wrong", "AttributeError"),
        ],
    )
    def test_the_kernels_of_its_experts(self, engine, gpu_host, monkeypatch, spoil, outcome, found):
        """TensorRT-LLM says `Triton kernels are not available` minutes later, in a worker."""
        spoil(sys.modules[TRITON_EXPERTS.modules[0]], monkeypatch)
        diagnosis = machine.diagnose(engine.path)
        experts = by_name(diagnosis)["engine: experts"]
        assert experts.outcome == outcome and found in experts.found
        assert ("backend: CUTLASS" in experts.advice) is (not diagnosis.ready) is (outcome == "wrong")

    @pytest.mark.parametrize(("available", "outcome"), [(True, "ok"), (False, "wrong")])
    def test_the_kernels_of_its_experts_where_autumn_2026_moved_them(
        self, engine, gpu_host, monkeypatch, available, outcome
    ):
        before, after = TRITON_EXPERTS.modules
        module = sys.modules[before]
        monkeypatch.setattr(module, "IS_TRITON_KERNELS_AVAILABLE", available, raising=False)
        monkeypatch.delitem(sys.modules, before)
        monkeypatch.setitem(sys.modules, after, module)
        assert by_name(machine.diagnose(engine.path))["engine: experts"].outcome == outcome

    @pytest.mark.parametrize(
        ("installed", "target", "outcome"),
        [("1.2.1", "1.2", None), ("1.3.0", "1.2", "note"), ("1.2.1", "1.3", "wrong"), ("1.3.0", "late", "wrong")],
    )
    def test_the_line_it_was_built_for(
        self, make_checkpoint, tmp_path, gpu_host, monkeypatch, installed, target, outcome
    ):
        """An older line computes wrongly what engines for newer ones ask of it."""
        config = EngineConfig(runtime="tensorrt_llm", gpu="h100-80gb", scenario="cpu-demo", target=target)
        engine = build_engine(make_checkpoint([(4, 16), (2, None)]), tmp_path / "e", config=config)
        monkeypatch.setattr(machine, "_version", {"tensorrt-llm": installed, "puzzle-trtllm": "0.1"}.get)
        check = by_name(machine.diagnose(engine.path)).get("engine: target")
        assert (check and check.outcome) == outcome
        if check is not None:
            assert check.advice == f"build it again with `--target {installed[:3]}`"

    def test_an_engine_for_other_kernels_needs_none_of_tritons(self, engine, gpu_host, monkeypatch):
        monkeypatch.delattr(sys.modules[TRITON_EXPERTS.modules[0]], "TritonFusedMoE")
        arguments = {**engine.llm_args, "moe_config": {"backend": "TRTLLM"}}
        (engine.path / "llm_args.yaml").write_text(yaml.safe_dump(arguments))
        diagnosis = machine.diagnose(engine.path)
        assert diagnosis.ready and "engine: experts" not in by_name(diagnosis)
        assert by_name(diagnosis)["TensorRT-LLM: triton-experts"].outcome == "note"

    def test_an_engine_of_two_nodes_of_eight(self, engine, gpu_host, monkeypatch):
        (engine.path / "llm_args.yaml").write_text(yaml.safe_dump({**engine.llm_args, "tensor_parallel_size": 16}))
        monkeypatch.setattr(sys.modules["torch"].cuda, "device_count", lambda: 8)
        assert by_name(machine.diagnose(engine.path))["engine: GPUs"].outcome == "ok"

    def test_no_engine_folder_is_the_users_error(self, tmp_path):
        with pytest.raises(EngineError, match=r"engine\.json: missing"):
            machine.diagnose(tmp_path)


class TestCommand:
    def test_exit_1_and_the_reason_on_a_machine_without(self, bare_host):
        result = CliRunner().invoke(app, ["doctor"])
        assert result.exit_code == 1
        assert "Not ready for TensorRT-LLM: " in result.stdout and "TensorRT-LLM package" in result.stdout

    def test_exit_0_on_a_ready_one(self, gpu_host):
        result = CliRunner().invoke(app, ["doctor"])
        assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, "Ready for TensorRT-LLM.")

    def test_json(self, bare_host):
        result = CliRunner().invoke(app, ["doctor", "--json"])
        document = json.loads(result.stdout.splitlines()[-1])
        assert result.exit_code == 1 and document["ready"] is False
        assert {"group", "name", "outcome", "found", "advice"} == set(document["checks"][0])
