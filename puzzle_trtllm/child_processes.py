"""Processes that multiprocessing starts for us: Ctrl-C is their parent's business, and they do not outlive it.

A terminal sends Ctrl-C to everybody at once. A spawned process imports for seconds before it can say that it does not
care, and would fill the screen with its traceback; so it inherits the signal as blocked.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

PARENT_DIED = 1
"""Exit code of a process whose parent was killed."""


@contextmanager
def interrupts_blocked() -> Iterator[None]:
    """Processes started in the block never see Ctrl-C; this one sees it at the end, when it knows them all."""
    resource_tracker.ensure_running()  # a first start would start it too, and unblock the signal
    with _interrupts_held():
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # children inherit this
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Another thread may be given the signal that this one blocks, and Python's handler still runs here."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if held:
        signal.raise_signal(signal.SIGINT)


def end_with_parent() -> None:
    """Call it in a spawned process: it ends when its parent does, at once, as if it had been killed as well."""
    threading.Thread(target=_wait_for_parent, daemon=True, name="parent watch").start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(PARENT_DIED)
