"""The processes of one engine as its front sees them: started, watched, and gone when it goes.

A link (a socket pair) to each says that the other end lives: it closes when a process dies, however it dies. So no rank
outlives the front, and the front notices at once when one is gone, while the others may be waiting for it inside a
collective. One that is stopped (SIGSTOP) keeps its link open and is looked for.
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
from puzzle_trtllm.process_states import StoppedProcesses
from puzzle_trtllm.serve.runtimes.api import EngineDeadError

MEETING = "PUZZLE_TRTLLM_MEETING"
"""Environment variable: where the ranks that the front has started meet. All else they are told in torchrun's words."""

_EXIT_CODE_SECONDS = 5.0
_LOOK_SECONDS = 1.0
_MAX_LOOKS = 8
"""A process found stopped so many times in a row is given up."""


class EngineProcesses:
    """`size` ranks, the first of which talks to the front; under torchrun only that one, as the others are there."""

    def __init__(self, size: int, cores: Sequence[int] | None = None) -> None:
        """`cores`: what they may compute on, all of them alike; None: what this process may use."""
        # Without a name, so that nothing is left of it however this process ends.
        self._meeting = tempfile.TemporaryFile() if size > 1 else None  # noqa: SIM115 (as long as they live)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._links: list[Connection] = []
        self._stopped = StoppedProcesses(_MAX_LOOKS)
        self._look_at = 0.0
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
        """What the first rank says next. Raises EngineDeadError with the reason when any of them is gone or stopped."""
        while True:
            changed = {file for file, _ in self._poll.poll(_LOOK_SECONDS * 1000)}
            for rank, link in reversed([*enumerate(self._links)]):  # the first one last: it may always have something
                if link.fileno() in changed:
                    return self._hear(rank)
            if time.monotonic() >= self._look_at:
                self._look_at = time.monotonic() + _LOOK_SECONDS
                self._look()

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

    def _look(self) -> None:
        """Give up on one that has been stopped for long."""
        for rank, process in enumerate(self._processes):
            if self._stopped.given_up(process.pid):
                raise EngineDeadError(f"{self._name(rank)} was stopped and does not go on")

    def _name(self, rank: int) -> str:
        return f"rank {rank} of the engine (process {self._processes[rank].pid})"

    def _describe_end(self, rank: int) -> str:
        """How one went that said nothing."""
        process, who = self._processes[rank], self._name(rank)
        try:
            code = process.wait(_EXIT_CODE_SECONDS)
        except subprocess.TimeoutExpired:
            return f"{who} closed its link"
        return f"{who} was killed by {signal.Signals(-code).name}" if code < 0 else f"{who} ended with exit code {code}"


def _python_executable() -> str:
    """The interpreter to start the engine with; inside Triton's stub `sys.executable` may name something else."""
    folder = Path(sys.prefix, "bin")
    for candidate in (Path(sys.executable or ""), folder / "python3", folder / "python"):
        if candidate.name.startswith("python") and candidate.is_file():
            return str(candidate)
    raise EngineError("no Python interpreter to start the engine with", file=sys.prefix)


def _environment() -> dict[str, str]:
    """Our own import path alone, for hosts that put it together at run time (Triton's stub)."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
