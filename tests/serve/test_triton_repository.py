"""The generated model repository, and reading model.yaml back."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from puzzle_trtllm.build.engine_build import build_engine
from puzzle_trtllm.engine import Engine, EngineConfig
from puzzle_trtllm.errors import ConfigError, PuzzleError, ServeError
from puzzle_trtllm.serve.client.triton_client import generate
from puzzle_trtllm.serve.triton.contract import render_config
from puzzle_trtllm.serve.triton.install import find_triton
from puzzle_trtllm.serve.triton.launch import python_path
from puzzle_trtllm.serve.triton.plugin import import_plugin
from puzzle_trtllm.serve.triton.ports import hold_ports
from puzzle_trtllm.serve.triton.probe import http_status
from puzzle_trtllm.serve.triton.ranks import scrub_mpi_job
from puzzle_trtllm.serve.triton.repository import write_repository
from puzzle_trtllm.serve.triton.settings import read_model_yaml
from tests.front_door.cli import assert_user_error, invoke
from tests.serve.scripted import SCRIPTED, scripted_engine, wait_until
from tests.toys import VOCAB_SIZE


@pytest.fixture
def engine(make_checkpoint, tmp_path: Path):
    checkpoint = make_checkpoint([(4, None), (2, 16)])
    return scripted_engine(tmp_path / "engine", checkpoint, max_seq_len=64, kv_cache_config={"dtype": "fp8"})


def test_the_repository_is_three_files(engine, tmp_path: Path) -> None:
    out = write_repository(engine, tmp_path / "repository", max_open_requests=7)
    files = sorted(str(file.relative_to(out)) for file in out.rglob("*") if file.is_file())
    assert files == ["tensorrt_llm/1/model.py", "tensorrt_llm/1/model.yaml", "tensorrt_llm/config.pbtxt"]
    assert (out / files[2]).read_text() == render_config()
    assert "class TritonPythonModel" in (out / files[0]).read_text()


def test_model_yaml_holds_the_llms_arguments_and_tritons(engine, tmp_path: Path) -> None:
    out = write_repository(engine, tmp_path / "repository", max_open_requests=7, cancellation_check_period_ms=50)
    assert yaml.safe_load((out / "tensorrt_llm/1/model.yaml").read_text()) == {
        "model": str(engine.path / "model"),
        "max_seq_len": 64,
        "kv_cache_config": {"dtype": "fp8"},
        "triton_config": {
            "max_batch_size": 0,
            "decoupled": True,
            "cancellation_check_period_ms": 50.0,
            "runtime": "reference",
            "max_open_requests": 7,
            "step_timeout_s": 600.0,
            "vocab_size": VOCAB_SIZE,
        },
    }


@pytest.mark.parametrize(("given", "written"), [({}, True), ({"enable_iter_perf_stats": False}, False)])
def test_tensorrt_llm_is_asked_for_the_statistics_that_our_metrics_show(
    make_checkpoint, tmp_path, given, written
) -> None:
    """Its `get_stats` tells nothing without; an engine config that says false has its way."""
    config = EngineConfig(runtime="tensorrt_llm", gpu="h100-80gb", scenario="cpu-demo", llm_args=given)
    engine = build_engine(make_checkpoint([(4, None), (2, 16)]), tmp_path / "trtllm", config=config)
    assert engine.llm_args.get("enable_iter_perf_stats") is given.get("enable_iter_perf_stats")
    out = write_repository(engine, tmp_path / "repository")
    assert read_model_yaml(out / "tensorrt_llm/1/model.yaml").llm_args["enable_iter_perf_stats"] is written


@pytest.mark.parametrize(
    ("arguments", "taken"),
    [
        ({}, 1024),
        ({"max_batch_size": 15}, 1024),
        ({"max_batch_size": 1024, "tensor_parallel_size": 8}, 2048),
        # h100x8-short-dep: 201 on each of 8 GPUs.
        ({"max_batch_size": 201, "tensor_parallel_size": 8, "enable_attention_dp": True}, 3216),
    ],
)
def test_the_queue_is_never_shorter_than_what_the_engine_works_on(make_checkpoint, tmp_path, arguments, taken) -> None:
    engine = scripted_engine(tmp_path / "e", make_checkpoint([(4, None), (2, 16)]), **arguments)
    written = write_repository(engine, tmp_path / "repository") / "tensorrt_llm/1/model.yaml"
    assert read_model_yaml(written).triton.max_open_requests == taken
    write_repository(engine, tmp_path / "repository", max_open_requests=7, overwrite=True)
    assert read_model_yaml(written).triton.max_open_requests == 7


def test_model_yaml_is_read_back_as_written(engine, tmp_path: Path) -> None:
    out = write_repository(engine, tmp_path / "repository", decoupled=False)
    settings = read_model_yaml(out / "tensorrt_llm/1/model.yaml")
    assert settings.llm_args == {"model": str(engine.path / "model"), **engine.llm_args}
    assert (settings.triton.runtime, settings.triton.decoupled, settings.triton.plugin) == ("reference", False, None)


def test_an_engines_plugin_is_named(engine, tmp_path: Path) -> None:
    (engine.path / "plugin" / "puzzle_trtllm_plugin").mkdir(parents=True)
    out = write_repository(engine, tmp_path / "repository")
    plugin = read_model_yaml(out / "tensorrt_llm/1/model.yaml").triton.plugin
    assert plugin == str(engine.path / "plugin" / "puzzle_trtllm_plugin")


def test_an_engine_whose_path_is_not_ascii_is_reached_over_a_link(engine, tmp_path: Path) -> None:
    """The interpreter of some stubs knows no other file names, whatever the locale."""
    shutil.copytree(engine.path, tmp_path / "mü ller" / "engine")
    (tmp_path / "mü ller" / "engine" / "plugin" / "puzzle_trtllm_plugin").mkdir(parents=True)
    out = write_repository(Engine.open(tmp_path / "mü ller" / "engine"), tmp_path / "repository")
    settings = read_model_yaml(out / "tensorrt_llm/1/model.yaml")
    assert settings.llm_args["model"] == str(out / "tensorrt_llm/1/engine/model")
    assert settings.triton.plugin == str(out / "tensorrt_llm/1/engine/plugin/puzzle_trtllm_plugin")
    assert Path(settings.llm_args["model"]).resolve() == tmp_path / "mü ller" / "engine" / "model"


@pytest.mark.parametrize("name", ["my repository", "rücklage", "a|b", "a\\b", "`a`", "a*", "a\nb"])
def test_a_path_that_tritons_shell_would_break_is_refused(engine, tmp_path: Path, name: str) -> None:
    with pytest.raises(ServeError, match="only ASCII, no spaces"):
        write_repository(engine, tmp_path / name)
    assert not (tmp_path / name).exists()


def test_an_existing_repository_is_only_replaced_when_told_so(engine, tmp_path: Path) -> None:
    write_repository(engine, tmp_path / "repository")
    with pytest.raises(PuzzleError, match="not empty"):
        write_repository(engine, tmp_path / "repository")
    write_repository(engine, tmp_path / "repository", overwrite=True)


def test_the_repository_of_an_engine_is_served_by_a_tritonserver_of_ones_own(engine, tmp_path: Path) -> None:
    assert invoke("repository", engine.path, tmp_path / "out", "--max-open-requests", "7").exit_code == 0
    file = tmp_path / "out" / "tensorrt_llm" / "1" / "model.yaml"
    settings = yaml.safe_load(file.read_text())
    assert settings["triton_config"]["max_open_requests"] == 7
    settings["triton_config"]["runtime_module"] = SCRIPTED["runtime_module"]
    file.write_text(yaml.safe_dump(settings))
    install = find_triton()
    environment = {**os.environ, **install.environment, **python_path(SCRIPTED["environment"])}
    with hold_ports("127.0.0.1", {"HTTP": 0, "gRPC": 0, "metrics": 0}) as ports:
        options = [f"--{name.lower()}-port={port}" for name, port in ports.items()]
        command = [str(install.server), "--model-repository", str(tmp_path / "out"), *install.arguments(tmp_path)]
        with (tmp_path / "log").open("wb") as log:
            server = subprocess.Popen([*command, *options], env=environment, stdout=log, stderr=log)
        try:
            ready = f"http://127.0.0.1:{ports['HTTP']}/v2/models/tensorrt_llm/ready"
            wait_until(lambda: http_status(ready) == 200, what="ready")
            assert generate("ab", url=f"127.0.0.1:{ports['gRPC']}", max_tokens=5).text == "ababa"
        finally:
            server.terminate()
            server.wait(30)


def test_other_models_of_a_repository_stay(engine, tmp_path: Path) -> None:
    other = tmp_path / "out" / "embedding" / "config.pbtxt"
    other.parent.mkdir(parents=True)
    other.write_text("")
    for _ in range(2):
        assert invoke("repository", engine.path, tmp_path / "out", "--overwrite").exit_code == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["embedding", "tensorrt_llm"]
    assert_user_error(invoke("repository", engine.path, tmp_path / "out"), "tensorrt_llm", "not empty", "--overwrite")


def test_a_repository_never_replaces_the_engine_that_it_is_of(engine, tmp_path: Path) -> None:
    engine.path.rename(tmp_path / "tensorrt_llm")
    result = invoke("repository", tmp_path / "tensorrt_llm", tmp_path, "--overwrite")
    assert_user_error(result, "would replace")
    assert Engine.open(tmp_path / "tensorrt_llm").llm_args == engine.llm_args


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: x", "triton_config: missing key"),
        ("triton_config: {max_batch_size: 4}", "triton_config.max_batch_size"),
        ("triton_config: {decupled: true}", "triton_config.decupled"),
        ("triton_config: {runtime: onnx}", "triton_config.runtime"),
        ("triton_config: {max_open_requests: true}", "triton_config.max_open_requests"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_wrong_model_yaml_is_one_clear_line(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "model.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        read_model_yaml(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_variables_of_a_running_mpi_job_go_and_settings_stay() -> None:
    environment = {
        "OMPI_COMM_WORLD_RANK": "0", "PMIX_RANK": "0", "PMI_SIZE": "1", "OMPI_MCA_orte_ess_num_procs": "2",
        "OMPI_MCA_btl": "tcp", "PMIX_MCA_gds": "hash", "PATH": "/bin",
    }  # fmt: skip
    removed = scrub_mpi_job(environment)
    assert sorted(removed) == ["OMPI_COMM_WORLD_RANK", "OMPI_MCA_orte_ess_num_procs", "PMIX_RANK", "PMI_SIZE"]
    assert set(environment) == {"OMPI_MCA_btl", "PMIX_MCA_gds", "PATH"}


def test_a_plugin_is_imported_by_its_folders_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    package = tmp_path / "plugin" / "puzzle_test_plugin"
    with pytest.raises(PuzzleError, match=r"__init__\.py: missing"):
        import_plugin(package)
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("REGISTERED = True")
    import_plugin(package)
    modules = __import__("sys").modules
    assert modules["puzzle_test_plugin"].REGISTERED
    monkeypatch.delitem(modules, "puzzle_test_plugin")
