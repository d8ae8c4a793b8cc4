"""Servers that MPI started: who serves, who works, and which variables survive; with a real mpirun and tritonserver."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from puzzle_trtllm.engine import Engine
from puzzle_trtllm.errors import ServeError
from puzzle_trtllm.serve.client.triton_client import generate
from puzzle_trtllm.serve.triton.host import start_llm
from puzzle_trtllm.serve.triton.ranks import MpiJob, mpi_job, role_of
from puzzle_trtllm.serve.triton.settings import ModelSettings, TritonConfig
from tests.serve.scripted import HANG_S, scripted_engine, wait_until

HERE = Path(__file__).parent
MPIRUN = Path(sys.executable).parent / "mpirun"
LAUNCHED = {"TLLM_SPAWN_PROXY_PROCESS": "1", "TLLM_SPAWN_PROXY_PROCESS_IPC_ADDR": "ipc:///tmp/x", "tllm_mpi_size": "2"}
"""What trtllm-llmapi-launch leaves to the command it runs on rank 0."""


def ompi(rank: int, size: int) -> dict[str, str]:
    return {"OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_SIZE": str(size)}


# --- who is what --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "job"),
    [
        ({}, None),
        (ompi(3, 8), MpiJob(rank=3, size=8)),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, MpiJob(rank=0, size=2)),
        ({"PMIX_RANK": "5", "SLURM_STEP_NUM_TASKS": "16"}, MpiJob(rank=5, size=16)),
        # The script of an sbatch job is no rank, whatever the job asked for.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None),
        ({"OMPI_COMM_WORLD_RANK": "0"}, None),
    ],
)
def test_the_job_that_the_environment_tells_of(environment, job):
    assert mpi_job(environment) == job


@pytest.mark.parametrize(
    ("environment", "role"),
    [
        ({}, "alone"),
        (ompi(0, 1), "alone"),
        (ompi(0, 2), "leader"),
        (ompi(1, 2), "worker"),
        ({**ompi(0, 2), **LAUNCHED}, "alone"),
        ({**ompi(1, 7), **LAUNCHED}, "alone"),
    ],
)
def test_the_part_of_a_process(environment, role):
    assert role_of({"tensor_parallel_size": 2}, environment) == role


def test_a_job_of_another_size_is_one_clear_line():
    with pytest.raises(ServeError, match=r"^MPI ranks: one rank a GPU .* .found 4, expected 2 or 1.$"):
        role_of({"tensor_parallel_size": 2}, ompi(0, 4))
    with pytest.raises(ServeError, match="several instances are for one server"):
        role_of({"tensor_parallel_size": 2}, ompi(0, 2), num_instances=2)


class TestEnvironmentOfTheLlm:
    """What is left when the LLM is made, by who started the server."""

    @pytest.fixture
    def seen(self, tmp_path, monkeypatch):
        (tmp_path / "seeing_runtime.py").write_text(
            "import os\nclass SamplingParams: ...\n"
            "class LLM:\n    def __init__(self, **arguments): self.seen, self.arguments = dict(os.environ), arguments\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        for name in [*LAUNCHED, *ompi(0, 1), "PMIX_RANK", "PMIX_MCA_gds", "OMPI_MCA_btl"]:
            monkeypatch.setenv(name, "before")

        def start(environment):
            for name, value in environment.items():
                monkeypatch.setenv(name, value)
            triton = TritonConfig(runtime="tensorrt_llm", runtime_module="seeing_runtime")
            llm, _ = start_llm(ModelSettings(llm_args={"model": "m", "tensor_parallel_size": 2}, triton=triton))
            return llm

        return start

    @pytest.mark.parametrize("environment", [ompi(0, 1), {**ompi(0, 2), **LAUNCHED}])
    def test_a_job_not_its_own_is_gone_and_settings_and_the_launchers_address_stay(self, seen, environment):
        llm = seen({"PMIX_RANK": "0", "TLLM_SPAWN_PROXY_PROCESS": "0", **environment})
        gone = {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "PMIX_RANK"}
        assert not gone & set(llm.seen)
        assert {"OMPI_MCA_btl", "PMIX_MCA_gds", *LAUNCHED} <= set(llm.seen)
        assert "_mpi_session" not in llm.arguments

    def test_a_worker_under_tritonserver_works_first_and_never_becomes_ready(self, seen, monkeypatch):
        worked = []
        monkeypatch.setattr("puzzle_trtllm.serve.triton.host.work_for_leader", lambda: worked.append(dict(os.environ)))
        with pytest.raises(ServeError, match="this rank was a worker, and its leader has ended"):
            seen({**ompi(1, 2), "TLLM_SPAWN_PROXY_PROCESS": "0"})
        assert worked[0]["OMPI_COMM_WORLD_RANK"] == "1", "MPI needs the job's variables here"


# --- mpirun -------------------------------------------------------------------------------------------------------


@pytest.fixture
def ranked_engine(make_checkpoint, tmp_path) -> Engine:
    """An engine of two GPUs, for TensorRT-LLM as far as the launch is concerned."""
    shares = {"TRTLLM_WINDOW_SIZE_SHARES": "0.25,0.75"}
    engine = scripted_engine(
        tmp_path / "engine", make_checkpoint([(4, None), (2, 16)]), tensor_parallel_size=2, env_overrides=shares
    )
    manifest = json.loads((engine.path / "engine.json").read_text())
    (engine.path / "engine.json").write_text(json.dumps({**manifest, "runtime": "tensorrt_llm"}))
    plugin = engine.path / "plugin" / "puzzle_trtllm_plugin"
    plugin.mkdir(parents=True)
    (plugin / "__init__.py").write_text("NAME = 'plugin'\n")
    return engine


@pytest.fixture
def environment(tmp_path):
    """Modules for the ranks: the runtimes of the tests, and TensorRT-LLM's session under its own name."""
    package = tmp_path / "packages" / "tensorrt_llm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "llmapi.py").write_text("from ranked_runtime import MpiCommSession\n")
    path = os.pathsep.join([str(HERE), str(package.parent)])
    return {**os.environ, "PYTHONPATH": path, "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}


SERVE = """
import sys
from puzzle_trtllm.serve.triton.server import serve_engine
code = serve_engine(sys.argv[1], grpc_port=0, http_port=0, metrics_port=0, runtime_module="ranked_runtime",
                    on_ready=lambda server: print(f"ready at {server.grpc_url}.", flush=True))
print("ended", code, flush=True)
sys.exit(code)
"""


@pytest.fixture
def job(ranked_engine, environment, tmp_path):
    """`mpirun -n 2` of one start command; (process, grpc URL, log, the pids of its ranks)."""
    script, log = tmp_path / "serve.py", tmp_path / "log"
    script.write_text(SERVE)
    command = [MPIRUN, "--allow-run-as-root", "-n", "2", "--bind-to", "none", sys.executable, script]
    with log.open("w") as out:
        process = subprocess.Popen(
            [*map(str, command), str(ranked_engine.path)],
            env=environment,
            stdout=out,
            stderr=out,
        )
    try:
        ready = re.compile(r"ready at (\S+)\.$", re.MULTILINE)
        wait_until(lambda: ready.search(log.read_text()) or process.poll() is not None, what="ready")
        assert process.poll() is None, log.read_text()
        yield process, ready.search(log.read_text())[1], log, lambda: pids_of_ranks(script)
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(timeout=HANG_S)


def test_rank_0_serves_what_all_ranks_compute_and_a_stop_ends_all(job):
    process, url, log, ranks = job
    assert generate("ranks", url=url).text == "0:0.25,0.75:plugin 1:0.25,0.75:plugin"
    os.kill(ranks()[0], signal.SIGTERM)
    assert process.wait(timeout=HANG_S) == 0, log.read_text()
    assert log.read_text().count("ended 0") == 2, "the worker's rank ends when the leader's session does"


def test_a_worker_that_dies_ends_the_job(job):
    process, _, _, ranks = job
    os.kill(ranks()[1], signal.SIGKILL)
    assert process.wait(timeout=HANG_S) != 0
    wait_until(lambda: not ranks(), what="no rank left")


def pids_of_ranks(script: Path) -> dict[int, int]:
    """Rank: process that runs the script."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_text(errors="replace").split("\0")
            variables = (entry / "environ").read_text(errors="replace").split("\0")
        except OSError:
            continue
        # One that is about to end has none of them any more.
        ranks = [value for value in variables if value.startswith("OMPI_COMM_WORLD_RANK=")]
        if command[:2] == [sys.executable, str(script)] and ranks:
            found[int(ranks[0].partition("=")[2])] = int(entry.name)
    return found
