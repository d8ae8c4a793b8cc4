"""A server process under its guard (guard.py): start it, look after it, end it with everything it started."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from puzzle_trtllm.errors import ServeError
from puzzle_trtllm.serve.triton import guard

_PARENT_POLL_S = 0.25
_KILL_DEMANDS, _KILL_PAUSE_S = 10, 0.5
"""Until the guard itself is killed."""


class GuardedProcess:
    """`command` in a session of its own, so that Ctrl-C in a terminal reaches only us.

    It works in `scratch`: Triton's stub looks for Python modules in its working folder first, and the user's may hold
    any.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        log_file: Path,
        grace_s: float,
        shm_prefix: str,
        scratch: Path,
    ) -> None:
        """Start it. `environment` is added to ours; `scratch`, an absolute path, is removed when all has ended."""
        self._grace_s = grace_s
        self._files = shm_prefix, scratch
        # `env` sets the variables for the command alone: the guard must not load the server's libraries.
        settings = [f"{name}={value}" for name, value in environment.items()]
        guard_command = [sys.executable, "-I", "-S", guard.__file__, str(grace_s), shm_prefix, str(scratch)]
        os.close(os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))  # errors in it may quote prompts
        # For appending: the guard cuts a long log, and the server goes on behind what is left.
        with log_file.open("ab") as log:
            self._guard = subprocess.Popen(
                [*guard_command, "/usr/bin/env", *settings, *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=scratch,
                start_new_session=True,
            )
        assert self._guard.stdout is not None
        line = self._guard.stdout.readline().strip()
        if not line:
            raise ServeError(f"{command[0]} could not be started", file=log_file)
        self.pid = int(line)
        """The command's pid (`env` replaces itself with it)."""

    def hide(self, words: Sequence[str]) -> None:
        """Write over secret arguments, which all users of the machine can list; the command must have read them."""
        for pid in (self._guard.pid, self.pid):
            with contextlib.suppress(OSError):  # gone, or under a kernel that lets nobody
                _overwrite_arguments(pid, words)

    def exit_code(self) -> int | None:
        """None while it runs; 128 + signal if it was killed."""
        return self._guard.poll()

    def stop(self, *, grace_s: float | None = None) -> int:
        """SIGTERM, after the grace time SIGKILL, for it and its descendants; returns the exit code."""
        assert self._guard.stdin is not None and self._guard.stdout is not None
        self._guard.stdin.close()
        try:
            self._guard.wait(timeout=self._grace_s if grace_s is None else grace_s)
        except subprocess.TimeoutExpired:
            self._kill()
        self._guard.stdout.close()
        if self._guard.returncode < 0:  # it was killed before it could
            guard.remove_files(*self._files)
        return self._guard.returncode

    def _kill(self) -> None:
        """Asked twice, the guard kills; one that was busy may take for one demand what came while it did not look."""
        for _ in range(_KILL_DEMANDS):
            self._guard.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._guard.wait(timeout=_KILL_PAUSE_S)
                return
        self._guard.kill()  # the kernel kills the server with it
        self._guard.wait()

    def wait(self, timeout_s: float) -> int | None:
        """Wait for its own end."""
        deadline_s = time.monotonic() + timeout_s
        while self.exit_code() is None and time.monotonic() < deadline_s:
            time.sleep(0.05)
        return self.exit_code()


def _overwrite_arguments(pid: int, words: Sequence[str]) -> None:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])  # arg_start and arg_end of proc(5)
    with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
        arguments = os.pread(memory.fileno(), end - start, start)
        for word in words:
            arguments = arguments.replace(word.encode(), b"*" * len(word))
        os.pwrite(memory.fileno(), arguments, start)


def when_orphaned(then: Callable[[], None]) -> None:
    """Call it, in a thread of its own, when this process's parent ends."""
    threading.Thread(target=_wait_for_end, args=(os.getppid(), then), name="puzzle-parent", daemon=True).start()


def _wait_for_end(parent: int, then: Callable[[], None]) -> None:
    while os.getppid() == parent:
        time.sleep(_PARENT_POLL_S)
    then()
