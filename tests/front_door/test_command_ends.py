"""How a command ends: its exit code, its last words, and what is left when it is interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from puzzle_trtllm.commands import front
from puzzle_trtllm.errors import PuzzleError
from tests.front_door.cli import ROOT, invoke, run


def test_debug_shows_the_traceback_wherever_it_stands(tmp_path: Path) -> None:
    for arguments in (("--debug", "inspect", tmp_path), ("inspect", tmp_path, "--debug")):
        result = invoke(*arguments)
        assert result.exit_code == 2
        assert "Traceback" in result.stderr
        assert result.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (PuzzleError("two\n  lines", file="a"), 2, "error: a: two lines"),
        (ModuleNotFoundError("no", name="modelopt.torch"), 2, "pip install 'puzzle-trtllm[calibrate]'"),
        (ModuleNotFoundError("no", name="tritonclient"), 2, "pip install 'puzzle-trtllm[serve]'"),
        (OSError(28, "No space left on device", "out.bin"), 2, "error: out.bin: No space left on device"),
        (OSError(36, "File name too long", "x" * 300), 2, "x: File name too long"),
        (OSError(5, "Input/output error", "model.safetensors"), 2, "error: model.safetensors: Input/output error"),
        (FileNotFoundError(2, "No usable temporary directory found"), 2, "error: No usable temporary directory found"),
        (FileNotFoundError(2, "No such file or directory", "a file of ours"), 1, ""),
        (PuzzleError("no", found="x" * 5000), 2, "error: no (found " + "x" * 200 + "... (5000 characters))"),
        (PuzzleError("\x1b]0;title\x07", file="a\x9b2J"), 2, "error: a\\x9b2J: \\x1b]0;title\\x07"),
        (KeyboardInterrupt(), 130, ""),
        (ModuleNotFoundError("no", name="puzzle_trtllm.gone"), 1, ""),
        (ValueError("a bug"), 1, ""),
    ],
)
def test_how_errors_end(error: BaseException, code: int, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("puzzle_trtllm.inspection.inspect", fail)
    result = invoke("inspect", "model")
    assert result.exit_code == code
    assert line in (result.stderr.splitlines() or [""])[-1]
    if code == 1:
        assert result.exception is error  # its traceback is what a bug report needs


@pytest.mark.parametrize(
    ("package", "advice"),
    [
        ("tritonclient", "install it as docs/deploy.md says"),
        ("datasets", "install it in an environment without TensorRT-LLM"),
        ("transformers", "pip install 'puzzle-trtllm[reference]'"),
    ],
)
def test_beside_tensorrt_llm_no_extra_is_advised_that_replaces_its_packages(
    package: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt_llm.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    line = front.explain(ModuleNotFoundError("no", name=package)) or ""
    assert line.startswith(f"the package {package} is not installed: {advice}")
    assert ("puzzle-trtllm[" in line) is (package == "transformers")


def test_every_extra_that_is_named_exists() -> None:
    extras = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[project.optional-dependencies]")[1]
    for extra in set(front.EXTRA_OF_PACKAGE.values()):
        assert f"\n{extra} = [" in extras


def test_a_bug_leaves_its_traceback_and_exit_code_1() -> None:
    program = (
        "import sys, puzzle_trtllm.inspection\n"
        "puzzle_trtllm.inspection.inspect = lambda *a, **k: 1 / 0\n"
        "sys.argv = ['puzzle-trtllm', 'inspect', 'model']\n"
        "from puzzle_trtllm.cli import main\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ZeroDivisionError: division by zero"


def test_a_table_that_stdout_cannot_spell_is_shown_with_question_marks(make_checkpoint: Callable[..., Path]) -> None:
    done = run("inspect", make_checkpoint([(8, 16), (8, None)]), env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert "????" in done.stdout


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no PYTHONSAFEPATH")
def test_processes_that_a_command_starts_import_nothing_from_the_users_folder(tmp_path: Path) -> None:
    (tmp_path / "signal.py").write_text("raise ImportError('the wrong one')", encoding="utf-8")
    program = (
        f"import sys; sys.path[0] = {str(ROOT)!r}\n"
        "import subprocess\n"
        "from puzzle_trtllm import cli\n"
        "cli.app = lambda: subprocess.run([sys.executable, '-c', 'import signal'], check=True)\n"
        "cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_interrupting_ends_quietly_with_130() -> None:
    program = (
        "import os, signal, sys, time, puzzle_trtllm.inspection\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job inherits it as ignored
        "def wait(*a, **k):\n    print('ready', flush=True)\n    time.sleep(60)\n"
        "puzzle_trtllm.inspection.inspect = wait\n"
        "sys.argv = ['puzzle-trtllm', 'inspect', 'model']\n"
        "from puzzle_trtllm.cli import main\nmain()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout, stderr) == (130, "", "")


def test_interrupting_while_it_still_imports_ends_quietly_with_130() -> None:
    """As a person does who sees at once that the line was wrong."""
    program = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from puzzle_trtllm.__main__ import main\n"
        "class Interrupt:\n    def find_spec(name, *_):\n"
        "        if name == 'typer':\n            signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt)\n"
        "sys.argv = ['puzzle-trtllm', '--version']\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
