"""`serve` as a process that tests may kill parts of."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from puzzle_trtllm.engine import Engine
from puzzle_trtllm.process_states import children_of, is_alive
from tests.serve.scripted import wait_until

ROOT = Path(__file__).parents[2]


class Serving:
    """`serve_engine` in a process of its own, as a person runs it; it prints one JSON line when ready."""

    SCRIPT = """
import json, sys
from puzzle_trtllm.serve.triton import notice
from puzzle_trtllm.serve.triton.server import serve_engine

notice._MARGIN_S = 60.0  # a model may be slow to say that its requests have ended, on a busy machine

def ready(server):
    facts = {"url": server.grpc_url, "http_url": server.http_url, "pid": server.pid}
    facts["stubs"] = sorted(server.stub_pids())
    print(json.dumps(facts), flush=True)

sys.exit(serve_engine(sys.argv[1], grpc_port=0, http_port=0, metrics_port=0, restart=sys.argv[2] == "restart",
                      on_ready=ready, **json.loads(sys.argv[3])))
"""

    def __init__(self, engine: Engine, how: str = "once", **options: Any) -> None:
        """`how`: once | restart; `options` are serve_engine's."""
        command = [sys.executable, "-c", self.SCRIPT, str(engine.path), how, json.dumps(options)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def wait_ready(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "serve_engine ended before it was ready"
        self.ready = json.loads(line)
        (self.stub_pid,) = self.ready["stubs"]
        (self.engine_pid,) = children_of(self.stub_pid)
        self.pids = [self.ready["pid"], self.stub_pid, self.engine_pid]
        return self.ready

    def assert_all_gone(self) -> None:
        wait_until(lambda: not any(is_alive(pid) for pid in self.pids), what="server, stub and engine ended")

    def end(self) -> None:
        """Whatever it is doing."""
        assert self.process.stdout is not None
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
