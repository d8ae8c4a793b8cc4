"""Engines of the scripted runtime, and small helpers of the tests that drive a live tritonserver."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from puzzle_trtllm.architecture import PuzzleArchitecture
from puzzle_trtllm.engine import Engine
from puzzle_trtllm.errors import ServeError
from puzzle_trtllm.serve.client.request import GenerationRequest
from puzzle_trtllm.serve.client.triton_client import TritonLlmClient, generate
from puzzle_trtllm.serve.triton.probe import read_metrics
from puzzle_trtllm.serve.triton.server import TritonServer
from puzzle_trtllm.tensors import count_weight_bytes

SCRIPTED = {"runtime_module": "scripted_runtime", "environment": {"PYTHONPATH": str(Path(__file__).parent)}}
"""Options of TritonServer that make it use the scripted runtime."""

HANG_S = 120.0
"""Seconds that only a hang takes, on a machine however slow; less than pytest gives a test."""


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


@contextmanager
def short_lived(server: TritonServer) -> Iterator[TritonServer]:
    """Started, and killed at the end. Triton takes three seconds to stop in order, which is tested where a stop is
    what is tested (test_triton_lifecycle.py)."""
    server.start()
    try:
        yield server
    finally:
        server.stop(grace_s=0)


def wait_until(holds: Callable[[], bool], *, what: str, timeout_s: float = HANG_S) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)


def metrics_of(server: TritonServer) -> dict[str, float]:
    """As `read_metrics`; a server that is too busy to answer in its time is asked again."""
    deadline_s = time.monotonic() + HANG_S
    while (metrics := read_metrics(server.metrics_url)) is None:
        assert time.monotonic() < deadline_s, f"no metrics at {server.metrics_url}"
        time.sleep(0.02)
    return metrics


def metric(server: TritonServer, name: str) -> float | None:
    """None before the model has set it for the first time."""
    return metrics_of(server).get(name)


def num_open(server: TritonServer) -> float:
    """Requests that the model has not answered, by its own count."""
    metrics = metrics_of(server)
    return metrics.get("puzzle_requests_waiting", 0) + metrics.get("puzzle_requests_running", 0)


def settle(server: TritonServer, lasting: GenerationRequest) -> None:
    """Return when the server's metrics count every request that was answered before; `lasting` must outlast a look.

    The model sets them in rounds, one a second. A refusal is sent behind all earlier answers, so these are counted by a
    round that begins after it: as does the one that sees `lasting`, which is over when the next sees it gone.
    """
    with pytest.raises(ServeError, match="max_tokens"):
        generate("x", url=server.grpc_url, max_tokens=0)
    wait_until(lambda: num_open(server) == 0, what="no open request")

    async def hold() -> None:
        async with TritonLlmClient(server.grpc_url) as client:
            task = asyncio.create_task(client.generate(lasting))
            await asyncio.to_thread(wait_until, lambda: num_open(server) == 1, what="a round that sees the request")
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(hold())
    wait_until(lambda: num_open(server) == 0, what="a round that sees it gone")
