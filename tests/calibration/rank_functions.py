"""What the tests have ranks do. A rank is a new process that imports its function: this file imports little."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import psutil

from puzzle_trtllm.calibration.ranks import Ranks
from puzzle_trtllm.errors import PuzzleError


def talk(ranks: Ranks) -> list[str]:
    shared = [f"item {i}" for i in ranks.share(range(5))]
    return [*ranks.in_order(shared), str(ranks.smallest(ranks.rank + 4))]


def die(ranks: Ranks) -> None:
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(6000)


def work_for_long(ranks: Ranks) -> None:
    os.write(sys.stdout.fileno(), b"working\n")  # one write: two ranks print at once
    time.sleep(600)
    print("still working", flush=True)


def addresses(ranks: Ranks) -> set[str]:
    ranks.wait()
    return {connection.laddr.ip for connection in psutil.Process().net_connections()}


def be_slow_to_leave(ranks: Ranks) -> None:
    atexit.register(time.sleep, 60)


def end_once_it_has_answered(ranks: Ranks, tidied: str) -> str:
    """It is told to end at the first moment at which it can be, and would leave a file if it tidied up."""
    send = Connection.send

    def send_and_be_ended(self: Connection, answer: object) -> None:
        send(self, answer)
        signal.raise_signal(signal.SIGTERM)

    Connection.send = send_and_be_ended
    atexit.register(Path(tidied).touch)
    return "done"


def refuse(ranks: Ranks, place: str) -> None:
    if ranks.rank == 1:
        raise PuzzleError("not like this", file=place, found=1)
    ranks.wait()
