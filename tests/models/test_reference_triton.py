"""The GPU kernels against their oracle, in a process that turns on Triton's interpreter before it imports Triton."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton comes with CUDA builds of torch, or by `pip install triton`")


def test_kernels_give_what_pytorch_gives():
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib"]
    run = subprocess.run(
        [*command, str(Path(__file__).with_name("triton_kernels.py"))],
        env={**os.environ, **interpreted},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout and "skipped" not in run.stdout
