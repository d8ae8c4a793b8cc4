"""The OpenAI front as a process: what its start leaves to chance. With a real one: test_openai_live.py."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from puzzle_trtllm.serve.openai import process
from puzzle_trtllm.serve.openai.process import OpenAiFront
from puzzle_trtllm.serve.triton.ports import choose_ports

SERVER: Any = SimpleNamespace(engine=SimpleNamespace(path=Path("engine")), grpc_url="", metrics_url="", cores=None)


def test_the_port_of_a_front_that_is_starting_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """It imports for seconds before it listens, and any connection on the machine may be given a port meanwhile."""
    taken: list[int] = []

    def launch(command: list[str], **options: Any) -> SimpleNamespace:
        port = int(command[command.index("--port") + 1])
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        choose_ports("127.0.0.1", {"OpenAI": port})  # as the front does
        socket.create_server(("127.0.0.1", port)).close()
        taken.append(port)
        return SimpleNamespace(pid=os.getpid(), exit_code=lambda: None, stop=options["scratch"].rmdir)

    monkeypatch.setattr(process, "GuardedProcess", launch)
    monkeypatch.setattr(process, "http_status", lambda url: 200)
    front = OpenAiFront()
    front.start(SERVER)
    assert front.url == f"http://127.0.0.1:{taken[0]}/v1"
    front.stop()


def test_a_front_that_cannot_be_started_leaves_no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With --restart it is tried every few seconds, for days."""

    def launch(command: list[str], **options: Any) -> SimpleNamespace:
        assert options["scratch"].is_dir()
        raise BlockingIOError("no more processes")

    monkeypatch.setattr(process, "GuardedProcess", launch)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(BlockingIOError):
        OpenAiFront().start(SERVER)
    assert not list(tmp_path.iterdir())
