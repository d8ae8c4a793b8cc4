"""The limit on oneDNN's compiled kernels: set by the commands for their own process, and never over the user's own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from puzzle_trtllm.calibration.kernel_cache import KEPT_KERNELS, VARIABLE

PROGRAM = """
import sys
from puzzle_trtllm.cli import main
from puzzle_trtllm.calibration import experts, kv

def tell(*arguments, **options):
    import os
    print("kernels", os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY"))
    sys.exit(0)

experts.calibrate_experts = kv.calibrate_kv = tell
sys.argv[1:] = ["calibrate", sys.argv[1], "folder", "out"]
main()
"""


@pytest.mark.parametrize(
    ("command", "given", "expected"),
    [
        ("experts", {}, str(KEPT_KERNELS)),
        ("kv", {VARIABLE: "7"}, "7"),
        pytest.param("kv", {}, str(KEPT_KERNELS), marks=pytest.mark.slow),
        pytest.param("experts", {VARIABLE: "7"}, "7", marks=pytest.mark.slow),
    ],
)
def test_the_commands_set_it_unless_the_user_did(command, given, expected):
    environment = {key: value for key, value in os.environ.items() if key != VARIABLE} | given
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, command], env=environment, capture_output=True, text=True, check=False
    )
    assert f"kernels {expected}" in run.stdout, run.stderr
