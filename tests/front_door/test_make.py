"""make and CI: what they run, without running it."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.front_door.cli import ROOT

OF_MAKE = ("GNUMAKEFLAGS", "MAKEFLAGS", "MFLAGS", "MAKELEVEL", "PYTHON", "WORKERS", "ENGINE", "URL", "SCENARIO")
ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in OF_MAKE}
"""These tests may themselves run under make, which would add lines of its own to the output, and hand on variables."""


def make(*arguments: str) -> list[str]:
    done = subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, env=ENVIRONMENT)
    return done.stdout.splitlines()


def dry_run(*arguments: str) -> list[str]:
    """The commands that make would run."""
    return make("-n", *arguments)


def test_ci_runs_make_test_and_nothing_else() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = script.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert [line for line in lines if line and not line.startswith("#")] == [
        "set -euo pipefail",
        'cd "$(dirname "${BASH_SOURCE[0]}")/.."',
        "exec make test",
    ]


def test_make_test_sets_up_lints_types_and_ends_with_pytest() -> None:
    commands = dry_run("test")
    assert commands[0].endswith("bootstrap.py")
    assert any("ruff check" in command for command in commands)
    assert any("ruff format --check" in command for command in commands)
    assert any("mypy -p puzzle_trtllm" in command for command in commands)
    assert commands[-1] == ".venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder"


def test_make_bench_says_what_it_needs() -> None:
    command = ["make", "-n", "bench"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 2
    assert "which engine? make bench ENGINE=folder" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "last"),
    [
        (["demo"], ".venv/bin/puzzle-trtllm demo --out runs/demo"),
        (["test-all"], '.venv/bin/python -m pytest -m "not gpu"'),
        (["bench", "ENGINE=e", "URL=h:1"], ".venv/bin/puzzle-trtllm bench --engine e --url h:1 --scenario cpu-demo"),
        (["test", "WORKERS=0"], ".venv/bin/python -m pytest -n 0 --dist loadfile --no-loadscope-reorder"),
        (["setup", "PYTHON=/opt/python"], "/opt/python bootstrap.py"),
    ],
)
def test_targets(arguments: list[str], last: str) -> None:
    assert dry_run(*arguments)[-1] == last


def test_help_is_the_default_and_lists_every_target() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    (phony,) = [line for line in text.splitlines() if line.startswith(".PHONY:")]
    listed = [line.split()[1] for line in make()]
    assert listed == phony.split()[1:]
