"""What the system says of processes: their children, whether they live, whether somebody has stopped them."""

from __future__ import annotations

from pathlib import Path


def children_of(pid: int) -> set[int]:
    """Direct children of a process, from /proc; empty when it has ended."""
    children: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children.update(int(child) for child in task.read_text().split())
        except OSError:
            continue
    return children


def is_alive(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    return _state(pid) not in ("Z", "X", None)


class StoppedProcesses:
    """Tells processes that somebody has stopped (SIGSTOP) for good from those that go on.

    Looks are counted instead of measuring time, so that who was stopped itself accuses nobody when it goes on.
    """

    def __init__(self, max_looks: int = 16) -> None:
        self._max_looks = max_looks
        self._looks: dict[int, int] = {}
        """How many looks in a row found each of them stopped."""

    @property
    def any_now(self) -> bool:
        """Whether one of them was found stopped when it was last looked at."""
        return any(self._looks.values())

    def given_up(self, pid: int) -> bool:
        """Look at it; whether that was the last look in a row that it is given."""
        self._looks[pid] = self._looks.get(pid, 0) + 1 if _state(pid) == "T" else 0
        return self._looks[pid] >= self._max_looks


def _state(pid: int) -> str | None:
    """The letter of /proc; None where there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[0]
