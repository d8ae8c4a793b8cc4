"""The processes of one engine as its front sees them: started, watched, and gone when it goes.

A link (a socket pair) to each says that the other end lives: it closes when a process dies, however it dies. So no rank
outlives the front, and the front notices at once when one is gone, while the others may be waiting for it inside a
collective. A follower that is there but hangs is found by asking: a thread of its own answers while it computes,
however long a step takes, but not when the process is stopped.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from puzzle_trtllm.cores import run_on
from puzzle_trtllm.errors import EngineError
from puzzle_trtllm.serve.runtimes.api import EngineDeadError

MEETING = "PUZZLE_TRTLLM_MEETING"
"""Environment variable: where the ranks that the front has started meet. All else they are told in torchrun's words."""

_EXIT_CODE_SECONDS = 5.0
_ASK_SECONDS = 1.0
_MAX_UNANSWERED = 8
"""A follower that leaves so many questions in a row unanswered hangs. They are counted instead of measuring the time
since the last answer, so that a front which was stopped itself accuses nobody when it goes on."""


class EngineProcesses:
    """`size` ranks, the first of which talks to the front; under torchrun only that one, as the others are there."""

    def __init__(self, size: int, cores: Sequence[int] | None = None) -> None:
        """`cores`: what they may compute on, all of them alike; None: what this process may use."""
        # Without a name, so that nothing is left of it however this process ends.
        self._meeting = tempfile.TemporaryFile() if size > 1 else None  # noqa: SIM115 (as long as they live)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._links: list[Connection] = []
        self._unanswered: dict[int, int] = {}
        """Of each follower, from its first word on: while importing and loading it may be busy without a pause."""
        self._ask_at = 0.0
        self._poll = select.poll()
        command = [_python_executable(), "-m", "puzzle_trtllm.serve.runtimes.reference.engine_process"]
        for place in self._places(size):
            ours, theirs = Pipe()
            with theirs, run_on(cores):
                self._processes.append(
                    subprocess.Popen(
                        [*command, str(theirs.fileno())], pass_fds=[theirs.fileno()], env=_environment() | place
                    )
                )
            self._poll.register(ours, select.POLLIN)
            self._links.append(ours)

    @property
    def pid(self) -> int:
        """Of the first rank."""
        return self._processes[0].pid

    def send(self, pickled: bytes) -> None:
        """A message to the first rank. Nothing happens when it is gone: that is for `receive` to notice."""
        with contextlib.suppress(OSError):
            self._links[0].send_bytes(pickled)

    def receive(self) -> Any:
        """What the first rank says next. Raises EngineDeadError with the reason when any of them is gone or hangs."""
        while True:
            changed = {file for file, _ in self._poll.poll(_ASK_SECONDS * 1000)}
            for rank, link in reversed([*enumerate(self._links)]):  # the first one last: it may always have something
                if link.fileno() in changed:
                    message = self._hear(rank)
                    if rank == 0:
                        return message
                    self._unanswered[rank] = 0
            if time.monotonic() >= self._ask_at:
                self._ask_at = time.monotonic() + _ASK_SECONDS
                self._ask()

    def stop(self, grace_s: float) -> None:
        """Give them time to end by themselves, then end what is left."""
        self._wait(grace_s)
        for process in self._processes:
            process.kill()
        self._wait(_EXIT_CODE_SECONDS)  # no longer: one in uninterruptible sleep goes when it wakes up
        if self._meeting is not None:
            self._meeting.close()

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        with contextlib.suppress(subprocess.TimeoutExpired):
            for process in self._processes:
                process.wait(max(0.0, deadline - time.monotonic()))

    def _places(self, size: int) -> list[dict[str, str]]:
        """What each process finds in its environment: its place among the ranks."""
        if size > 1 and "TORCHELASTIC_RUN_ID" in os.environ:
            return [{}]
        sizes = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
        if self._meeting is not None:
            sizes |= {MEETING: f"file:///proc/{os.getpid()}/fd/{self._meeting.fileno()}"}
            sizes |= {"GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo")}
        return [{**sizes, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]

    def _hear(self, rank: int) -> Any:
        try:
            message = self._links[rank].recv()
        except (EOFError, OSError):
            raise EngineDeadError(self._describe_end(rank)) from None
        if isinstance(message, EngineDeadError):
            raise EngineDeadError(f"rank {rank}: {message}") if rank else message
        return message

    def _ask(self) -> None:
        """Ask the followers whether they are there."""
        for rank in self._unanswered:
            if self._unanswered[rank] == _MAX_UNANSWERED:
                raise EngineDeadError(f"rank {rank} (process {self._processes[rank].pid}) hangs: it does not answer")
            self._unanswered[rank] += 1
            with contextlib.suppress(OSError):
                self._links[rank].send(None)

    def _describe_end(self, rank: int) -> str:
        """How one went that said nothing."""
        process = self._processes[rank]
        who = f"rank {rank} of the engine (process {process.pid})"
        try:
            code = process.wait(_EXIT_CODE_SECONDS)
        except subprocess.TimeoutExpired:
            return f"{who} closed its link"
        return f"{who} was killed by {signal.Signals(-code).name}" if code < 0 else f"{who} ended with exit code {code}"


def _python_executable() -> str:
    """The interpreter to start the engine with; inside Triton's stub `sys.executable` may name something else."""
    for candidate in (
        Path(sys.executable or ""),
        Path(sys.prefix, "bin", "python3"),
        Path(sys.prefix, "bin", "python"),
    ):
        if candidate.name.startswith("python") and candidate.is_file():
            return str(candidate)
    raise EngineError("no Python interpreter to start the engine with", file=sys.prefix)


def _environment() -> dict[str, str]:
    """Our own import path, for hosts that put it together at run time (Triton's stub)."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return {**os.environ, "PYTHONPATH": path}
