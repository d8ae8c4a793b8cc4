"""Engines of the scripted runtime, and small helpers of the tests that drive a live tritonserver."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from puzzle_trtllm.architecture import PuzzleArchitecture
from puzzle_trtllm.engine import Engine
from puzzle_trtllm.serve.triton.probe import read_metrics
from puzzle_trtllm.serve.triton.server import TritonServer
from puzzle_trtllm.tensors import count_weight_bytes

SCRIPTED = {"runtime_module": "scripted_runtime", "environment": {"PYTHONPATH": str(Path(__file__).parent)}}
"""Options of TritonServer that make it use the scripted runtime."""


def scripted_engine(folder: Path, checkpoint: Path, **llm_args: Any) -> Engine:
    """An engine folder that is real but for its runtime's arguments."""
    folder.mkdir(parents=True)
    shutil.copytree(checkpoint, folder / "model")
    kv_cache = llm_args.get("kv_cache_config", {})
    manifest = {
        "schema_version": 1,
        "runtime": "reference",
        "kv_dtype": "fp8" if kv_cache.get("dtype") == "fp8" else "bf16",
        "weight_bytes": count_weight_bytes(PuzzleArchitecture.from_path(checkpoint)),
        "memory_bytes": None,
        "architecture": {},
        "kv_fold": {"mode": "none"},
        "provenance": {},
    }
    (folder / "engine.json").write_text(json.dumps(manifest))
    (folder / "llm_args.yaml").write_text(yaml.safe_dump(llm_args))
    return Engine.open(folder)


def wait_until(holds: Callable[[], bool], *, what: str, timeout_s: float = 20) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)


def metric(server: TritonServer, name: str) -> float | None:
    metrics = read_metrics(server.metrics_url)
    assert metrics is not None
    return metrics.get(name)
