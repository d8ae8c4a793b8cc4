"""Provenance against what the machine and git say themselves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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
    assert found.engine is None


def test_the_engine_brings_its_manifest_and_its_arguments(make_checkpoint, tmp_path):
    engine = scripted_engine(tmp_path / "engine", make_checkpoint([(4, None)]), tensor_parallel_size=8)
    found = Provenance.collect(engine=engine.path).engine
    assert (found.path, found.manifest) == (str(engine.path), engine.manifest)
    assert found.llm_args == {"tensor_parallel_size": 8}
    assert found.num_gpus == 0  # the reference runtime's tensor_parallel_size are processes, not GPUs
    with pytest.raises(EngineError, match="missing"):
        Provenance.collect(engine=tmp_path)
