"""The front as a process of its own beside tritonserver: started when the model is ready, watched, ended with it."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
import uuid
from pathlib import Path

from puzzle_trtllm.cores import run_on
from puzzle_trtllm.errors import ServeError
from puzzle_trtllm.process_states import StoppedProcesses
from puzzle_trtllm.serve.triton.launch import TritonServer, python_path
from puzzle_trtllm.serve.triton.ports import choose_ports, reachable, reserve_port
from puzzle_trtllm.serve.triton.probe import http_status
from puzzle_trtllm.serve.triton.process import GuardedProcess

_POLL_S = 0.1
_STARTUP_S = 120.0
_GRACE_S = 5.0


class OpenAiFront:
    """What `serve_engine` runs beside the server (its `beside`). Port 0 means a free one."""

    def __init__(
        self, *, host: str = "127.0.0.1", port: int = 0, model: str | None = None, secret_file: Path | None = None
    ) -> None:
        """model: what clients call it (default: the folder's name). secret_file: API key, and Triton's secret."""
        self._host = host
        self._wanted_port = port
        self._model = model
        self._secret_file = secret_file
        self._port = 0
        self._process: GuardedProcess | None = None
        self._stopped = StoppedProcesses()
        self._log_file = Path(tempfile.gettempdir()) / f"puzzle-openai-{uuid.uuid4().hex[:12]}.log"

    @property
    def url(self) -> str:
        """`base_url` of OpenAI's clients."""
        return f"http://{reachable(self._host, self._port)}/v1"

    def check(self) -> None:
        """Raises ServeError for a port in use."""
        choose_ports(self._host, {"OpenAI": self._wanted_port})

    def start(self, server: TritonServer) -> None:
        """Start in front of a ready server; returns when it answers. Raises ServeError when it does not."""
        with reserve_port(self._host, self._wanted_port, "OpenAI") as self._port:
            self._process = self._launch(server)
            self._wait_until_ready()

    def _launch(self, server: TritonServer) -> GuardedProcess:
        scratch = Path(tempfile.mkdtemp(prefix="puzzle-openai-")).absolute()
        command = [sys.executable, "-m", "puzzle_trtllm.serve.openai", str(server.engine.path)]
        command += ["--grpc-url", server.grpc_url, "--metrics-url", server.metrics_url]
        command += ["--host", self._host, "--port", str(self._port)]
        command += ["--model", self._model] if self._model else []
        command += ["--secret", str(self._secret_file.resolve())] if self._secret_file else []
        try:
            with run_on(server.cores):
                return GuardedProcess(
                    command,
                    environment=python_path({}),
                    log_file=self._log_file,
                    grace_s=_GRACE_S,
                    shm_prefix=f"puzzle_openai_{uuid.uuid4().hex[:12]}_",
                    scratch=scratch,
                )
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise

    def _wait_until_ready(self) -> None:
        began_s = time.monotonic()
        while http_status(f"{self.url.removesuffix('/v1')}/health") != 200:
            failure = self.failure()
            if failure is None and time.monotonic() - began_s > _STARTUP_S:
                failure = f"the OpenAI front was not ready after {_STARTUP_S:.0f} s"
            if failure is not None:
                self.stop()
                raise ServeError(failure)
            time.sleep(_POLL_S)

    def failure(self) -> str | None:
        """Why it has ended by itself, with its last words, or was given up; None while it runs."""
        if self._process is None:
            return None
        code = self._process.exit_code()
        if code is None:
            given_up = self._stopped.given_up(self._process.pid)
            return "the OpenAI front was stopped and does not go on" if given_up else None
        lines = self._log_file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        words = f": {lines[-1]}" if lines else ""
        return f"the OpenAI front ended with code {code}{words} ({self._log_file})"

    def stop(self) -> None:
        """End it: open answers get a moment to finish. The log of one that has ended by itself is kept."""
        if self._process is not None:
            process, self._process = self._process, None
            ended = process.exit_code() is not None
            process.stop()
            if not ended:
                self._log_file.unlink(missing_ok=True)
