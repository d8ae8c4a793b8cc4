"""Making the LLM inside Triton's stub: environment with its GPUs, plugin, runtime, in that order.

The order matters. MPI variables that tritonserver inherited (mpirun, Slurm) would make TensorRT-LLM's workers join the
wrong job, so they go first; `env_overrides` follow, because TensorRT-LLM sets them only in its workers. The plugin
registers the model class and must be imported before the LLM looks it up. And neither torch nor tensorrt_llm may be
imported before this runs: CUDA opens its devices at import, and workers spawned later inherit what was open
(https://github.com/NVIDIA/TensorRT-LLM, triton_backend/all_models/llmapi).
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from puzzle_trtllm.errors import EngineError
from puzzle_trtllm.serve.runtimes import set_environment
from puzzle_trtllm.serve.triton.instances import ONLY_INSTANCE, Instance, hide_other_gpus
from puzzle_trtllm.serve.triton.settings import ModelSettings

_MPI_JOB_PREFIXES = (
    "OMPI_COMM_WORLD_",
    "OMPI_UNIVERSE_SIZE",
    "OMPI_FIRST_RANKS",
    "OMPI_APP_CTX_",
    "OMPI_MCA_orte_",
    "ORTE_",
    "PMIX_",
    "PMI_",
)
_MPI_SETTINGS_PREFIX = "PMIX_MCA_"


def scrub_mpi_job(environment: MutableMapping[str, str]) -> list[str]:
    """Remove the variables that tie a process to a running MPI job; settings (OMPI_MCA_*, PMIX_MCA_*) stay.

    Returns the names removed.
    """
    names = [
        name for name in environment if name.startswith(_MPI_JOB_PREFIXES) and not name.startswith(_MPI_SETTINGS_PREFIX)
    ]
    for name in names:
        del environment[name]
    return names


def import_plugin(folder: Path) -> None:
    """Import the package in `folder` by its own name, as `trtllm-serve --custom_module_dirs` does.

    Its parent goes on sys.path (and stays: workers inherit it), so the folder must not be named like a real module.
    """
    if not (folder / "__init__.py").is_file():
        raise EngineError("missing", file=folder / "__init__.py", expected="the engine's plugin package")
    sys.path.insert(0, str(folder.parent))
    importlib.import_module(folder.name)


def start_llm(settings: ModelSettings, instance: Instance = ONLY_INSTANCE) -> tuple[Any, Any]:
    """Make the LLM that model.yaml describes, on the instance's GPUs; returns it and the runtime's SamplingParams.

    Raises EngineError when the runtime is not installed, and whatever the runtime raises when it cannot start.
    """
    triton, llm_args = settings.triton, dict(settings.llm_args)
    if triton.runtime == "tensorrt_llm":
        scrub_mpi_job(os.environ)
        set_environment(llm_args)
        if instance.gpu_ids is not None:
            llm_args["gpus_per_node"] = len(instance.gpu_ids)
    hide_other_gpus(instance, os.environ)
    if triton.plugin is not None:
        import_plugin(Path(triton.plugin))
    runtime = _load_runtime(triton.runtime, triton.runtime_module)
    return runtime.LLM(**llm_args), runtime.SamplingParams


def _load_runtime(name: str, module: str | None) -> Any:
    if module is not None:
        return importlib.import_module(module)
    from puzzle_trtllm.serve.runtimes import load_runtime

    return load_runtime(name)
