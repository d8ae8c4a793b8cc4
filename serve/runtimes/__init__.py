"""What executes an engine: `tensorrt_llm` on NVIDIA GPUs, `reference` (ours, PyTorch) everywhere.

TensorRT-LLM knows the child's class only when our model is imported before the LLM is made, in this very process; its
workers follow (1.2 unpickles the class there, later lines import its module by name). So whoever loads that runtime
gets the model first.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from puzzle_trtllm.errors import EngineError
from puzzle_trtllm.families import FAMILIES

if TYPE_CHECKING:
    from puzzle_trtllm.engine import Engine
    from puzzle_trtllm.serve.runtimes.api import Runtime

_MODULES = {"reference": "puzzle_trtllm.serve.runtimes.reference", "tensorrt_llm": "tensorrt_llm"}
_INSTALL = {
    "reference": "pip install 'puzzle-trtllm[reference]'",
    "tensorrt_llm": "run in NVIDIA's TensorRT-LLM container",
}


def load_runtime(name: str) -> Runtime:
    """The module behind a runtime's name. Raises EngineError when it is unknown, missing or does not fit."""
    if name not in _MODULES:
        raise EngineError("unknown runtime", found=name, expected=" or ".join(_MODULES))
    try:
        if name == "tensorrt_llm" and _is_installed(name):
            for family in FAMILIES.values():
                if family.trtllm_model is not None:
                    importlib.import_module(family.trtllm_model)
        return cast("Runtime", importlib.import_module(_MODULES[name]))
    except ImportError as error:
        raise _not_installed(name, str(error)) from None


def check_installed(name: str) -> None:
    """Raise load_runtime's EngineError when a runtime is missing, without importing anything.

    For whoever imports an engine's plugin first, which can only say that such a TensorRT-LLM does not fit.
    """
    if not _is_installed(_MODULES[name]):
        raise _not_installed(name, f"no module named {_MODULES[name]}")


def create_llm(engine: Engine, **overrides: Any) -> Any:
    """`LLM(...)` of the engine's own runtime on its serving copy, with `llm_args.yaml` and then `overrides`."""
    arguments = {**engine.llm_args, **overrides}
    if engine.manifest.runtime == "tensorrt_llm":
        set_environment(arguments)
    runtime = load_runtime(engine.manifest.runtime)
    return runtime.LLM(model=str(Path(engine.model_path)), **arguments)


def set_environment(llm_args: Mapping[str, Any]) -> None:
    """Put `env_overrides` into this process too, before tensorrt_llm is imported.

    TensorRT-LLM hands them to the workers that it spawns; what runs in the calling process would not see them.
    """
    os.environ.update({name: str(value) for name, value in (llm_args.get("env_overrides") or {}).items()})


def _not_installed(name: str, reason: str) -> EngineError:
    return EngineError(f"the runtime {name} is not installed here ({reason}); {_INSTALL[name]}")


def _is_installed(module: str) -> bool:
    return module in sys.modules or importlib.util.find_spec(module) is not None
