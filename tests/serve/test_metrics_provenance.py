"""Provenance against what the machine and git say themselves."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy
import psutil
import pytest

import puzzle_trtllm
from puzzle_trtllm.errors import EngineError
from puzzle_trtllm.serve.metrics.provenance import Hardware, Provenance
from tests.serve.scripted import scripted_engine

REPOSITORY = Path(puzzle_trtllm.__file__).resolve().parents[1]


def test_the_machine():
    hardware = Hardware.of_this_machine()
    assert hardware.memory_bytes == psutil.virtual_memory().total
    assert hardware.cpu_cores == len(os.sched_getaffinity(0))
    assert f"{hardware.cpu_cores} cores" in str(hardware)


def test_the_gpus_and_their_driver_are_what_nvidia_smi_says(tmp_path, monkeypatch):
    answers = "case $1 in --query-gpu=name) set NVIDIA;; --query-gpu=driver_version) set 580.65.06;; esac"
    (tmp_path / "nvidia-smi").write_text(f'#!/bin/sh\n{answers}\necho "$1"; echo "$1"\n')
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    hardware = Hardware.of_this_machine()
    assert (hardware.gpus, hardware.gpu_driver) == (["NVIDIA", "NVIDIA"], "580.65.06")
    monkeypatch.setenv("PATH", "/nowhere")
    hardware = Hardware.of_this_machine()
    assert (hardware.gpus, hardware.gpu_driver) == ([], None)


def test_the_processor_is_what_linux_calls_it():
    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    assert Hardware.of_this_machine().cpu_model == (names[0].strip() if names else None)


def test_a_machine_in_words():
    cards = Hardware(cpu_model="EPYC", cpu_cores=2, memory_bytes=24 * 2**30, gpus=["H100", "H200"])
    assert str(cards) == "EPYC, 2 cores, 24 GiB, H100, H200"
    assert str(Hardware(cpu_model=None, cpu_cores=1, memory_bytes=None, gpus=[])) == "unknown CPU, 1 cores"


def test_an_installed_package_has_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(puzzle_trtllm, "__file__", str(tmp_path / "site-packages" / "puzzle_trtllm" / "__init__.py"))
    assert Provenance.collect().git_commit is None


@pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="not a git checkout")
def test_the_commit():
    command = ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert Provenance.collect().git_commit in (head, f"{head}-dirty")


def test_versions_and_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/puzzle-trtllm", "bench", "--name", "two words"])
    found = Provenance.collect()
    assert found.command_line == "puzzle-trtllm bench --name 'two words'"
    assert found.versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found.versions["puzzle-trtllm"] == puzzle_trtllm.__version__
    assert found.versions["numpy"] == numpy.__version__
    assert found.engine is None


def test_the_engine_brings_its_manifest_and_its_arguments(make_checkpoint, tmp_path):
    engine = scripted_engine(tmp_path / "engine", make_checkpoint([(4, None)]), tensor_parallel_size=8)
    found = Provenance.collect(engine=engine.path).engine
    assert (found.path, found.manifest) == (str(engine.path), engine.manifest)
    assert found.llm_args == {"tensor_parallel_size": 8}
    assert found.num_gpus == 0  # the reference runtime's tensor_parallel_size are processes, not GPUs
    with pytest.raises(EngineError, match="missing"):
        Provenance.collect(engine=tmp_path)


def test_an_engine_of_tensorrt_llm_has_as_many_gpus_as_ranks(make_checkpoint, tmp_path):
    """Throughput a GPU is divided by them."""
    for ranks, llm_args in ((1, {}), (8, {"tensor_parallel_size": 8})):
        engine = scripted_engine(tmp_path / f"engine{ranks}", make_checkpoint([(4, None)]), **llm_args)
        manifest = engine.path / "engine.json"
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"runtime": "tensorrt_llm"}))
        assert Provenance.collect(engine=engine.path).engine.num_gpus == ranks
