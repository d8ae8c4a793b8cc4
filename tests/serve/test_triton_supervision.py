"""What `serve` does around the server, with a server that is none: the orders of events, restarts that fail, probes.

With a real server: test_triton_lifecycle.py and test_triton_restart.py.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import typer

from puzzle_trtllm.commands.engines import serve_command
from puzzle_trtllm.errors import ServeError
from puzzle_trtllm.process_states import is_alive
from puzzle_trtllm.serve.openai.process import OpenAiFront
from puzzle_trtllm.serve.triton import launch, metrics, notice
from puzzle_trtllm.serve.triton import server as supervision
from puzzle_trtllm.serve.triton.launch import TritonServer
from puzzle_trtllm.serve.triton.probe import hangs_up, http_status, read_metrics
from puzzle_trtllm.serve.triton.server import serve_engine, watch
from tests.serve.scripted import HANG_S, scripted_engine, wait_until


@pytest.fixture(scope="module")
def engine(make_checkpoint, tmp_path_factory):
    return scripted_engine(tmp_path_factory.mktemp("scripted") / "engine", make_checkpoint([(4, None), (2, 16)]))


@pytest.fixture
def history(monkeypatch) -> list[str]:
    """What happens to the fake servers and what is beside them."""
    history: list[str] = []
    monkeypatch.setattr(supervision, "_RESTART_PAUSE_S", 0.01)
    monkeypatch.setattr(supervision, "TritonServer", lambda *_, **options: FakeServer(history, **options))
    return history


class FakeServer:
    """Dies as soon as it is watched; `starts` tells which starts fail."""

    starts: ClassVar[list[bool | BaseException]] = []
    log_file = Path("log")

    def __init__(self, history: list[str], **options) -> None:
        self.history = history
        self.engine = SimpleNamespace(path=Path("engine"))
        self.grpc_url = self.http_url = self.metrics_url = ""

    def start(self) -> None:
        outcome = self.starts.pop(0) if self.starts else True
        if outcome is not True:
            self.history.append("start fails")
            raise outcome or ServeError("port 8001 (gRPC) is in use")
        self.history.append("start")

    def stop(self, *, grace_s: float | None = None) -> None:
        self.history.append("stop")

    def drain(self) -> None:
        self.history.append("drain")

    def keep_log(self) -> None:
        self.history.append("keep log")

    def stub_pids(self) -> set[int]:
        return set()

    def exit_code(self) -> int:
        return 1


class FakeFront:
    """What runs beside."""

    problem: ServeError | None = None

    def __init__(self, history: list[str]) -> None:
        self.history = history

    def check(self) -> None:
        if self.problem is not None:
            raise self.problem

    def start(self, server) -> None:
        self.history.append("front start")

    def failure(self) -> None:
        return None

    def stop(self) -> None:
        self.history.append("front stop")


def sends(number: int) -> Callable[[object], None]:
    """For `on_ready`: this process is sent a signal."""
    return lambda server: os.kill(os.getpid(), number)


def test_what_is_beside_the_server_is_checked_before_the_engine_is_loaded(engine, history) -> None:
    front = FakeFront(history)
    front.problem = ServeError("port 9000 (OpenAI) is in use")
    with pytest.raises(ServeError, match="9000"):
        serve_engine(engine, beside=front, quiet=True)
    assert history == []


def test_after_a_death_what_is_beside_the_server_stops_last(engine, history) -> None:
    """So that it can tell its clients; stopped first it would cut their streams in the middle."""
    assert serve_engine(engine, beside=FakeFront(history), quiet=True) == 1
    assert history == ["start", "front start", "keep log", "stop", "front stop"]


def test_a_signal_ends_the_requests_first_then_what_is_beside_the_server(engine, history) -> None:
    """A front that were stopped first would cut off its clients in the middle."""
    front = FakeFront(history)
    assert serve_engine(engine, beside=front, on_ready=sends(signal.SIGTERM), quiet=True) == 0
    assert history == ["start", "front start", "drain", "front stop", "stop"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_terminal_that_closes_stops_it_as_ctrl_c_does(engine, history, number: int) -> None:
    assert serve_engine(engine, on_ready=sends(number), quiet=True) == 0
    assert history == ["start", "drain", "stop"]


def test_a_second_signal_does_not_cut_the_stop_short(engine, history, monkeypatch) -> None:
    """A person who is in a hurry."""
    front = FakeFront(history)
    monkeypatch.setattr(front, "stop", lambda: os.kill(os.getpid(), signal.SIGINT))
    assert serve_engine(engine, beside=front, on_ready=sends(signal.SIGTERM), quiet=True) == 0
    assert history == ["start", "front start", "drain", "stop"]


def test_a_second_signal_does_not_cut_short_what_a_start_has_to_undo(engine, history, monkeypatch) -> None:
    def start(server: FakeServer) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            history.append("start undone")

    monkeypatch.setattr(FakeServer, "start", start)
    assert serve_engine(engine, quiet=True) == 0
    assert history == ["start undone"]


def test_under_nohup_it_outlives_the_terminal(engine, history, monkeypatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert serve_engine(engine, on_ready=sends(signal.SIGHUP), quiet=True) == 1
    finally:
        signal.signal(signal.SIGHUP, before)
    assert history == ["start", "keep log", "stop"]


def test_a_restart_that_fails_is_tried_again(engine, history, monkeypatch, capfd) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "/tmp/puzzle-triton-x")
    monkeypatch.setattr(FakeServer, "starts", [True, False, full, True])
    restarts = []

    def stop_at_the_second(server) -> None:
        restarts.append(server)
        if len(restarts) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    assert serve_engine(engine, restart=True, on_ready=stop_at_the_second) == 0
    assert [event for event in history if "start" in event] == ["start", "start fails", "start fails", "start"]
    assert "not started, next try in 0 s: port 8001 (gRPC) is in use" in capfd.readouterr().err


@pytest.mark.parametrize("outcome", [True, False], ids=["dies", "does not start"])
def test_an_engine_that_restarts_for_ever_does_not_fill_the_disk(
    engine, history, monkeypatch, tmp_path: Path, outcome: bool
) -> None:
    started: list[Path] = []

    def start(server: FakeServer) -> None:
        server.log_file.write_text("why it ended")
        if len(started) == 31:
            os.kill(os.getpid(), signal.SIGTERM)
        if not outcome and len(started) > 1:
            raise ServeError("no GPU")

    def next_server(*_: object, **options: object) -> FakeServer:
        server = FakeServer(history, **options)
        server.log_file = tmp_path / f"{len(started)}.log"
        started.append(server.log_file)
        return server

    monkeypatch.setattr(FakeServer, "start", start)
    monkeypatch.setattr(supervision, "TritonServer", next_server)
    assert serve_engine(engine, restart=True, quiet=True) == 0
    assert sorted(tmp_path.iterdir()) == sorted(started[-11:])  # the last was alive


def test_a_log_that_the_caller_names_stays_however_often_the_engine_restarts(engine, history, monkeypatch, tmp_path):
    log = tmp_path / "log"
    log.write_text("mine")
    monkeypatch.setattr(FakeServer, "log_file", log)
    monkeypatch.setattr(FakeServer, "starts", [True] * 30 + [KeyboardInterrupt()])
    with pytest.raises(KeyboardInterrupt):
        serve_engine(engine, restart=True, quiet=True)
    assert log.read_text() == "mine"


def test_a_first_start_that_fails_is_an_error_also_with_restart(engine, history, monkeypatch) -> None:
    monkeypatch.setattr(FakeServer, "starts", [False])
    with pytest.raises(ServeError, match="8001"):
        serve_engine(engine, restart=True, quiet=True)
    assert history == ["start fails"]


def test_a_signal_ends_the_pause_before_the_next_try(engine, history, monkeypatch) -> None:
    monkeypatch.setattr(FakeServer, "starts", [True, False])

    def sleep(_: float) -> None:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        time.sleep(HANG_S)
        history.append("paused to the end")

    monkeypatch.setattr(supervision, "time", SimpleNamespace(sleep=sleep))
    assert serve_engine(engine, restart=True, quiet=True) == 0
    assert history[-1] == "start fails"


@contextmanager
def nobody_reads() -> Iterator[None]:
    """stdout and stderr are a pipe whose reader has gone, as under `serve --json | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as pipe:
        try:
            with redirect_stdout(pipe), redirect_stderr(pipe):
                yield
        finally:  # so that what was never read can be flushed
            with Path(os.devnull).open("wb") as nowhere:
                os.dup2(nowhere.fileno(), writer)


def test_a_server_restarts_though_nobody_reads_what_it_says(engine, history, monkeypatch) -> None:
    monkeypatch.setattr(FakeServer, "starts", [True, False, True, KeyboardInterrupt()])
    with pytest.raises(KeyboardInterrupt), nobody_reads():
        serve_engine(engine, restart=True)
    assert [event for event in history if "start" in event] == ["start", "start fails", "start", "start fails"]


@pytest.mark.parametrize("as_json", [True, False])
def test_a_start_counts_though_nobody_reads_its_urls(monkeypatch, engine, as_json: bool) -> None:
    """A restart was tried again for ever."""

    def serve(_, *, on_ready: Callable[[object], None], **options: object) -> int:
        on_ready(SimpleNamespace(engine=engine, grpc_url="localhost:1", http_url="", metrics_url="", pid=1))
        return 0

    monkeypatch.setattr(supervision, "serve_engine", serve)
    with pytest.raises(typer.Exit) as end, nobody_reads():
        serve_command(engine.path, as_json=as_json)
    assert end.value.exit_code == 0


def test_every_start_has_a_log_of_its_own(engine) -> None:
    """Servers of a supervisor come and go, and their addresses in memory come again."""
    assert len({TritonServer(engine).log_file for _ in range(6)}) == 6


def test_looks_are_frequent_enough() -> None:
    """Constants, since a busy machine takes longer; with a real server nothing but the order of events is held."""
    assert supervision._POLL_S + metrics.PERIOD_S < 2, "what the model says of its engine may be a look old"
    told_s = 2 * supervision._POLL_S + notice._POLL_S
    assert told_s < launch._EXIT_MARGIN_S, "who has told tritonserver to stop is found out before it cuts requests off"


# --- what ends the watch ------------------------------------------------------------------------------------------


@pytest.fixture
def watched(monkeypatch) -> Iterator[SimpleNamespace]:
    """A tritonserver and a stub that only sleep, whose endpoints answer with nothing but silence."""
    monkeypatch.setattr(supervision, "_POLL_S", 0.01)
    server, stub = (subprocess.Popen(["sleep", "600"]) for _ in range(2))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        yield SimpleNamespace(
            pid=server.pid,
            exit_code=server.poll,
            stub_pids=lambda: {stub.pid},
            metrics_url=url,
            http_url=url,
            stub=stub,
        )
    for process in (server, stub):
        process.kill()
        process.wait()


@pytest.mark.parametrize("which", ["tritonserver", "the model's process"])
def test_a_process_that_is_stopped_for_good_ends_the_watch(watched, which: str) -> None:
    """It holds all requests, and no connection of it breaks."""
    pid = watched.pid if which == "tritonserver" else watched.stub.pid
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED)  # or the first look asks one that does not answer, for four seconds
    assert watch(watched) == f"{which} (pid {pid}) was stopped and does not go on"
    wait_until(lambda: not is_alive(pid), what="its end, so that nobody waits for its requests")


def test_a_front_that_is_stopped_for_good_has_failed(watched) -> None:
    front = OpenAiFront()
    front._process = watched
    assert not any(front.failure() for _ in range(20))
    os.kill(watched.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, watched.pid, os.WSTOPPED)
    failures = [front.failure() for _ in range(16)]
    assert failures == [None] * 15 + ["the OpenAI front was stopped and does not go on"]


@pytest.mark.parametrize("code", [None, 134])
def test_the_log_of_a_front_that_has_ended_by_itself_is_kept_and_named(watched, code: int | None) -> None:
    """It is what says why; the server's does not."""
    front = OpenAiFront()
    front._log_file.write_text("first words\nlast words\n")
    front._process = SimpleNamespace(pid=watched.pid, exit_code=lambda: code, stop=lambda: None)
    try:
        named = f"the OpenAI front ended with code 134: last words ({front._log_file})"
        assert front.failure() == (None if code is None else named)
        front.stop()
        assert front._log_file.exists() == (code is not None)
    finally:
        front._log_file.unlink(missing_ok=True)


def test_a_tritonserver_that_was_told_to_stop_hangs_up(watched) -> None:
    watched.http_url = served_once(b"")
    watched.metrics_url = served_once(b"HTTP/1.1 200 OK\r\n\r\npuzzle_engine_up 1\n")
    assert watch(watched) == "tritonserver was told to stop by somebody else"


def test_a_server_that_dies_is_not_taken_for_one_that_was_told_to_stop(watched) -> None:
    """Its connections break first, then it is gone, and a moment later its code is known."""
    watched.http_url = watched.metrics_url = served_once(b"")
    looks: list[None] = []

    def exit_code() -> int | None:
        looks.append(None)
        if len(looks) == 2:
            os.kill(watched.pid, signal.SIGKILL)
            os.waitid(os.P_PID, watched.pid, os.WEXITED | os.WNOWAIT)
        return 137 if len(looks) == 4 else None

    watched.exit_code = exit_code
    assert watch(watched) == "tritonserver ended with code 137"


def test_what_is_open_is_told_whatever_ends_a_server_that_lives(engine, history, monkeypatch) -> None:
    monkeypatch.setattr(FakeServer, "exit_code", lambda self: None)
    monkeypatch.setattr(supervision, "watch", lambda *_: "the OpenAI front ended with code 1")
    assert serve_engine(engine, beside=FakeFront(history), quiet=True) == 1
    assert history == ["start", "front start", "keep log", "drain", "stop", "front stop"]


@pytest.mark.parametrize(
    ("answer", "hung_up"), [(b"", True), (b"HTTP/1.1 503 Busy\r\n\r\n", False), (b"not http\r\n\r\n", False)]
)
def test_to_hang_up_is_to_say_nothing(answer: bytes, hung_up: bool) -> None:
    assert hangs_up(served_once(answer)) == hung_up


def test_nobody_there_is_hung_up_too_and_somebody_busy_is_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        url = f"http://127.0.0.1:{busy.getsockname()[1]}/"
        assert not hangs_up(url, timeout_s=0.1)
    assert hangs_up(url)


HALF_ANSWERS = [
    b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\npuzzle_engine_up 1\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10\r\nabc",
    b"not http\r\n\r\n",
    b"",
]


@pytest.mark.parametrize("answer", HALF_ANSWERS)
def test_half_an_answer_is_no_metrics(answer: bytes) -> None:
    assert read_metrics(served_once(answer)) is None


def test_an_answer_that_is_not_http_is_no_status() -> None:
    assert http_status(served_once(b"not http\r\n\r\n")) is None


def served_once(answer: bytes) -> str:
    """The URL of a server that says these bytes and is gone."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with listener, listener.accept()[0] as connection:
            connection.recv(4096)
            connection.sendall(answer)

    threading.Thread(target=serve, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}/metrics"
