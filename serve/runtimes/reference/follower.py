"""A rank that follows: its own part of the model, and the leader's requests, so that it runs the same steps.

    python -m puzzle_trtllm.serve.runtimes.reference.follower LINK_FD RANK SIZE PORT

It reports to nobody, and takes the leader's choice of tokens. It dies with its leader, whatever it is doing: a thread
waits for the link to close, and answers what comes through it, so that the leader can tell a long step from a process
that hangs.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from puzzle_trtllm.errors import PuzzleError

if TYPE_CHECKING:
    from puzzle_trtllm.models.reference.rank_group import RankGroup

_log = logging.getLogger(__name__)


def main(link_fd: int, rank: int, size: int, port: int) -> int:
    """Follow the leader at `port` of this machine until it is done (0), or something fails (1)."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    link = Connection(link_fd)
    threading.Thread(target=_answer, args=(link,), name="leader-watch", daemon=True).start()
    try:
        from puzzle_trtllm.serve.runtimes.reference.ranks import join_local

        follow(join_local(rank=rank, size=size, port=port))
    except Exception as error:
        if not isinstance(error, PuzzleError):
            _log.exception("rank %d failed", rank)
        reason = str(error) if isinstance(error, PuzzleError) else f"{type(error).__name__}: {error}"
        link.send(reason)
        return 1
    return 0


def follow(ranks: RankGroup) -> None:
    """Load what the leader loads, then run the engine as it does, on the messages that it shares, until the end."""
    from puzzle_trtllm.serve.runtimes.reference.engine_process import keep_freed_memory, run
    from puzzle_trtllm.serve.runtimes.reference.loading import load_engine

    keep_freed_memory()
    engine = load_engine(ranks.share(), ranks).engine
    run(engine, receive=lambda _: ranks.share(), send=lambda _: None)


def _answer(link: Connection) -> None:
    try:
        while True:
            link.recv()
            link.send(None)
    except (EOFError, OSError):
        os._exit(1)


if __name__ == "__main__":
    code = main(*(int(argument) for argument in sys.argv[1:]))
    sys.stderr.flush()
    os._exit(code)
