"""Set up `.venv` beside this file: check the machine, then install the exact versions of the lock in one pip run.

    python3.11 bootstrap.py            set up; does nothing when .venv is up to date
    python3.11 bootstrap.py --check    only check the machine

Nothing is downloaded before every check has passed (requirements/machine.py), and each failed check names the package
or command that mends it. The set-up may be interrupted at any time: the record that says "complete" is written last,
and the next run goes on from what is there.

torch: one that the interpreter already has is used if it fits (the range in pyproject.toml); else the CPU build, where
the package index offers one; else the index's default build, which may bring several GB of GPU libraries. The
environment variable TORCH_INDEX_URL names one more index to look for torch on.

Standard library only, and in Python 3.8's syntax, so that an old Python is told what it lacks instead of failing at
the first line it cannot read.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from requirements.machine import LOCKED_PYTHON, all_checks, check_disk

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from requirements.machine import Check

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
RECORD = VENV / "puzzle-trtllm-setup.json"
LOG = VENV / "setup.log"
LOCK = ROOT / "requirements" / "cpu-py311.txt"
NUMPY1 = ROOT / "requirements" / "numpy1.txt"
PYPROJECT = ROOT / "pyproject.toml"
EXTRAS = "reference,calibrate,serve,triton-wheel,dev"
GPU_TORCH_BYTES = 9 * 10**9
"""torch with its GPU libraries."""


class SetupError(Exception):
    """The set-up cannot go on; the message is for the user."""


def say(line: str) -> None:
    """Progress, on stderr."""
    print(line, file=sys.stderr, flush=True)


def report(checks: Sequence[Check]) -> bool:
    """Print one line a check; True if all passed."""
    for check in checks:
        say(f"  ok    {check.found}" if check.passed else f"  FAIL  {check.found}: {check.mend}")
    return all(check.passed for check in checks)


# -- torch -----------------------------------------------------------------------------------------------------------


def in_range(version: str, specifiers: str) -> bool:
    """Whether a version such as "2.11.0+cu130" fits specifiers such as ">=2.9,<3" (>=, <, == and != are known)."""
    for operator, bound_text in re.findall(r"(>=|<|==|!=)\s*([\d.]+)", specifiers):
        ours, bound = _numbers(version), _numbers(bound_text)
        if not {">=": ours >= bound, "<": ours < bound, "==": ours == bound, "!=": ours != bound}[operator]:
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    """The first three numbers of a version, its local part (+cpu) left out."""
    public = re.sub(r"\+.*", "", version)
    return tuple([*(int(number) for number in re.findall(r"\d+", public)), 0, 0, 0][:3])


def torch_range(pyproject: str) -> str:
    """The specifiers of torch in the text of pyproject.toml."""
    match = re.search(r'"torch([^"\w-][^"]*)"', pyproject)
    return match[1] if match else ""


def existing_torch(python: str) -> str | None:
    """The version of a torch that `python` can already import and that fits, else None."""
    probe = "import importlib.util as u\nif u.find_spec('torch'):\n import torch\n print(torch.__version__)"
    lines = _output([python, "-c", probe]).split()
    if lines and in_range(lines[-1], torch_range(PYPROJECT.read_text(encoding="utf-8"))):
        return lines[-1]
    return None


def locked_torch(lock: str) -> str:
    """The version of torch in the text of the lock."""
    match = re.search(r"^torch==(\S+)$", lock, re.MULTILINE)
    if match is None:
        raise SetupError(f"{LOCK}: no line torch==...")
    return match[1]


def offers_cpu_build(version: str) -> bool:
    """Whether pip's indexes list the CPU build of this torch for this Python; reads index pages only."""
    versions = _output([venv_python(), "-m", "pip", "index", "versions", "torch", *torch_index()])
    return re.search(rf"\b{re.escape(version)}\+cpu\b", versions) is not None


def torch_index() -> list[str]:
    """pip's options for TORCH_INDEX_URL."""
    url = os.environ.get("TORCH_INDEX_URL")
    return ["--extra-index-url", url] if url else []


# -- .venv -----------------------------------------------------------------------------------------------------------


