"""How a served engine starts, dies and stops: what a person sees, and that nothing is left behind.

Each test that needs a tritonserver of its own starts one (3 to 6 seconds), so there are few.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from puzzle_trtllm.errors import ServeError
from puzzle_trtllm.process_states import children_of, is_alive
from puzzle_trtllm.serve.client.request import GenerationRequest
from puzzle_trtllm.serve.client.triton_client import TritonLlmClient, generate
from puzzle_trtllm.serve.triton import install, launch
from puzzle_trtllm.serve.triton.install import find_triton
from puzzle_trtllm.serve.triton.launch import python_path
from puzzle_trtllm.serve.triton.log import find_reason
from puzzle_trtllm.serve.triton.server import TritonServer, serve_engine
from tests.serve.scripted import HANG_S, SCRIPTED, metric, scripted_engine, short_lived, wait_until
from tests.serve.serving import Serving

LONG_DRAIN_S = 600.0
"""What requests get where a server that has died must not wait for them: `serve` would take longer than HANG_S."""


@pytest.fixture(scope="module")
def engine(make_checkpoint, tmp_path_factory):
    checkpoint = make_checkpoint([(4, None), (2, 16)])
    return scripted_engine(tmp_path_factory.mktemp("scripted") / "engine", checkpoint, step_ms=5)


@pytest.fixture
def serving(engine, monkeypatch, tmp_path: Path) -> Iterator:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where the logs of servers that died are kept
    started: list[Serving] = []

    def start(how: str = "once", **options) -> Serving:
        started.append(Serving(engine, how, **SCRIPTED, **options))
        return started[-1]

    yield start
    for each in started:
        each.end()


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


async def stream_until_it_breaks(url: str, break_it) -> ServeError:
    """Read a stream, call `break_it` after its first chunk, return how it ended."""
    async with TritonLlmClient(url) as client:
        with pytest.raises(ServeError) as error:
            async for chunk in client.stream(GenerationRequest(prompt="hello ", max_tokens=100_000)):
                if break_it is not None and chunk.text:
                    break_it()
                    break_it = None
    return error.value


def test_an_engine_that_dies_in_mid_stream_answers_unavailable_and_serve_exits_1(serving) -> None:
    running = serving(drain_s=LONG_DRAIN_S)
    url = running.wait_ready()["url"]
    error = asyncio.run(stream_until_it_breaks(url, lambda: os.kill(running.engine_pid, signal.SIGKILL)))
    assert error.status == "UNAVAILABLE" and "the engine is dead" in str(error)
    assert running.process.wait(timeout=HANG_S) == 1
    running.assert_all_gone()


def test_a_stub_that_dies_in_mid_stream_ends_the_stream_and_serve_exits_1(serving) -> None:
    """Triton itself would leave the stream open for ever; ending the server ends it."""
    running = serving(drain_s=LONG_DRAIN_S)
    url = running.wait_ready()["url"]
    error = asyncio.run(stream_until_it_breaks(url, lambda: os.kill(running.stub_pid, signal.SIGKILL)))
    assert error.status == "UNAVAILABLE"
    assert running.process.wait(timeout=HANG_S) == 1
    running.assert_all_gone()


def test_restart_serves_again_and_kill_9_leaves_nothing(serving) -> None:
    running = serving("restart")
    running.wait_ready()
    first = list(running.pids)
    os.kill(running.engine_pid, signal.SIGKILL)  # idle: nobody is there to notice but the watch
    url = running.wait_ready()["url"]
    assert generate("again", url=url, max_tokens=5).text == "again"
    assert not any(is_alive(pid) for pid in first)
    running.process.kill()
    running.assert_all_gone()


def test_a_guard_that_is_killed_leaves_no_stub_and_no_engine(serving) -> None:
    """They would hold the memory that a restart needs."""
    running = serving(drain_s=LONG_DRAIN_S)
    running.wait_ready()
    os.kill(parent_of(running.ready["pid"]), signal.SIGKILL)
    running.assert_all_gone()
    assert running.process.wait(timeout=HANG_S) == 1


def test_sigterm_stops_cleanly_with_exit_code_0(serving) -> None:
    running = serving()
    running.wait_ready()
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(timeout=HANG_S) == 0
    running.assert_all_gone()


def test_requests_that_outlast_the_stop_are_told_over_grpc_and_http(serving) -> None:
    running = serving(drain_s=1)
    running.wait_ready()
    asked = {"text_input": "hello ", "sampling_param_max_tokens": 100_000, "streaming": True, "stream_delta": True}
    body = json.dumps(asked).encode()
    with urllib.request.urlopen(f"{running.ready['http_url']}/v2/models/tensorrt_llm/generate_stream", body) as stream:
        stream.readline()
        stop = partial(running.process.send_signal, signal.SIGTERM)
        error = asyncio.run(stream_until_it_breaks(running.ready["url"], stop))
        events = [json.loads(line.removeprefix(b"data: ")) for line in stream if line.strip()]
    assert (error.status, "the server is stopping" in str(error)) == ("UNAVAILABLE", True)
    assert events[-1] == {"error": "UNAVAILABLE: the server is stopping"}
    assert running.process.wait(timeout=HANG_S) == 0
    running.assert_all_gone()


def test_a_server_imports_nothing_from_the_folder_where_it_was_started(engine, monkeypatch, tmp_path: Path) -> None:
    """Python's own modules have such names, and so have source trees: json, random, tensorrt_llm."""
    for name in ("json", "random", "secrets", "numpy", "yaml"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('the wrong one')\n")
    monkeypatch.chdir(tmp_path)
    with TritonServer(engine, **SCRIPTED) as server:
        assert generate("hello", url=server.grpc_url, max_tokens=5).text == "hello"


def test_folders_of_pythonpath_are_found_from_where_the_server_works(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"modules:{os.pathsep}/others")
    assert python_path({})["PYTHONPATH"].split(os.pathsep)[-2:] == [str(tmp_path / "modules"), "/others"]


def test_requests_of_a_server_that_somebody_else_stops_are_told_too(serving) -> None:
    """Before Triton cuts them off, for which it is given more than two seconds here: a busy machine takes longer."""
    running = serving(drain_s=1, arguments=[f"--exit-timeout-secs={HANG_S:.0f}"])
    running.wait_ready()
    stop = partial(os.kill, running.ready["pid"], signal.SIGTERM)
    error = asyncio.run(stream_until_it_breaks(running.ready["url"], stop))
    assert (error.status, "the server is stopping" in str(error)) == ("UNAVAILABLE", True)
    assert running.process.wait(timeout=HANG_S) == 1
    running.assert_all_gone()


def test_sigint_while_starting_is_no_failure(serving, tmp_path: Path) -> None:
    running = serving()
    wait_until(lambda: len(children_of(running.process.pid)) == 1, what="the guard's start")
    (guard,) = children_of(running.process.pid)
    wait_until(lambda: len(children_of(guard)) == 1, what="the server's start")
    running.pids = [guard, *children_of(guard)]
    running.process.send_signal(signal.SIGINT)
    assert running.process.wait(timeout=HANG_S) == 0
    running.assert_all_gone()
    assert list(tmp_path.iterdir()) == []


def test_a_signal_before_the_servers_pid_is_known_leaves_no_log(engine, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def interrupted(command: list[str], *, log_file: Path, **options: object) -> None:
        log_file.write_bytes(b"")
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "GuardedProcess", interrupted)
    with pytest.raises(KeyboardInterrupt):
        TritonServer(engine).start()
    assert list(tmp_path.iterdir()) == []


# --- what cannot start --------------------------------------------------------------------------------------------


def has_ipv6() -> bool:
    with suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


@pytest.mark.parametrize(
    "host", ["localhost", pytest.param("::1", marks=needs_ipv6), pytest.param("::", marks=needs_ipv6)]
)
def test_a_server_listens_on_names_and_on_ipv6(engine, host: str) -> None:
    """Triton's HTTP front knows no names, and each of its fronts writes IPv6 in a way of its own."""
    with short_lived(TritonServer(engine, host=host, startup_timeout_s=HANG_S, **SCRIPTED)) as server:
        assert generate("hello", url=server.grpc_url, max_tokens=5).text == "hello"
        wait_until(lambda: metric(server, "puzzle_engine_up") == 1, what="its metrics")


def fake_server(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A `tritonserver` on PATH that is not one."""
    file = folder / "bin" / "tritonserver"
    file.parent.mkdir()
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    monkeypatch.setattr(install, "CONTAINER_SERVER", folder / "nowhere")
    monkeypatch.setenv("PATH", f"{file.parent}:{os.environ['PATH']}")


def test_a_server_that_dies_at_start_shows_the_end_of_its_log(engine, tmp_path: Path, monkeypatch) -> None:
    fake_server(
        tmp_path, monkeypatch, "echo loading; echo 'error while loading shared libraries: libx.so' >&2; exit 127"
    )
    log_file = tmp_path / "logs" / "triton.log"
    with pytest.raises(ServeError, match=r"code 127.*\n.*loading\n.*libx\.so") as error:
        TritonServer(engine, log_file=log_file).start()
    assert str(error.value).startswith(str(log_file))


def test_a_server_that_is_never_ready_is_given_up(engine, tmp_path: Path, monkeypatch) -> None:
    fake_server(tmp_path, monkeypatch, "sleep 600")
    waits: list[float] = []
    server = TritonServer(engine, log_file=tmp_path / "log", startup_timeout_s=0.5, on_wait=waits.append)
    with pytest.raises(ServeError, match="not ready after"):
        server.start()
    assert waits == sorted(waits) and waits
    with pytest.raises(ServeError, match="not running"):
        assert server.pid


def test_a_model_that_is_killed_while_it_is_loaded_is_not_waited_for(make_checkpoint, tmp_path: Path) -> None:
    """As by a machine out of memory; Triton itself would wait for ever."""
    engine = scripted_engine(tmp_path / "engine", make_checkpoint([(4, None), (2, 16)]), endless=True)

    def kill(waited_s: float) -> None:
        for pid in server.stub_pids():
            os.kill(pid, signal.SIGKILL)

    server = TritonServer(engine, log_file=tmp_path / "log", startup_timeout_s=HANG_S, on_wait=kill, **SCRIPTED)
    with pytest.raises(ServeError, match="the model's process died while it was loaded"):
        server.start()


def test_a_stub_between_its_end_and_its_burial_is_no_dead_model(engine, monkeypatch) -> None:
    """Triton ends one to complete the configuration; a machine may stand still for longer than a dead one gets."""
    now_s = [0.0]
    alive, ready = iter([True, False, True]), iter([False, False, False, True])
    server = TritonServer(engine)
    monkeypatch.setattr(launch, "time", SimpleNamespace(monotonic=lambda: now_s[0], sleep=lambda _: None))
    monkeypatch.setattr(launch, "is_alive", lambda pid: next(alive))
    monkeypatch.setattr(server, "_on_wait", lambda _: now_s.__setitem__(0, now_s[0] + 100))
    monkeypatch.setattr(server, "is_ready", lambda: next(ready))
    monkeypatch.setattr(server, "exit_code", lambda: None)
    monkeypatch.setattr(server, "stub_pids", lambda: {1})
    server._wait_until_ready()
    assert now_s == [300.0]


def test_an_engine_whose_runtime_is_not_installed_says_so(engine, make_checkpoint, tmp_path: Path) -> None:
    other = scripted_engine(tmp_path / "engine", make_checkpoint([(4, None), (2, 16)]))
    manifest = (other.path / "engine.json").read_text()
    (other.path / "engine.json").write_text(manifest.replace('"reference"', '"tensorrt_llm"'))
    with pytest.raises(ServeError, match="the runtime tensorrt_llm is not installed here") as error:
        serve_engine(other.path, grpc_port=0, http_port=0, metrics_port=0, log_file=tmp_path / "log", quiet=True)
    assert "\n" not in str(error.value)


def test_a_model_that_cannot_complete_its_config_says_why(engine, monkeypatch, tmp_path: Path) -> None:
    """Triton asks for that before `initialize`, and would show a traceback."""
    monkeypatch.setenv("LLM_CONFIG_PATH", "other.yaml")
    with pytest.raises(ServeError, match=r"other\.yaml: cannot be read: No such file or directory$"):
        TritonServer(engine, log_file=tmp_path / "log").start()


# --- finding a server ---------------------------------------------------------------------------------------------


def test_the_path_comes_before_the_wheel_and_needs_nothing_added(tmp_path: Path, monkeypatch) -> None:
    fake_server(tmp_path, monkeypatch, "true")
    found = find_triton()
    assert (found.source, found.server, found.environment) == ("PATH", tmp_path / "bin" / "tritonserver", {})
    assert found.arguments(tmp_path / "scratch") == [] and not (tmp_path / "scratch").exists()


def test_the_container_comes_before_the_path(tmp_path: Path, monkeypatch) -> None:
    fake_server(tmp_path, monkeypatch, "true")
    monkeypatch.setattr(install, "CONTAINER_SERVER", tmp_path / "bin" / "tritonserver")
    assert find_triton().source == "container"


@pytest.fixture
def only_wheel(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(install, "CONTAINER_SERVER", tmp_path / "nowhere")
    monkeypatch.setattr(install.shutil, "which", lambda name: None)


def test_the_wheels_backend_is_put_together_for_this_python(only_wheel, tmp_path: Path) -> None:
    found = find_triton()
    assert found.source == "wheel" and found.server.is_file()
    (option, folder) = found.arguments(tmp_path)
    assert option == "--backend-directory"
    stub = (Path(folder) / "python" / "triton_python_backend_stub").resolve()
    assert stub.parent.name == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert (Path(folder) / "python" / "libtriton_python.so").is_file()
    assert found.environment["PATH"].split(":")[0] == str(Path(sys.executable).parent)


def test_an_editable_install_that_would_kill_the_wheels_stub_is_refused(only_wheel, monkeypatch, tmp_path) -> None:
    package = tmp_path / "pytriton"
    shutil.copytree(find_triton().wheel, package / "tritonserver", copy_function=os.symlink)
    monkeypatch.setattr(install.importlib.util, "find_spec", lambda name: Mock(submodule_search_locations=[package]))
    (tmp_path / "_editable_impl_puzzle_trtllm.pth").write_text("/home/juergen/puzzle")
    find_triton()
    (tmp_path / "_editable_impl_puzzle_trtllm.pth").write_text("/home/jürgen/puzzle")
    with pytest.raises(ServeError, match=r"puzzle_trtllm\.pth: Triton's Python stub reads only ASCII here"):
        find_triton()


def test_no_server_anywhere_says_how_to_get_one(only_wheel, monkeypatch) -> None:
    monkeypatch.setattr(install.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ServeError, match=r"no tritonserver found.*pip install"):
        find_triton()


def test_a_python_without_a_shared_library_is_named(only_wheel, monkeypatch) -> None:
    monkeypatch.setattr(install.sysconfig, "get_config_var", lambda key: "/nowhere" if key == "LIBDIR" else None)
    monkeypatch.setattr(install.sys, "base_prefix", "/nowhere")
    monkeypatch.setattr(install.Path, "is_file", lambda self: self.name == "tritonserver" and "pytriton" in self.parts)
    version = re.escape(f"{sys.version_info.major}.{sys.version_info.minor}")
    with pytest.raises(ServeError, match=rf"libpython{version}\.so\.1\.0 not found.*the package libpython{version}"):
        find_triton()


def test_a_wheel_without_a_stub_for_this_python(only_wheel, monkeypatch, tmp_path: Path) -> None:
    found = find_triton()
    monkeypatch.setattr(install.sys, "version_info", type("V", (), {"major": 3, "minor": 99}))
    with pytest.raises(ServeError, match=r"no stub for this Python \(found 3\.99, expected .*3\.11"):
        found.arguments(tmp_path)


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (
            'I1123 14:42:10 1 pb_stub.cc:366] "TritonModelException: cannot start: no such file\\n\\nAt:\\n /x"\n',
            "no such file",
        ),
        (
            'I1123 14:42:10 1 a.cc:1] "fine"\nE1123 14:42:11 1 main.cc:2] "failed to start HTTP"\n',
            "failed to start HTTP",
        ),
        (
            'E1123 1 server.cc:241] "CudaDriverHelper has not been initialized."\nE1123 1 main.cc:2] "no"\n',
            "no",
        ),
        ("nothing that helps\n", None),
    ],
)
def test_the_reason_is_found_in_the_log(log: str, reason: str | None) -> None:
    assert find_reason(log) == reason
