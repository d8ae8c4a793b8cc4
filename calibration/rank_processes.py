"""`--ranks N`: one process a rank on this machine, and one clear line when one of them fails.

The first failure ends all: its error is raised here, the others are terminated; they end too when this process is
killed. They talk through a file in a temporary folder (torch.distributed's FileStore), so no port is taken. Each gets
an equal part of this process's threads.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from puzzle_trtllm.calibration.ranks import LostRankError, joined_ranks
from puzzle_trtllm.child_processes import end_with_parent, interrupts_blocked
from puzzle_trtllm.errors import CalibrationError, PuzzleError

SECONDS_TO_CLEAN_UP = 20.0

RankFunction = Callable[..., Any]
"""`function(ranks, **options)`; it, its options and its result must pickle."""


def run_ranks(size: int, function: RankFunction, options: Mapping[str, Any]) -> Any:
    """Run `function(ranks, **options)` in `size` processes and return rank 0's result.

    Raises what the first failing rank raised if that was a user's error, else CalibrationError naming the rank.
    """
    context = multiprocessing.get_context("spawn")
    num_threads = max(1, torch.get_num_threads() // size)
    processes: list[BaseProcess] = []
    answers: list[Connection] = []
    with tempfile.TemporaryDirectory(prefix="puzzle-ranks-") as folder:
        try:
            with interrupts_blocked():
                for rank in range(size):
                    answer, end = context.Pipe(duplex=False)
                    store = f"file://{Path(folder) / 'store'}"
                    arguments = (rank, size, store, num_threads, end, function, dict(options))
                    process = context.Process(target=_run_rank, args=arguments, name=f"rank {rank}")
                    process.start()
                    end.close()
                    processes.append(process)
                    answers.append(answer)
            return _first_result(answers, processes)
        finally:
            _end(processes)


def _first_result(answers: Sequence[Connection], processes: Sequence[BaseProcess]) -> Any:
    results: dict[int, Any] = {}
    lost: PuzzleError | None = None
    waiting = {answer: rank for rank, answer in enumerate(answers)}
    while waiting:
        ready = wait(list(waiting), timeout=None if lost is None else SECONDS_TO_CLEAN_UP)
        if lost is not None and not ready:
            raise lost
        for answer in [answer for answer in waiting if answer in ready]:
            rank = waiting.pop(answer)
            error, results[rank] = _receive(answer, processes[rank], rank)
            if isinstance(error, LostRankError):
                lost = error  # the one that is to blame has a better line
            elif error is not None:
                raise error
    if lost is not None:
        raise lost
    return results[0]


def _receive(answer: Connection, process: BaseProcess, rank: int) -> tuple[PuzzleError | None, Any]:
    try:
        error, result = answer.recv()
        return error, result
    except EOFError:
        process.join()
        code = process.exitcode or 0
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return CalibrationError("ended without a result", key=f"rank {rank}", found=how), None


def _end(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        if process.is_alive():
            process.terminate()
    for process in processes:
        process.join(SECONDS_TO_CLEAN_UP)
        if process.is_alive():
            process.kill()
            process.join()


def _run_rank(
    rank: int, size: int, init_method: str, num_threads: int, answer: Connection, function: RankFunction, options: Any
) -> None:
    signal.signal(signal.SIGTERM, _leave)  # so that what was half written is removed
    end_with_parent()
    torch.set_num_threads(num_threads)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all are here; by itself gloo asks what the host's name means
    outcome: tuple[PuzzleError | None, Any]
    try:
        with joined_ranks(init_method, rank=rank, size=size) as ranks:
            result = function(ranks, **options)
            ranks.wait()
        outcome = (None, result if rank == 0 else None)
    except PuzzleError as error:
        outcome = (_portable(error), None)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing to remove any more: go without a word
    answer.send(outcome)  # whoever hears of it may end us at once


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _portable(error: PuzzleError) -> PuzzleError:
    """The same line as an error that pickles (subclasses take keywords, which pickle does not pass on)."""
    return (LostRankError if isinstance(error, LostRankError) else CalibrationError)(str(error))
