"""Compiles the native CPU kernels on the machine that runs them, once, and keeps the library in the user's cache.

The file's name holds a hash of the source, the compiler and the processor's features, so that a library is never used
on a machine, or with a source, that it was not made for. It is written under a temporary name and renamed. One that
another user could have put there is never loaded: a cache in a shared place, or of the user who called sudo.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from puzzle_trtllm.models.reference.kernels.cpu import cpu_flags

SOURCE = Path(__file__).with_name("native.cpp")
COMPILERS = ("g++", "c++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC", "-w")
TIMEOUT_SECONDS = 900.0
"""For a compiler that hangs. One that works takes 10 s of a core, and several times that where others want the cores
too."""
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class CompileError(Exception):
    """No library: the reason in one line."""


def load_library(flags: Sequence[str] = FLAGS, *, cache: Path | None = None) -> ctypes.CDLL:
    """The kernels, compiled if they have not been; where the cache is of no use, for this process alone.

    Raises CompileError.

    Import torch first: its OpenMP runtime is then the one that the library binds to, and both share their threads.
    """
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise CompileError(f"no C++ compiler (looked for {', '.join(COMPILERS)})")
    try:
        name = f"native-{_key(compiler, flags)}.so"
        with contextlib.suppress(OSError, RuntimeError):  # no home; a folder not to be written, or not to be run from
            return _load(compiler, flags, (cache or default_cache()) / name)
        with tempfile.TemporaryDirectory() as folder:  # a library that is loaded may go
            return _load(compiler, flags, Path(folder) / name)
    except (OSError, subprocess.SubprocessError) as error:
        raise CompileError(f"{type(error).__name__}: {error}") from None


def default_cache() -> Path:
    """Where the user's caches are, by the XDG base directory specification (it ignores relative paths)."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "puzzle-trtllm"


def _load(compiler: str, flags: Sequence[str], target: Path) -> ctypes.CDLL:
    folder = target.parent
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid == os.geteuid() and folder.stat().st_mode & _OTHERS_WRITE:
        folder.chmod(0o700)
    _require_own(folder)
    with contextlib.suppress(OSError):  # not there, or damaged
        return _open(target)
    with _one_at_a_time(folder):
        with contextlib.suppress(OSError):  # another process has made it meanwhile
            return _open(target)
        _compile(compiler, flags, target)
    return ctypes.CDLL(str(target))


def _open(target: Path) -> ctypes.CDLL:
    _require_own(target)
    return ctypes.CDLL(str(target))


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Of several processes that start at once, as ranks do, one compiles and the others wait for what it makes.

    On a disk without locks, and where somebody holds this one for longer than a compiler may take, all compile.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        with contextlib.suppress(OSError):
            while not _is_locked(descriptor) and time.monotonic() < deadline:
                time.sleep(0.1)
        yield
    finally:
        os.close(descriptor)


def _is_locked(descriptor: int) -> bool:
    """Whether the lock is ours now. Raises OSError where there are no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _require_own(path: Path) -> None:
    """Raises PermissionError for what another user has made, or may change: what lies there is run."""
    found = path.stat()
    if found.st_uid not in (0, os.geteuid()) or found.st_mode & _OTHERS_WRITE:
        raise PermissionError(errno.EPERM, "may be written by others", str(path))


def _key(compiler: str, flags: Sequence[str]) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=TIMEOUT_SECONDS).stdout
    parts = [SOURCE.read_bytes(), version, " ".join(flags).encode(), " ".join(sorted(cpu_flags())).encode()]
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]


def _compile(compiler: str, flags: Sequence[str], target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch, target.name)
        command = [compiler, *flags, "-o", str(made), str(SOURCE)]
        code, words = _run_to_end(command)
        if code != 0:
            lines = words.strip().splitlines() or [f"exit code {code}"]
            raise CompileError(f"{compiler}: {next((line for line in lines if 'error' in line), lines[0])}")
        made.chmod(0o700)  # whatever the umask
        with made.open("rb") as library:
            os.fsync(library.fileno())  # half a library after a power cut would be a bus error
        made.replace(target)


def _run_to_end(command: Sequence[str]) -> tuple[int, str]:
    """(exit code, stderr). Raises TimeoutExpired; then, as after Ctrl-C, nothing goes on that the compiler started."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as driver:
        try:
            _, words = driver.communicate(timeout=TIMEOUT_SECONDS)
        except BaseException:
            os.killpg(driver.pid, signal.SIGKILL)  # not yet waited for, so the group is there
            raise
    return driver.returncode, words
