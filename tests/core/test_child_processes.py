"""Spawned processes: Ctrl-C never reaches them, and they end with a parent that is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from puzzle_trtllm.child_processes import end_with_parent, interrupts_blocked

TIMEOUT_S = 200
"""Longer than anything here takes on any machine."""


def send_blocked_signals(pipe) -> None:
    pipe.send(signal.pthread_sigmask(signal.SIG_BLOCK, []))


def test_a_child_is_deaf_to_ctrl_c_from_its_first_moment() -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with interrupts_blocked():
        child = context.Process(target=send_blocked_signals, args=(theirs,))
        child.start()
    theirs.close()  # so that a child that dies is an error, not a wait
    assert signal.SIGINT in ours.recv()
    child.join(TIMEOUT_S)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_ctrl_c_while_children_start_comes_when_all_are_known() -> None:
    """Whichever thread the kernel gives it to."""
    known = []
    other = threading.Thread(target=time.sleep, args=(0.5,))
    other.start()
    with pytest.raises(KeyboardInterrupt), interrupts_blocked():
        os.kill(os.getpid(), signal.SIGINT)
        other.join()
        known.append("child")
    assert known == ["child"]


def stay_long(started: str) -> None:
    end_with_parent()
    Path(started).write_text(f"{os.getpid()}\n")
    time.sleep(2 * TIMEOUT_S)


PARENT = """
import multiprocessing, sys
from tests.core.test_child_processes import stay_long
if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=stay_long, args=sys.argv[1:]).start()
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_child_does_not_outlive_a_killed_parent(tmp_path: Path, how: signal.Signals) -> None:
    script, started = tmp_path / "parent.py", tmp_path / "started"
    script.write_text(PARENT)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    with subprocess.Popen(
        [sys.executable, str(script), str(started)], env=environment, stdout=subprocess.PIPE
    ) as parent:
        while not (started.is_file() and started.read_text().endswith("\n")):
            assert parent.poll() is None
            time.sleep(0.05)
        parent.send_signal(how)
        try:
            parent.communicate(timeout=TIMEOUT_S)  # its stdout is the child's too: the end is that of both
        except subprocess.TimeoutExpired:
            os.kill(int(started.read_text()), signal.SIGKILL)
            raise
