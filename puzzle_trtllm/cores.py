"""Which processor cores a process may use, written as the kernel's tools write them: `1`, `0,2` or `4-7,12`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from puzzle_trtllm.errors import PuzzleError


def parse_cores(text: str, *, key: str) -> list[int]:
    """The cores of a list like `4-7,12`, ascending. Raises PuzzleError naming `key` for other text."""
    cores: set[int] = set()
    for part in text.split(","):
        ends = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part.strip())
        first, last = (int(ends[1]), int(ends[2] or ends[1])) if ends else (1, 0)
        if first > last:
            raise PuzzleError("not a list of cores", key=key, found=repr(text), expected="such as 1 or 4-7,12")
        cores.update(range(first, last + 1))
    return sorted(cores)


def other_cores(taken: Iterable[int], *, key: str) -> set[int]:
    """What this process may use beside `taken`. Raises PuzzleError when it may not use those, or nothing else."""
    ours, taken = os.sched_getaffinity(0), set(taken)
    if not taken <= ours:
        raise PuzzleError("no such cores here", key=key, found=_show(taken - ours), expected=f"some of {_show(ours)}")
    if taken == ours:
        raise PuzzleError("leaves no core to the server", key=key, found=_show(taken), expected="fewer cores")
    return ours - taken


@contextmanager
def run_on(cores: Iterable[int] | None) -> Iterator[None]:
    """Processes that this thread starts in the block use these cores alone; None: those that it may use itself."""
    if cores is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _show(cores: Iterable[int]) -> str:
    return ",".join(map(str, sorted(cores)))
