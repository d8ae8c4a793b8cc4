"""Which part a process has when MPI started it: three ways to an engine's workers.

    alone     one server; `LLM` spawns its workers itself, or finds those of trtllm-llmapi-launch, which runs the server
              on rank 0 with the job's variables removed and TLLM_SPAWN_PROXY_PROCESS=1
    leader    rank 0 of `mpirun -n N puzzle-trtllm serve ENGINE`: serves, and hands the job to `LLM` as its session
    worker    the other ranks: they run what the leader's `LLM` sends, until it ends

The last two are the leader mode of NVIDIA's llmapi model: one start command on every rank, also with N tritonservers on
one generated repository (`mpirun -n N tritonserver ...`, where workers never become ready). N is the engine's number of
GPUs. The variables of a job that is not the engine's must go before `LLM` spawns workers: they would join it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from puzzle_trtllm.errors import ServeError

Role = Literal["alone", "leader", "worker"]

LAUNCHER = "TLLM_SPAWN_PROXY_PROCESS"
"""Set to 1 by trtllm-llmapi-launch: ranks are its own."""
_RANK_AND_SIZE = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("PMIX_RANK", "SLURM_STEP_NUM_TASKS"),
)
"""As Open MPI's mpirun, MPICH's and `srun --mpi=pmi2`, and `srun --mpi=pmix` set them."""
_JOB_PREFIXES = (
    "OMPI_COMM_WORLD_",
    "OMPI_UNIVERSE_SIZE",
    "OMPI_FIRST_RANKS",
    "OMPI_APP_CTX_",
    "OMPI_MCA_orte_",
    "ORTE_",
    "PMIX_",
    "PMI_",
)
_SETTINGS_PREFIX = "PMIX_MCA_"


@dataclass(frozen=True, kw_only=True)
class MpiJob:
    """The job that a process belongs to, as its environment says."""

    rank: int
    size: int


def mpi_job(environment: Mapping[str, str]) -> MpiJob | None:
    """The job of this process, or None where nothing tells of one."""
    for rank, size in _RANK_AND_SIZE:
        if environment.get(rank, "").isdecimal() and environment.get(size, "").isdecimal():
            return MpiJob(rank=int(environment[rank]), size=int(environment[size]))
    return None


def role_of(llm_args: Mapping[str, Any], environment: Mapping[str, str], *, num_instances: int = 1) -> Role:
    """The part of this process in serving an engine. Raises ServeError for a job of another size than the engine."""
    job = mpi_job(environment)
    if job is None or job.size == 1 or environment.get(LAUNCHER) == "1":
        return "alone"
    num_gpus = int(llm_args.get("tensor_parallel_size") or 1)
    if num_instances > 1:
        raise ServeError("several instances are for one server, not for ranks", key="MPI ranks", found=job.size)
    if job.size != num_gpus:
        raise ServeError(
            "one rank a GPU of the engine, or one alone", key="MPI ranks", found=job.size, expected=f"{num_gpus} or 1"
        )
    return "leader" if job.rank == 0 else "worker"


def scrub_mpi_job(environment: MutableMapping[str, str]) -> list[str]:
    """Remove the variables that tie a process to a running MPI job; settings (OMPI_MCA_*, PMIX_MCA_*) stay.

    Returns the names removed.
    """
    names = [name for name in environment if name.startswith(_JOB_PREFIXES) and not name.startswith(_SETTINGS_PREFIX)]
    for name in names:
        del environment[name]
    return names


def leader_session() -> Any:
    """TensorRT-LLM's session on the whole job, for `LLM(_mpi_session=...)`; on rank 0 only."""
    from mpi4py.MPI import COMM_WORLD
    from tensorrt_llm.llmapi import MpiCommSession

    return MpiCommSession(comm=COMM_WORLD, n_workers=COMM_WORLD.Get_size())


def work_for_leader() -> None:
    """Run what the leader sends, until its session ends. Raises ServeError where MPI counts otherwise."""
    from mpi4py.futures import MPICommExecutor
    from mpi4py.MPI import COMM_WORLD

    with MPICommExecutor(COMM_WORLD) as executor:
        if executor is not None:
            raise ServeError("MPI calls this rank the first of its job", key="MPI ranks", found=COMM_WORLD.Get_size())


def leave_job() -> None:
    """On the leader, once its session has ended: finalize MPI, or mpirun calls the whole job a failure.

    Triton's stub ends without running Python's exit handlers, which would do it elsewhere.
    """
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi_job(os.environ) is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()


def serve_as_worker(engine_path: Path, llm_args: Mapping[str, Any], plugin: Path) -> bool:
    """On a worker's rank: work until the leader ends, and return True; elsewhere False at once.

    No server is needed there. The plugin is imported first, so that the leader's model class can be unpickled.
    """
    if role_of(llm_args, os.environ) != "worker":
        return False
    from puzzle_trtllm.serve.runtimes import set_environment
    from puzzle_trtllm.serve.triton.plugin import import_plugin

    set_environment(llm_args)
    if (engine_path / plugin).is_dir():
        import_plugin(engine_path / plugin)
    work_for_leader()
    return True
