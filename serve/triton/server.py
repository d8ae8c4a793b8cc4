"""`serve` at a terminal: keep one engine served, and notice when it dies.

Triton does not restart a dead stub of a decoupled model and keeps calling the model ready, so the watch is from
outside: the server process, the stub processes, and the model's own word about its engine (puzzle_engine_up, set by
the stub, which outlives the engine). Death is noticed within about two seconds, a process that was stopped (SIGSTOP)
and does not go on after eight; then the server is stopped, and the caller exits 1 so that whoever supervises us
restarts, or we start anew ourselves with `restart`. A tritonserver that somebody else has told to stop hangs up on all
new HTTP connections, and later cuts off what is open: before that the model is told, as if we had been asked to stop.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from puzzle_trtllm.engine import PLUGIN_FOLDER, Engine
from puzzle_trtllm.errors import PuzzleError
from puzzle_trtllm.process_states import StoppedProcesses, is_alive
from puzzle_trtllm.serve.triton.launch import TritonServer
from puzzle_trtllm.serve.triton.probe import hangs_up, read_metrics, values_of
from puzzle_trtllm.serve.triton.ranks import serve_as_worker

__all__ = ["TritonServer", "serve_engine", "watch"]

_POLL_S = 0.5
_RESTART_PAUSE_S = 5.0
"""After a start that failed, before the next."""
_KEPT_LOGS = 10
"""Of servers that died or did not start: with `restart` there may be one every few seconds, for days."""

OnReady = Callable[[TritonServer], None]
Say = Callable[[str], None]


class _StopAskedError(BaseException):
    """SIGINT, SIGTERM or SIGHUP arrived."""


class Beside(Protocol):
    """A process that lives and dies with the server: started when the server is ready, stopped before it, but after
    the last request.

    After a death it is stopped last, so that it can still tell its clients.
    """

    def check(self) -> None:
        """Raises ServeError for what is known to go wrong, before the engine is loaded for minutes."""

    def start(self, server: TritonServer) -> None: ...
    def failure(self) -> str | None: ...
    def stop(self) -> None: ...


def serve_engine(
    engine: Engine | str | Path,
    *,
    grpc_port: int = 8001,
    http_port: int = 8000,
    metrics_port: int = 8002,
    host: str = "127.0.0.1",
    restart: bool = False,
    on_ready: OnReady | None = None,
    beside: Beside | None = None,
    quiet: bool = False,
    **server_options: Any,
) -> int:
    """Serve until SIGINT, SIGTERM or SIGHUP: exit code 0; 1 when the engine or the server dies, unless `restart`.

    On a rank of an MPI job that is not the first it is a worker, and returns when the leader has ended (ranks.py). Call
    it from the main thread. `on_ready` is called after every start. `beside` is started with the server, and its death
    ends the server too. Raises ServeError when one of them does not start the first time; a restart is tried again. The
    logs of the last ten servers that died or did not start are kept.
    """
    say = _silent if quiet else _say
    engine = engine if isinstance(engine, Engine) else Engine.open(engine)
    if engine.manifest.runtime == "tensorrt_llm" and serve_as_worker(engine.path, engine.llm_args, PLUGIN_FOLDER):
        return 0

    def new_server() -> TritonServer:
        return TritonServer(
            engine,
            grpc_port=grpc_port,
            http_port=http_port,
            metrics_port=metrics_port,
            host=host,
            on_wait=_progress(say),
            **server_options,
        )

    with _first_signal_raises(), suppress(_StopAskedError):
        _serve_on(new_server, beside, on_ready, say, restart=restart)
        return 1
    return 0


def _serve_on(
    new_server: Callable[[], TritonServer], beside: Beside | None, on_ready: OnReady | None, say: Say, *, restart: bool
) -> None:
    """One server, with `restart` one after the other; returns when the last has ended by itself."""
    served, logs = False, deque[Path]()
    while True:
        server = new_server()
        _remember(server.log_file, logs)
        try:
            reason = _serve_once(server, beside, on_ready, say)
        except (PuzzleError, OSError) as error:
            if not served:
                raise
            say(f"not started, next try in {_RESTART_PAUSE_S:.0f} s: {error}")
            time.sleep(_RESTART_PAUSE_S)
            continue
        say(f"{reason}; the log is {server.log_file}")
        if not restart:
            return
        served = True
        say("starting again")


def _serve_once(server: TritonServer, beside: Beside | None, on_ready: OnReady | None, say: Say) -> str:
    """Returns the reason why it ended by itself."""
    if beside is not None:
        beside.check()
    server.start()
    try:
        say(f"serving {server.engine.path} at grpc {server.grpc_url}, {server.http_url}, {server.metrics_url}")
        say(f"Triton's log is {server.log_file}")
        if beside is not None:
            beside.start(server)
        if on_ready is not None:
            on_ready(server)
        reason = watch(server, beside)
    except _StopAskedError:
        say("stopping")
        server.drain()
        _stop(beside)
        server.stop()
        raise
    except BaseException:
        _stop(beside)
        server.stop(grace_s=1)
        raise
    server.keep_log()
    if server.exit_code() is None:
        server.drain()
    server.stop(grace_s=1)
    _stop(beside)
    return reason


def _remember(log: Path, logs: deque[Path]) -> None:
    """The log of the next server; the oldest of too many is removed (all are one file where the caller named it)."""
    if log not in logs:
        logs.append(log)
    if len(logs) > _KEPT_LOGS + 1:
        logs.popleft().unlink(missing_ok=True)


def _stop(beside: Beside | None) -> None:
    if beside is not None:
        beside.stop()


def watch(server: TritonServer, beside: Beside | None = None) -> str:
    """Block until the server, a stub, the engine or what runs beside it dies; returns which, in words."""
    stubs = server.stub_pids()
    stopped = StoppedProcesses()
    hang_ups = 0
    while True:
        code = server.exit_code()
        if code is not None:
            return f"tritonserver ended with code {code}"
        names = {server.pid: "tritonserver", **dict.fromkeys(stubs, "the model's process")}
        for pid, name in names.items():
            if pid in stubs and not is_alive(pid):
                return f"{name} (pid {pid}) died"
            if stopped.given_up(pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)  # or the requests would be given their time to end
                return f"{name} (pid {pid}) was stopped and does not go on"
        if not stopped.any_now:
            metrics = read_metrics(server.metrics_url)
            if metrics is not None and 0 in values_of(metrics, "puzzle_engine_up"):
                return "the engine died"
            hang_ups = hang_ups + 1 if hangs_up(f"{server.http_url}/v2/health/live") and is_alive(server.pid) else 0
            if hang_ups == 2:  # the first may be of a process that is about to be dead
                return "tritonserver was told to stop by somebody else"
        failure = None if beside is None else beside.failure()
        if failure is not None:
            return failure
        time.sleep(_POLL_S)


@contextmanager
def _first_signal_raises() -> Iterator[None]:
    """Later ones are ignored, so that nothing cuts the stop short; so is SIGHUP where it was before, as under nohup."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)

    def stop(number: int, frame: object) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise _StopAskedError

    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _progress(say: Say) -> Callable[[float], None]:
    """Say that we wait: after 5 s, then every 30 s (a large engine takes minutes)."""
    said_s = [-25.0]

    def on_wait(waited_s: float) -> None:
        if waited_s - said_s[0] >= 30:
            said_s[0] = waited_s
            say(f"starting, {waited_s:.0f} s so far")

    return on_wait


def _say(message: str) -> None:
    with suppress(OSError):  # whoever started us may have gone, and the server goes on
        print(message, file=sys.stderr, flush=True)


def _silent(message: str) -> None:
    pass
