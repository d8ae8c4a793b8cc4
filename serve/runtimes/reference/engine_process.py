"""A process of the engine: an event loop around the engine core at the other end of a socket pair.

    python -m puzzle_trtllm.serve.runtimes.reference.engine_process FD

It lives and dies with its front: when the socket closes, whatever the reason, it exits. While there is work it takes
messages between steps without waiting; when idle it blocks. Reports go out once a step, so the loop's own cost does not
grow with the number of readers.

Of several ranks, which find their place in the environment as torchrun gives it, the first one does so. The others run
the same steps on the messages that it shares, report to nobody, and take its choice of tokens.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

from puzzle_trtllm.errors import EngineError, PuzzleError
from puzzle_trtllm.models.reference.rank_group import ALONE, RankGroup
from puzzle_trtllm.serve.runtimes.api import EngineDeadError
from puzzle_trtllm.serve.runtimes.reference.arguments import EngineArguments
from puzzle_trtllm.serve.runtimes.reference.engine import ReferenceEngine
from puzzle_trtllm.serve.runtimes.reference.loading import load_engine
from puzzle_trtllm.serve.runtimes.reference.messages import Abort, Ready, StepReport, Submit
from puzzle_trtllm.serve.runtimes.reference.processes import MEETING

GAUGE_SECONDS = 0.05
"""Gauges are sent at least this often while there is work, also when no request has anything to report."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _INT_MAX = -1, -3, 2**31 - 1
"""malloc.h of glibc."""

_LAST_WORDS_SECONDS = 1.0
"""How long a rank that fails leaves it to the front to notice which one was lost; and one without a front, to itself
to end in order."""

LOG_FORMAT = "%(levelname)s %(name)s: %(message)s"

_log = logging.getLogger(__name__)


def main(fd: int) -> int:
    """Lead or follow until the front says that it is over, or is gone (0), or something fails (1)."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format=LOG_FORMAT)
    # Ctrl-C and a service manager's stop reach all processes at once; who stops the engine is its front.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    front = Connection(fd)
    threading.Thread(target=_wait_for_end, args=(front,), daemon=True).start()
    try:
        if os.environ["RANK"] == "0":
            _lead(front)
        else:
            follow()
    except Exception as error:
        reason = str(error)
        if not isinstance(error, PuzzleError):
            _log.exception("the engine failed")
            reason = f"{type(error).__name__}: {error}"
            if int(os.environ["WORLD_SIZE"]) > 1:
                time.sleep(_LAST_WORDS_SECONDS)
        _send(front, EngineDeadError(reason))
        return 1
    return 0


def follow() -> None:
    """Load what the leader loads, then run the engine as it does, on the messages that it shares, until the end."""
    _keep_freed_memory()
    ranks = _join_ranks()
    engine, _ = load_engine(ranks.share(), ranks)
    run(engine, receive=lambda _: ranks.share(), send=lambda _: None)


def _lead(front: Connection) -> None:
    """Load the engine that the first message describes, then serve."""
    _keep_freed_memory()
    arguments: EngineArguments = front.recv()
    size = arguments.parallelism.tensor
    ranks = _join_ranks(size) if size > 1 else ALONE
    ranks.share(arguments)
    engine, facts = load_engine(arguments, ranks)
    _send(front, Ready(facts=facts, stats=engine.stats))
    run(engine, receive=lambda wait: ranks.share(_receive(front, wait)), send=lambda report: _send(front, report))


def _join_ranks(size: int | None = None) -> RankGroup:
    """Meet the other ranks: torchrun's variables say which one this is, and where they meet, unless the front does.

    Raises EngineError when `size` are wanted and torchrun started more or fewer.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    rank, found, local_rank, local_size = (int(os.environ[name]) for name in names)
    if size not in (None, found):
        raise EngineError("torchrun started more or fewer", key="tensor_parallel_size", found=size, expected=found)
    meeting = os.environ.get(MEETING, "env://")
    return RankGroup(rank=rank, size=found, local_rank=local_rank, local_size=local_size, meeting=meeting)


def _keep_freed_memory() -> None:
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


def _receive(front: Connection, wait: bool) -> list[Submit | Abort] | None:
    """All messages that are there, or at least one; None when told to stop, or the front is gone."""
    messages: list[Submit | Abort] = []
    try:
        while (wait and not messages) or front.poll(0):
            if (message := front.recv()) is None:
                return None
            messages.append(message)
    except (EOFError, OSError):
        return None
    return messages


def _send(front: Connection, message: Ready | StepReport | EngineDeadError) -> None:
    """Nothing happens when the front is gone: that is for `_receive` to notice."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        front.send(message)


def _wait_for_end(front: Connection) -> None:
    """Exit once the front is gone, should `_receive` not get to notice it: this rank may be waiting for another one."""
    poll = select.poll()
    poll.register(front, select.POLLRDHUP)
    poll.poll()
    time.sleep(_LAST_WORDS_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    code = main(int(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    # Nothing is left to save, and tearing down torch takes a second that whoever stops us would wait for.
    os._exit(code)
