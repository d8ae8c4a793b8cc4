"""The other ranks of an engine, as its leading process sees them: started, watched, and gone when it goes.

A link (a socket pair) to each follower says that the other end lives: it closes when a process dies, however it dies.
So no rank outlives its leader, and a thread here notices at once when a follower is gone, while the main thread may be
waiting for that very follower inside a collective.
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


class Followers:
    """Ranks 1 to `size` - 1, which meet their leader at `port` of this machine.

    `fail` is called once, in the watching thread, with the reason: when one of them is gone, or the process at the
    other end of the socket `front_fd`.
    """

    def __init__(self, *, size: int, port: int, front_fd: int, fail: Callable[[str], None]) -> None:
        self._fail = fail
        self._front_fd = front_fd
        self._stopping = False
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
        ranks = {link.fileno(): rank for rank, link in self._links.items()}
        for file in ranks:
            poll.register(file, select.POLLIN)
        changed = [file for file, _ in poll.poll()]
        if not self._stopping:
            gone = [ranks[file] for file in changed if file in ranks]
            self._fail(self._reason(gone[0]) if gone else "the front is gone")

    def _reason(self, rank: int) -> str:
        """What the follower said before it went, or how it went."""
        try:
            return f"rank {rank}: {self._links[rank].recv()}"
        except (EOFError, OSError):
            pass
        try:
            code = self._processes[rank].wait(_EXIT_CODE_SECONDS)
        except subprocess.TimeoutExpired:
            return f"rank {rank} closed its link"
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"rank {rank} (process {self._processes[rank].pid}) {how}"
