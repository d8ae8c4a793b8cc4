"""The other ranks of an engine, as its leading process sees them: started, watched, and gone when it goes.

A link (a socket pair) to each follower says that the other end lives: it closes when a process dies, however it dies.
So no rank outlives its leader, and a thread here notices at once when a follower is gone, while the main thread may be
waiting for that very follower inside a collective. A follower that is there but hangs is found by asking: a thread of
its own answers while it computes, however long a step takes, but not when the process is stopped.
"""

from __future__ import annotations

import contextlib
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

_STOP_SECONDS = 3.0
_EXIT_CODE_SECONDS = 5.0

_ASK_SECONDS = 1.0
_MAX_UNANSWERED = 8
"""A follower that leaves so many questions in a row unanswered hangs. They are counted instead of measuring the time
since the last answer, so that a leader which was stopped itself accuses nobody when it goes on."""


class Followers:
    """Ranks 1 to `size` - 1, which meet their leader at `port` of this machine.

    `fail` is called once, in the watching thread, with the reason: when one of them is gone, or the process at the
    other end of the socket `front_fd`.
    """

    def __init__(self, *, size: int, port: int, front_fd: int, fail: Callable[[str], None]) -> None:
        self._fail = fail
        self._front_fd = front_fd
        self._stopping = False
        self.loaded = False
        """Whether to ask: before, while importing and loading, a follower may be busy without a pause."""
        self._unanswered: dict[int, int] = dict.fromkeys(range(1, size), 0)
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._links: dict[int, Connection] = {}
        for rank in range(1, size):
            ours, theirs = socket.socketpair()
            with theirs:
                command = [sys.executable, "-m", "puzzle_trtllm.serve.runtimes.reference.follower"]
                arguments = [str(theirs.fileno()), str(rank), str(size), str(port)]
                self._processes[rank] = subprocess.Popen([*command, *arguments], pass_fds=[theirs.fileno()])
            self._links[rank] = Connection(ours.detach())
        threading.Thread(target=self._watch, name="reference-engine-ranks", daemon=True).start()

    def stop(self) -> None:
        """Once they have been told to end: give them a little time for it, then end what is left."""
        self._stopping = True
        deadline = time.monotonic() + _STOP_SECONDS
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.wait()

    def _watch(self) -> None:
        poll = select.poll()
        # Only the closing: what the front says is for the main thread.
        poll.register(self._front_fd, select.POLLRDHUP)
        for link in self._links.values():
            poll.register(link, select.POLLIN)
        reason, ask_at = None, time.monotonic()
        while reason is None:
            wait_s = max(0.0, ask_at - time.monotonic())
            reason = self._hear([file for file, _ in poll.poll(wait_s * 1000)])
            if reason is None and time.monotonic() >= ask_at:
                ask_at = time.monotonic() + _ASK_SECONDS
                reason = self._ask() if self.loaded else None
        if not self._stopping:
            self._fail(reason)

    def _ask(self) -> str | None:
        """Ask every follower whether it is there; why to fail, if one has not answered for too long."""
        for rank, link in self._links.items():
            if self._unanswered[rank] == _MAX_UNANSWERED:
                self._kill()  # a process that is stopped does not notice that its link is closed
                return f"rank {rank} (process {self._processes[rank].pid}) hangs: it does not answer"
            self._unanswered[rank] += 1
            with contextlib.suppress(OSError):
                link.send(None)
        return None

    def _hear(self, changed: list[int]) -> str | None:
        """Take the answers that have come; why to fail, if one of them is no answer."""
        for rank, link in self._links.items():
            if link.fileno() in changed:
                try:
                    last_words = link.recv()
                except (EOFError, OSError):
                    return self._describe_end(rank)
                if last_words is not None:
                    return f"rank {rank}: {last_words}"
                self._unanswered[rank] = 0
        return "the front is gone" if self._front_fd in changed else None

    def _kill(self) -> None:
        for process in self._processes.values():
            process.kill()

    def _describe_end(self, rank: int) -> str:
        """How a follower went that said nothing."""
        try:
            code = self._processes[rank].wait(_EXIT_CODE_SECONDS)
        except subprocess.TimeoutExpired:
            return f"rank {rank} closed its link"
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"rank {rank} (process {self._processes[rank].pid}) {how}"
