"""Telling a model that its server is about to stop, so that it can end its requests first.

tritonserver, on SIGTERM, waits some seconds for its HTTP connections and gRPC streams, then cuts them off, and
`finalize` comes only when no request is open: a longer one would end without a word, over HTTP in the middle of its
stream. So who stops the server tells the model first, by a link in its folder: `stopping`, to the seconds that open
requests get. Each instance answers with an empty file `ended-PID` when it has none left. A full disk still has room for
both, and a link is there as a whole or not at all.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path

from puzzle_trtllm.process_states import is_alive

_NOTICE = "stopping"
_POLL_S = 0.1
_MARGIN_S = 2.0
"""After the requests' time, until an instance that does not answer is given up."""


def give_notice(folder: Path, drain_s: float, pids: Collection[int]) -> None:
    """Have the instances `pids` of the model in `folder` end their requests; returns when they have."""
    try:
        with contextlib.suppress(FileExistsError):  # it was told before
            (folder / _NOTICE).symlink_to(str(drain_s))
    except OSError:  # a folder that is gone: the server is stopped all the same
        return
    deadline_s = time.monotonic() + drain_s + _MARGIN_S
    while any(is_alive(pid) and not _answer(folder, pid).exists() for pid in pids) and time.monotonic() < deadline_s:
        time.sleep(_POLL_S / 2)


class NoticeThread:
    """Waits for the notice in the model's process `pid`; `drain` ends its requests within the seconds it is given."""

    def __init__(self, folder: Path, pid: int, drain: Callable[[float], None]) -> None:
        self._notice = folder / _NOTICE
        self._answer = _answer(folder, pid)
        self._drain = drain
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="puzzle-notice", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while not self._stopping.wait(_POLL_S):
            if self._notice.is_symlink():
                self._drain(float(str(self._notice.readlink())))
                self._answer.touch()
                return


def _answer(folder: Path, pid: int) -> Path:
    return folder / f"ended-{pid}"
