"""tritonserver for one engine: started, waited for, stopped with everything it started.

    with TritonServer(engine) as server:          # free loopback ports
        generate("12+30=", url=server.grpc_url)

What keeps one running for a person at a terminal is `serve_engine` (server.py).
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import puzzle_trtllm
from puzzle_trtllm.cores import other_cores, run_on
from puzzle_trtllm.engine import Engine
from puzzle_trtllm.errors import ServeError
from puzzle_trtllm.process_states import children_of, is_alive
from puzzle_trtllm.serve.triton.contract import MODEL_NAME
from puzzle_trtllm.serve.triton.install import TritonInstall, find_triton
from puzzle_trtllm.serve.triton.log import explain_failure
from puzzle_trtllm.serve.triton.notice import give_notice
from puzzle_trtllm.serve.triton.ports import choose_ports, hold_ports, numeric_address, reachable
from puzzle_trtllm.serve.triton.probe import http_status
from puzzle_trtllm.serve.triton.process import GuardedProcess
from puzzle_trtllm.serve.triton.repository import write_repository
from puzzle_trtllm.serve.triton.security import GrpcTls, Restriction, closed_to_all

_POLL_S = 0.1
_DRAINED_GRACE_S = 6.0
"""For a server without requests: it still waits for connections that are only kept open."""
_EXIT_MARGIN_S = 3
"""What Triton leaves open requests beyond their drain time: told to stop by somebody else, it cuts them off then."""
_REAPED_LOOKS = 30
"""A stub that ended as it should is waited for at once; Triton waits for ever for one that died while loading. Looks
are counted, and no time is measured: the machine may stand still between two."""
_LOOPBACK = "127.0.0.1"


class TritonServer:
    """A running tritonserver that serves `engine`. Port 0 means a free one; `host` is what it listens on.

    Under `tls` gRPC speaks TLS, and HTTP, which cannot, listens on loopback only. Protocols that administer the server
    are closed unless `restriction` gives them to those with its secret.
    `repository_options` go to `write_repository`. Paths in `arguments` must be absolute, as the server works in a
    folder of its own. Without `log_file` the log lies in the temporary folder; it is removed after a clean stop and
    kept after a failure. `engine_cores` are the engine's alone (reference runtime): the server runs on the others, so
    that its threads never stand in the way of an engine that leaves a core free.
    """

    def __init__(
        self,
        engine: Engine | str | Path,
        *,
        host: str = "127.0.0.1",
        grpc_port: int = 0,
        http_port: int = 0,
        metrics_port: int = 0,
        log_file: Path | None = None,
        startup_timeout_s: float = 1800,
        drain_s: float = 10,
        environment: Mapping[str, str] | None = None,
        arguments: Sequence[str] = (),
        tls: GrpcTls | None = None,
        restriction: Restriction | None = None,
        engine_cores: Sequence[int] | None = None,
        on_wait: Callable[[float], None] | None = None,
        **repository_options: Any,
    ) -> None:
        """Nothing is started before `start` (or `with`). `on_wait` is called with the seconds waited so far.

        Raises PuzzleError for `engine_cores` that are not there, or leave none to the server.
        """
        self.engine = engine if isinstance(engine, Engine) else Engine.open(engine)
        self.cores: set[int] | None = None
        """Those of the server and of what runs beside it; None: all."""
        if engine_cores is not None:
            if self.engine.manifest.runtime != "reference":
                raise ServeError("only the reference runtime computes on CPU cores", key="engine_cores")
            self.cores = other_cores(engine_cores, key="engine_cores")
        self._engine_cores = engine_cores
        self.host = host
        self._wanted = {"HTTP": http_port, "gRPC": grpc_port, "metrics": metrics_port}
        self._ports: dict[str, int] = {}
        self._kept_log = log_file
        self._startup_timeout_s = startup_timeout_s
        self._drain_s = drain_s
        self._environment = dict(environment or {})
        self._arguments = list(arguments)
        self._tls = tls
        self._restrictions = [each for each in (restriction, closed_to_all(restriction)) if each is not None]
        self._http_host = host if tls is None else _LOOPBACK
        self._on_wait = on_wait or (lambda seconds: None)
        self._repository_options = repository_options
        self._process: GuardedProcess | None = None
        self._model_folder = Path()
        self._drained = False
        self.log_file = log_file or Path(tempfile.gettempdir()) / f"puzzle-triton-{uuid.uuid4().hex[:12]}.log"

    # --- life -------------------------------------------------------------------------------------------------------

    def start(self) -> TritonServer:
        """Start and wait until the model can take requests. Raises ServeError in one line when it cannot."""
        if self._tls is not None:
            self._tls.check()
        install = find_triton()
        with hold_ports(self.host, self._wanted) as self._ports:
            if self._http_host != self.host:
                choose_ports(self._http_host, {"HTTP": self._ports["HTTP"]})
            try:
                self._process = self._launch(install)
                self._wait_until_ready()
                self._process.hide([restriction.secret for restriction in self._restrictions])
            except BaseException as error:
                process, self._process = self._process, None
                if process is not None:
                    process.stop(grace_s=2)
                if not isinstance(error, Exception):  # a signal: nothing that the log has to explain
                    self._remove_log()
                raise
        return self

    def drain(self) -> None:
        """Have the model refuse new requests and end the open ones; they get the drain time, then UNAVAILABLE."""
        if self._process is not None and not self._drained:
            self._drained = True
            give_notice(self._model_folder, self._drain_s, self.stub_pids())

    def stop(self, *, grace_s: float | None = None) -> None:
        """Stop the server with everything that it started; without a grace time it is drained first.

        The wait is short even so: some servers never count a request as gone whose client cancelled it.
        """
        if self._process is None:
            return
        if grace_s is None:
            self.drain()
            grace_s = _DRAINED_GRACE_S
        process, self._process = self._process, None
        process.stop(grace_s=grace_s)
        self._remove_log()

    def keep_log(self) -> None:
        """Do not remove the log when stopping."""
        self._kept_log = self.log_file

    def _remove_log(self) -> None:
        if self._kept_log is None:
            self.log_file.unlink(missing_ok=True)

    def __enter__(self) -> TritonServer:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _launch(self, install: TritonInstall) -> GuardedProcess:
        """The server's process on the chosen ports, not yet ready."""
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        shm_prefix = f"puzzle_{uuid.uuid4().hex[:12]}_"
        scratch = Path(tempfile.mkdtemp(prefix="puzzle-triton-")).absolute()
        try:
            repository = write_repository(
                self.engine, scratch / "repository", engine_cores=self._engine_cores, **self._repository_options
            )
            self._model_folder, self._drained = repository / MODEL_NAME / "1", False
            command = [str(install.server), "--model-repository", str(repository), *install.arguments(scratch)]
            with run_on(self.cores):
                return GuardedProcess(
                    [*command, *self._options(shm_prefix), *self._arguments],
                    environment={**install.environment, **self._environment, **python_path(self._environment)},
                    log_file=self.log_file,
                    grace_s=self._drain_s + 5,
                    shm_prefix=shm_prefix,
                    scratch=scratch,
                )
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise

    def _wait_until_ready(self) -> None:
        began_s, looks_at_dead = time.monotonic(), 0
        while not self.is_ready():
            waited_s = time.monotonic() - began_s
            self._on_wait(waited_s)
            if self.exit_code() is not None:
                raise explain_failure(self.log_file, f"tritonserver ended while starting, code {self.exit_code()}")
            looks_at_dead = 0 if all(is_alive(pid) for pid in self.stub_pids()) else looks_at_dead + 1
            if looks_at_dead > _REAPED_LOOKS:
                raise explain_failure(self.log_file, "the model's process died while it was loaded")
            if waited_s > self._startup_timeout_s:
                raise explain_failure(self.log_file, f"tritonserver was not ready after {waited_s:.0f} s")
            time.sleep(_POLL_S)

    def _options(self, shm_prefix: str) -> list[str]:
        gpu_metrics = self.engine.manifest.runtime == "tensorrt_llm"
        # Its HTTP front knows no names: it would listen nowhere, without a word.
        address, http_address = numeric_address(self.host), numeric_address(self._http_host)
        options: dict[str, object] = {
            "http-address": f"ipv6:{http_address}" if ":" in http_address else http_address,
            "http-port": self._ports["HTTP"],
            "grpc-address": f"[{address}]" if ":" in address else address,
            "grpc-port": self._ports["gRPC"],
            "metrics-address": f"ipv6:{address}" if ":" in address else address,
            "metrics-port": self._ports["metrics"],
            "allow-gpu-metrics": str(gpu_metrics).lower(),
            "exit-timeout-secs": round(self._drain_s) + _EXIT_MARGIN_S,
            "backend-config": f"python,shm-region-prefix-name={shm_prefix}",
        }
        security = ([] if self._tls is None else [self._tls]) + self._restrictions
        return [
            f"--{name}={value}" for each in (options, *(s.options() for s in security)) for name, value in each.items()
        ]

    # --- what it is -------------------------------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        """Process id of tritonserver."""
        return self._running.pid

    @property
    def grpc_url(self) -> str:
        """host:port, as gRPC clients want it."""
        return reachable(self.host, self._ports["gRPC"])

    @property
    def http_url(self) -> str:
        return f"http://{reachable(self._http_host, self._ports['HTTP'])}"

    @property
    def metrics_url(self) -> str:
        return f"http://{reachable(self.host, self._ports['metrics'])}/metrics"

    def is_ready(self) -> bool:
        """Whether the model is loaded (it stays so when its engine dies: see server.py)."""
        return http_status(f"{self.http_url}/v2/models/{MODEL_NAME}/ready") == 200

    def exit_code(self) -> int | None:
        """None while the server runs."""
        return self._running.exit_code()

    def stub_pids(self) -> set[int]:
        """The server's child processes: one Python stub a model instance."""
        return children_of(self.pid)

    @property
    def _running(self) -> GuardedProcess:
        if self._process is None:
            raise ServeError("the server is not running")
        return self._process


def python_path(environment: Mapping[str, str]) -> dict[str, str]:
    """PYTHONPATH for the stub, absolute as it works in another folder; with our source tree, where that runs."""
    root = Path(puzzle_trtllm.__file__).resolve().parent.parent
    ours = [] if root.name in ("site-packages", "dist-packages") else [str(root)]
    before = environment.get("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    folders = [*ours, *(str(Path(folder).absolute()) for folder in before.split(os.pathsep) if folder)]
    return {"PYTHONPATH": os.pathsep.join(folders)} if folders else {}