def base_python() -> str:
    """The interpreter that environments are made from, also when this runs inside one of them."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def venv_python() -> str:
    """The interpreter of .venv."""
    return str(VENV / "bin" / "python")


def wanted() -> dict[str, str]:
    """What a complete .venv was made from; any difference makes it out of date."""
    digest = hashlib.sha256()
    for file in (LOCK, NUMPY1, PYPROJECT):
        digest.update(file.read_bytes() + b"\0")
    return {"requirements": digest.hexdigest(), "root": str(ROOT), "python": base_python(), "version": sys.version}


def recorded() -> dict[str, Any]:
    """The record in .venv: `wanted()` and a `state`, "complete" or "installing"; empty if there is none."""
    try:
        record = json.loads(RECORD.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def write_record(state: str) -> None:
    """Write the record through a rename, so that it is whole or not there."""
    partial = RECORD.with_suffix(".partial")
    partial.write_text(json.dumps({"state": state, **wanted()}, indent=2) + "\n", encoding="utf-8")
    partial.rename(RECORD)


def is_current() -> bool:
    """Whether .venv is complete and made from what is wanted now."""
    return recorded() == {"state": "complete", **wanted()} and (VENV / "bin" / "puzzle-trtllm").exists()


def is_usable(*, shared: bool) -> bool:
    """Whether pip can go on with .venv: same interpreter, same folder, same view of the base's packages."""
    try:
        settings = (VENV / "pyvenv.cfg").read_text(encoding="utf-8")
    except OSError:
        return False
    want, record = wanted(), recorded()
    same = all(record.get(key, want[key]) == want[key] for key in ("root", "python", "version"))
    probe = _output([venv_python(), "-c", "import sys, pip; print(sys.base_prefix, sys.version)"])
    return (
        same
        and f"include-system-site-packages = {str(shared).lower()}" in settings
        and probe.strip() == f"{sys.base_prefix} {sys.version}"
    )


def make_venv(*, shared: bool) -> None:
    """Make .venv, or keep one that is usable; `shared` lets it see the packages of the base interpreter.

    In a shared one the packages of .venv come first on the path, so the lock wins wherever versions differ.
    """
    if is_usable(shared=shared):
        say("  ok    going on with the .venv that is there")
        forget_half_installed()
    else:
        shutil.rmtree(str(VENV), ignore_errors=True)
        run("environment", [base_python(), "-m", "venv", *(["--system-site-packages"] if shared else []), str(VENV)])
    write_record("installing")


def forget_half_installed() -> None:
    """Make pip install again what it was interrupted at: it unpacks a wheel's metadata early and INSTALLER last."""
    for metadata in VENV.glob("lib/python*/site-packages/*.dist-info"):
        if not (metadata / "INSTALLER").exists():
            shutil.rmtree(str(metadata))


# -- installing ------------------------------------------------------------------------------------------------------


def pip_environment() -> Mapping[str, str]:
    """The user's pip settings, less those that would install elsewhere than in .venv."""
    elsewhere = ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_PYTHON")
    kept = {key: value for key, value in os.environ.items() if key not in elsewhere}
    return {**kept, "PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}


def pip_arguments(shared_torch: str | None) -> list[str]:
    """What one pip run installs: torch first, then the lock, or on another Python the ranges of pyproject.toml."""
    lock = LOCK.read_text(encoding="utf-8")
    pin = shared_torch or locked_torch(lock)
    if shared_torch is None and offers_cpu_build(pin):
        pin += "+cpu"
    elif shared_torch is None:
        say(f"  note  no index offers a CPU build of torch {pin}; the default build may bring GBs of GPU libraries")
        say("        (TORCH_INDEX_URL names one more index to look on)")
        room = check_disk(ROOT, GPU_TORCH_BYTES, "free some space, or name an index with CPU builds")
        if not room.passed:
            raise SetupError(f"{room.found}: {room.mend}")
    options = torch_index()
    if sys.version_info[:2] == LOCKED_PYTHON:
        others = [line for line in lock.splitlines() if not line.startswith("torch==")]
        if shared_torch is not None:
            options.append("--no-deps")  # the lock is complete, and what the shared torch wants beside it is there
    else:
        others = [f"puzzle-trtllm[{EXTRAS}] @ {ROOT.as_uri()}", f"-c {shlex.quote(str(NUMPY1))}"]
    file = VENV / "requirements.txt"
    file.write_text("\n".join([f"torch=={pin}", *others]) + "\n", encoding="utf-8")
    return [*options, "-r", str(file)]


def run(title: str, command: list[str]) -> None:
    """Run a step with its output in a log, and say now and then how far it is. Raises SetupError if it fails."""
    started, interactive = time.monotonic(), sys.stderr.isatty()
    VENV.mkdir(exist_ok=True)
    with LOG.open("w+b") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=pip_environment())
        try:
            while process.poll() is None:
                try:
                    process.wait(timeout=1 if interactive else 15)
                except subprocess.TimeoutExpired:
                    line = f"  ...   {title}: {progress(LOG)}, {time.monotonic() - started:.0f} s"
                    print(f"\r{line:79}" if interactive else line, end="" if interactive else "\n", file=sys.stderr)
        finally:
            process.terminate()
            process.wait()
            print(f"\r{'':79}\r" if interactive else "", end="", file=sys.stderr)
    if process.returncode:
        output = LOG.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line.strip() for line in output if re.match(r"\s*(ERROR|\w*Error|error):", line)] or output
        raise SetupError("\n".join([f"{title} failed (the whole log: {LOG})", *errors[-5:]]))
    say(f"  ok    {title} ({time.monotonic() - started:.0f} s)")


