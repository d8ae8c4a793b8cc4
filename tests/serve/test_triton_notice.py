"""How a model hears that its server is about to stop; with a real server: test_triton_lifecycle.py."""

from __future__ import annotations

import os
import resource
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from puzzle_trtllm.serve.triton import notice
from puzzle_trtllm.serve.triton.notice import NoticeThread, give_notice
from tests.serve.scripted import HANG_S, wait_until


@pytest.fixture
def drained(tmp_path: Path) -> Iterator[list[float]]:
    """The seconds that a model in this process was given."""
    drained: list[float] = []
    thread = NoticeThread(tmp_path, os.getpid(), drained.append)
    yield drained
    thread.stop()


def test_a_notice_gives_the_model_its_time_and_waits_for_the_answer(tmp_path: Path, drained: list[float]) -> None:
    give_notice(tmp_path, 600.5, [os.getpid()])
    assert drained == [600.5]
    give_notice(tmp_path, 600.5, [os.getpid()])  # again: it has answered
    assert drained == [600.5]


def test_every_instance_is_waited_for(tmp_path: Path, drained: list[float]) -> None:
    other = subprocess.Popen(["sleep", "600"])
    giving = threading.Thread(target=give_notice, args=[tmp_path, 600.0, [os.getpid(), other.pid]])
    giving.start()
    try:
        wait_until(lambda: drained == [600.0], what="the notice")
        giving.join(0.3)
        assert giving.is_alive()
    finally:
        other.kill()
        other.wait()
    giving.join(HANG_S)
    assert not giving.is_alive(), "one that has died is not waited for"


def test_an_instance_that_does_not_answer_is_given_up(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(notice, "_MARGIN_S", 0.1)
    give_notice(tmp_path, 0.1, [os.getpid()])


def test_a_full_disk_is_no_obstacle(tmp_path: Path, drained: list[float]) -> None:
    """Files can be made there, but no byte written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        give_notice(tmp_path, 600.5, [os.getpid()])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert drained == [600.5]


def test_a_folder_that_cannot_be_written_is_no_obstacle(tmp_path: Path) -> None:
    give_notice(tmp_path / "gone", 600.0, [os.getpid()])
