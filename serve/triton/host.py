"""Making the LLM inside Triton's stub: environment with its GPUs, plugin, runtime, in that order.

The order matters. MPI variables of a job that is not the engine's own (ranks.py) would make TensorRT-LLM's workers join
the wrong one, so they go first; `env_overrides` follow, because TensorRT-LLM sets them only in its workers. The plugin
registers the model class and must be imported before the LLM looks it up. And neither torch nor tensorrt_llm may be
imported before this runs: CUDA opens its devices at import, and workers spawned later inherit what was open
(https://github.com/NVIDIA/TensorRT-LLM, triton_backend/all_models/llmapi).
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from puzzle_trtllm.errors import ServeError
from puzzle_trtllm.serve.runtimes import check_installed, set_environment
from puzzle_trtllm.serve.runtimes.ending import ending_at_every_end
from puzzle_trtllm.serve.triton.instances import ONLY_INSTANCE, Instance, hide_other_gpus
from puzzle_trtllm.serve.triton.plugin import import_plugin
from puzzle_trtllm.serve.triton.ranks import Role, leader_session, role_of, scrub_mpi_job, work_for_leader
from puzzle_trtllm.serve.triton.settings import ModelSettings


def start_llm(settings: ModelSettings, instance: Instance = ONLY_INSTANCE) -> tuple[Any, Any]:
    """Make the LLM that model.yaml describes, on the instance's GPUs; returns it and what makes its SamplingParams.

    On a worker's rank it returns only by raising: ServeError, once the leader has ended. Raises EngineError when the
    runtime is not installed, and whatever the runtime raises when it cannot start.
    """
    triton, llm_args = settings.triton, dict(settings.llm_args)
    role: Role = "alone"
    if triton.runtime == "tensorrt_llm":
        role = role_of(llm_args, os.environ, num_instances=instance.count)
        if role == "alone":
            scrub_mpi_job(os.environ)
        set_environment(llm_args)
        if instance.gpu_ids is not None:
            llm_args["gpus_per_node"] = len(instance.gpu_ids)
    hide_other_gpus(instance, os.environ)
    if triton.plugin is not None:
        if triton.runtime_module is None:
            check_installed(triton.runtime)
        import_plugin(Path(triton.plugin))
    if role == "worker":
        work_for_leader()
        raise ServeError("this rank was a worker, and its leader has ended")
    if role == "leader":
        llm_args["_mpi_session"] = leader_session()
    runtime = _load_runtime(triton.runtime, triton.runtime_module)
    sampling_params = runtime.SamplingParams
    if triton.runtime == "tensorrt_llm":
        sampling_params = ending_at_every_end(sampling_params, Path(llm_args["model"]))
    return runtime.LLM(**llm_args), sampling_params


def _load_runtime(name: str, module: str | None) -> Any:
    if module is not None:
        return importlib.import_module(module)
    from puzzle_trtllm.serve.runtimes import load_runtime

    return load_runtime(name)