def progress(log: Path) -> str:
    """How far pip is, from what it has logged."""
    output = log.read_text(encoding="utf-8", errors="replace")
    if "Installing collected packages" in output:
        return "unpacking"
    count = len(re.findall("^(?:Collecting|Requirement already)", output, re.MULTILINE))
    return f"{count} packages looked up" if count else "working"


def set_up(shared_torch: str | None) -> None:
    """Make .venv complete."""
    make_venv(shared=shared_torch is not None)
    pip = [venv_python(), "-m", "pip", "install", "--progress-bar", "off"]
    run("packages", [*pip, *pip_arguments(shared_torch)])
    run("puzzle-trtllm itself", [*pip, "--no-deps", "--no-build-isolation", "-e", str(ROOT)])
    write_record("complete")


def set_up_with_the_best_torch() -> None:
    """Try the torch of the base interpreter first; where its own requirements fight the lock, install another.

    A .venv that has begun to get its own goes on with that.
    """
    has_begun_its_own = bool(recorded()) and is_usable(shared=False)
    shared_torch = None if has_begun_its_own else existing_torch(base_python())
    if shared_torch is not None:
        say(f"  ok    using the torch {shared_torch} of {base_python()}")
        try:
            return set_up(shared_torch)
        except SetupError as error:
            if not tells_of_conflict(str(error)):
                raise  # an outage or a full disk: the next run goes on from here
            say(f"  note  that torch does not go with the lock, so .venv gets its own: {error}")
    return set_up(None)


def tells_of_conflict(error: str) -> bool:
    """Whether pip could not bring the torch together with the rest, or found torch on its index, but not this one."""
    conflict = r"ResolutionImpossible|conflicting dependencies|incompatible"
    another_torch = r"requirement torch==\S+ .*\(from versions: (?!none)"
    return re.search(f"{conflict}|{another_torch}", error) is not None


def wait_for_other_set_ups(this_file: IO[bytes]) -> bool:
    """Hold the lock on this file until it is closed; False where the disk has no locks."""
    try:
        fcntl.flock(this_file, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def open_for_lock(file: Path) -> IO[bytes]:
    """Open for writing, which NFS wants of an exclusive lock, or for reading where the file is read-only."""
    try:
        return file.open("r+b")
    except OSError:
        return file.open("rb")


def _output(command: list[str]) -> str:
    """What a command prints, empty if it fails or does not exist."""
    try:
        return subprocess.run(
            command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=pip_environment()
        ).stdout.decode()
    except (OSError, subprocess.CalledProcessError):
        return ""


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 the installation failed, 2 a check failed, 130 interrupted."""
    parser = argparse.ArgumentParser(description="Check this machine and set up .venv for puzzle-trtllm.")
    parser.add_argument("--check", action="store_true", help="only check the machine")
    only_check = parser.parse_args(arguments).check
    started = time.monotonic()
    with open_for_lock(Path(__file__)) as this_file:
        if not only_check:
            locked = wait_for_other_set_ups(this_file)
            if is_current():
                return 0
            if not locked:
                say("  note  this disk has no locks: start no second set-up here before this one has ended")
        say("Checking this machine")
        if not report(all_checks(ROOT, resuming=VENV.exists())):
            return 2
        if only_check:
            return 0
        say(f"Setting up {VENV} (once; a few minutes)")
        try:
            set_up_with_the_best_torch()
        except SetupError as error:
            say(f"set-up failed: {error}")
            return 1
        except KeyboardInterrupt:
            say("\ninterrupted; the next run goes on from here")
            return 130
    say(f"Set up in {time.monotonic() - started:.0f} s; `. {VENV}/bin/activate` puts puzzle-trtllm on the PATH")
    return 0


if __name__ == "__main__":
    sys.exit(main())
