"""The engine process: an event loop around the engine core at the other end of a socket pair.

    python -m puzzle_trtllm.serve.runtimes.reference.engine_process FD

It lives and dies with its front: when the socket closes, whatever the reason, it exits, and with it the other ranks
that it leads. While there is work it takes messages between steps without waiting; when idle it blocks. Reports go out
once a step, so the loop's own cost does not grow with the number of readers.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, NoReturn

from puzzle_trtllm.errors import PuzzleError
from puzzle_trtllm.serve.runtimes.reference.arguments import EngineArguments
from puzzle_trtllm.serve.runtimes.reference.engine import OutOfStepError, ReferenceEngine
from puzzle_trtllm.serve.runtimes.reference.messages import (
    Abort,
    EngineFailed,
    Ready,
    StepReport,
    Submit,
)

GAUGE_SECONDS = 0.05
"""Gauges are sent at least this often while there is work, also when no request has anything to report."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _INT_MAX = -1, -3, 2**31 - 1
"""malloc.h of glibc."""

_LAST_WORDS_SECONDS = 1.0
"""How long the loop leaves it to the thread that watches the ranks to say which one was lost."""

if TYPE_CHECKING:
    from puzzle_trtllm.serve.runtimes.reference.followers import Followers
    from puzzle_trtllm.serve.runtimes.reference.loading import LoadedEngine

_log = logging.getLogger(__name__)


def main(fd: int) -> int:
    """Load the engine that the first message describes, then serve until the front is gone."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    # Ctrl-C reaches the whole process group; who stops the engine is its front.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_freed_memory()
    connection = _Front(fd)
    arguments: EngineArguments = connection.recv()
    try:
        loaded, followers = _load(arguments, connection)
    except Exception as error:
        if not isinstance(error, PuzzleError):
            _log.exception("the engine could not be loaded")
            if arguments.parallelism.tensor > 1:
                time.sleep(_LAST_WORDS_SECONDS)
        reason = str(error) if isinstance(error, PuzzleError) else f"{type(error).__name__}: {error}"
        connection.send(EngineFailed(reason=reason))
        return 1
    _log.info("engine ready: %s", ", ".join(f"{key}={value}" for key, value in loaded.facts.items()))
    connection.send(Ready(facts=loaded.facts, stats=loaded.engine.stats))
    if followers is not None:
        followers.loaded = True
    ranks = loaded.engine.ranks

    def receive(wait: bool) -> list[Submit | Abort] | None:
        messages = _receive(connection, wait)
        return messages if ranks is None else ranks.share(messages)

    try:
        run(loaded.engine, receive, connection.send)
    except Exception as error:
        _log.exception("the engine failed")
        if ranks is not None:
            time.sleep(_LAST_WORDS_SECONDS)
        connection.fail(str(error) if isinstance(error, OutOfStepError) else f"{type(error).__name__}: {error}")
    if followers is not None:
        followers.stop()
    return 0


class _Front(Connection):
    """The connection to the front, shared with the thread that watches the ranks."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self._lock = threading.Lock()

    def send(self, message: object) -> None:
        """Nothing happens when the front is gone: that is for `receive` to notice."""
        with self._lock, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            super().send(message)

    def fail(self, reason: str) -> NoReturn:
        """Say why and exit; the other ranks notice."""
        _log.error("%s", reason)
        if self._lock.acquire(timeout=_LAST_WORDS_SECONDS):
            with contextlib.suppress(OSError):
                super().send(EngineFailed(reason=reason))
        os._exit(1)


def _load(arguments: EngineArguments, front: _Front) -> tuple[LoadedEngine, Followers | None]:
    from puzzle_trtllm.serve.runtimes.reference.loading import load_engine

    if arguments.parallelism.tensor == 1:
        return load_engine(arguments), None
    from puzzle_trtllm.serve.runtimes.reference.ranks import lead

    ranks, followers = lead(arguments, front_fd=front.fileno(), fail=front.fail)
    return load_engine(arguments, ranks), followers


def keep_freed_memory() -> None:
    """Have glibc reuse large buffers instead of giving them back: every step allocates the same ones, and fresh pages
    from the kernel cost more than the arithmetic on them."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, _INT_MAX)


def run(
    engine: ReferenceEngine,
    receive: Callable[[bool], list[Submit | Abort] | None],
    send: Callable[[StepReport], None],
) -> None:
    """Take messages and advance, on every rank alike, until `receive` (called with whether to wait) gives None."""
    reported = 0.0
    while (messages := receive(not engine.has_work)) is not None:
        taken = [engine.submit(m) if isinstance(m, Submit) else engine.abort(m.request_id) for m in messages]
        updates = [update for update in taken if update is not None] + engine.step()
        now = time.monotonic()
        if updates or not engine.has_work or now - reported > GAUGE_SECONDS:
            reported = now
            send(StepReport(updates=updates, stats=engine.stats))


def _receive(connection: Connection, wait: bool) -> list[Submit | Abort] | None:
    """All messages that are there, or at least one; None when told to stop, or the front is gone."""
    messages: list[Submit | Abort] = []
    try:
        while (wait and not messages) or connection.poll(0):
            if (message := connection.recv()) is None:
                return None
            messages.append(message)
    except (EOFError, OSError):
        return None
    return messages


if __name__ == "__main__":
    code = main(int(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    # Nothing is left to save, and tearing down torch takes a second that whoever stops us would wait for.
    os._exit(code)
