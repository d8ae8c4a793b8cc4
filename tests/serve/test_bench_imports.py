"""Measuring must stay light: what a client machine imports, it has to install and wait for."""

from __future__ import annotations

import json
import subprocess
import sys

HEAVY = ("torch", "transformers", "matplotlib", "tritonclient", "grpc")
MODULES = (
    "puzzle_trtllm.serve.metrics.provenance",
    "puzzle_trtllm.serve.bench.runner",
    "puzzle_trtllm.serve.bench.interleaved",
    "puzzle_trtllm.serve.evaluate.runner",
    "puzzle_trtllm.serve.report",
)


def test_no_heavy_package_is_imported():
    code = (
        f"import importlib, json, sys; [importlib.import_module(m) for m in {MODULES!r}]; "
        f"print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
