"""The real command line, in this process (fast) or in one of its own (what a user's shell sees)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from puzzle_trtllm.cli import app

ROOT = Path(__file__).parents[2]


def invoke(*arguments: str | Path) -> Result:
    """Run a command in this process; a bug's exception is in `result.exception`."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own."""
    command = [sys.executable, "-m", "puzzle_trtllm", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, cwd=ROOT, **options)


def last_json(stdout: str) -> dict[str, Any]:
    """The JSON object on the last line of stdout."""
    value = json.loads(stdout.splitlines()[-1])
    assert isinstance(value, dict)
    return value


def assert_user_error(result: Result | subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 2, nothing on stdout, no traceback; the last line of stderr is the error and names all of `words`."""
    code = result.exit_code if isinstance(result, Result) else result.returncode
    assert code == 2, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: "), result.stderr
    for word in words:
        assert word in line
