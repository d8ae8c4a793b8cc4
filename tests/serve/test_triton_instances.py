"""Several instances of one engine, each on GPUs of its own. No GPU is needed: what an engine may see is a variable."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from puzzle_trtllm.errors import ConfigError, EngineError
from puzzle_trtllm.process_states import children_of
from puzzle_trtllm.serve.client.request import GenerationRequest
from puzzle_trtllm.serve.client.triton_client import TritonLlmClient
from puzzle_trtllm.serve.triton.host import start_llm
from puzzle_trtllm.serve.triton.instances import Instance, hide_other_gpus, instance_of, parse_gpu_device_ids
from puzzle_trtllm.serve.triton.probe import values_of
from puzzle_trtllm.serve.triton.repository import write_repository
from puzzle_trtllm.serve.triton.server import TritonServer, watch
from puzzle_trtllm.serve.triton.settings import ModelSettings, TritonConfig
from tests.serve.scripted import SCRIPTED, metrics_of, scripted_engine, short_lived, wait_until

VISIBLE = ("CUDA_VISIBLE_DEVICES", "TRTLLM_VISIBLE_DEVICES")


@pytest.fixture
def engine(make_checkpoint, tmp_path: Path):
    return scripted_engine(tmp_path / "engine", make_checkpoint([(4, None), (2, 16)]))


# --- the text -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "instances"),
    [
        ("0,1;2,3", (("0", "1"), ("2", "3"))),
        (" 0 , 1 ; 2 , 3 ", (("0", "1"), ("2", "3"))),
        ("5", (("5",),)),
        ("GPU-0aa1-b2;MIG-77", (("GPU-0aa1-b2",), ("MIG-77",))),
    ],
)
def test_gpu_ids_by_instance(text: str, instances: tuple[tuple[str, ...], ...]) -> None:
    assert parse_gpu_device_ids(text) == instances


@pytest.mark.parametrize(
    ("text", "gpus_per_instance", "message"),
    [
        ("", None, "gpu_device_ids: not GPU ids"),
        ("0,1;", None, "not GPU ids"),
        ("0-3", None, "not GPU ids"),
        ('0";}', None, "not GPU ids"),
        ("0,1;1,2", None, "a GPU belongs to one instance .found 1 twice"),
        ("0,1;2", None, "wrong number of GPUs an instance .found 2, expected 2"),
        ("0;1", 2, "the engine's number .found 0, expected 2"),
    ],
)
def test_wrong_gpu_ids_are_one_clear_line(text: str, gpus_per_instance: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        parse_gpu_device_ids(text, gpus_per_instance=gpus_per_instance)
    assert "\n" not in str(error.value)


# --- the repository -----------------------------------------------------------------------------------------------


def test_the_config_counts_the_instances_and_names_their_gpus(make_checkpoint, tmp_path: Path) -> None:
    engine = scripted_engine(tmp_path / "tp2", make_checkpoint([(4, None), (2, 16)]), tensor_parallel_size=2)
    out = write_repository(engine, tmp_path / "repository", gpu_device_ids="0, 1; 2, 3")
    assert (out / "tensorrt_llm" / "config.pbtxt").read_text().splitlines()[:5] == [
        'name: "tensorrt_llm"',
        'backend: "python"',
        "instance_group [{ count: 2, kind: KIND_CPU }]",
        'parameters { key: "gpu_device_ids", value: { string_value: "0,1;2,3" } }',
        "",
    ]
    alone = yaml.safe_load((write_repository(engine, tmp_path / "one") / "tensorrt_llm/1/model.yaml").read_text())
    assert yaml.safe_load((out / "tensorrt_llm/1/model.yaml").read_text()) == alone


def test_gpus_that_do_not_fit_the_engine_are_refused_before_anything_is_written(engine, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the engine's number .found 0,1, expected 1"):
        write_repository(engine, tmp_path / "repository", gpu_device_ids="0,1;2,3")
    assert not (tmp_path / "repository").exists()


# --- one instance -------------------------------------------------------------------------------------------------


def triton_args(name: str, *, count: int, gpus: str | None) -> dict[str, str]:
    """What Triton gives to `initialize`."""
    parameters = {} if gpus is None else {"gpu_device_ids": {"string_value": gpus}}
    config = {"instance_group": [{"count": count, "kind": "KIND_CPU"}], "parameters": parameters}
    return {"model_instance_name": name, "model_config": json.dumps(config)}


def test_an_instance_learns_its_place_from_its_name() -> None:
    second = instance_of(triton_args("tensorrt_llm_0_1", count=2, gpus="0,1;2,3"))
    assert second == Instance(index=1, count=2, gpu_ids=("2", "3"))
    assert second.labels == {"instance": "1"}


def test_an_only_instance_sees_every_gpu_unless_told_otherwise() -> None:
    assert instance_of(triton_args("tensorrt_llm_0_0", count=1, gpus=None)) == Instance()
    assert instance_of(triton_args("tensorrt_llm_0", count=1, gpus="4")) == Instance(gpu_ids=("4",))
    assert Instance().labels == {}
    environment = {"CUDA_VISIBLE_DEVICES": "7"}
    hide_other_gpus(Instance(), environment)
    assert environment == {"CUDA_VISIBLE_DEVICES": "7"}


@pytest.mark.parametrize(
    ("name", "count", "gpus", "message"),
    [
        ("tensorrt_llm_0_0", 2, None, "gpu_device_ids: missing: instances would share their GPUs"),
        ("tensorrt_llm_0_0", 3, "0;1", "another number of instances"),
        ("tensorrt_llm_0_2", 2, "0;1", "no GPUs for this instance"),
    ],
)
def test_an_edited_config_that_does_not_fit(name: str, count: int, gpus: str | None, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        instance_of(triton_args(name, count=count, gpus=gpus))


def test_tensorrt_llm_is_imported_with_the_other_gpus_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gpu_runtime.py").write_text(
        "import os\nSEEN = {n: os.environ.get(n) for n in ('CUDA_VISIBLE_DEVICES', 'TRTLLM_VISIBLE_DEVICES')}\n"
        "class SamplingParams: ...\n"
        "class LLM:\n    def __init__(self, **arguments): self.arguments, self.seen = arguments, SEEN\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for variable in VISIBLE:
        monkeypatch.setenv(variable, "before")  # and so put back afterwards
    settings = ModelSettings(
        llm_args={"model": "m", "env_overrides": {"CUDA_VISIBLE_DEVICES": "0"}},
        triton=TritonConfig(runtime="tensorrt_llm", runtime_module="gpu_runtime"),
    )
    llm, _ = start_llm(settings, Instance(index=1, count=2, gpu_ids=("2", "3")))
    assert llm.seen == dict.fromkeys(VISIBLE, "2,3")
    assert llm.arguments["gpus_per_node"] == 2
    assert "gpus_per_node" not in settings.llm_args


def test_nothing_imports_torch_before_the_gpus_are_hidden() -> None:
    program = (
        "import sys, puzzle_trtllm.serve.triton.host, puzzle_trtllm.serve.triton.settings\n"
        "sys.exit(bool({'torch', 'tensorrt_llm', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# --- the real server ----------------------------------------------------------------------------------------------


def environment_of(pid: int) -> dict[str, str]:
    """With which a process was started."""
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


async def ask_many(url: str, num_requests: int, *, instances: int) -> set[str]:
    async with TritonLlmClient(url) as client:
        assert client.num_instances == instances
        request = GenerationRequest(prompt="hello", max_tokens=20)
        results = await asyncio.gather(*(client.generate(request) for _ in range(num_requests)))
        return {result.text for result in results}


def test_two_instances_serve_side_by_side_and_the_watch_notices_the_death_of_either(engine) -> None:
    with short_lived(TritonServer(engine, gpu_device_ids="6;4", **SCRIPTED)) as server:
        engines = {
            environment_of(child)["CUDA_VISIBLE_DEVICES"]: child
            for stub in server.stub_pids()
            for child in children_of(stub)
        }
        assert set(engines) == {"6", "4"}
        assert asyncio.run(ask_many(server.grpc_url, 24, instances=2)) == {"hello" * 4}
        wait_until(lambda: sum(values_of(metrics_of(server), "puzzle_requests_total")) == 24, what="24")
        up = {'puzzle_engine_up{instance="0"}', 'puzzle_engine_up{instance="1"}'}
        wait_until(lambda: up <= metrics_of(server).keys(), what="metrics of both")  # one may have got all requests
        assert {key for key in metrics_of(server) if key.startswith("puzzle_engine_up")} == up
        os.kill(engines["4"], signal.SIGKILL)
        assert watch(server) == "the engine died"
