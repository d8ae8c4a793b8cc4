"""What executes an engine: `tensorrt_llm` on NVIDIA GPUs, `reference` (ours, PyTorch) everywhere."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from puzzle_trtllm.errors import EngineError

if TYPE_CHECKING:
    from puzzle_trtllm.engine import Engine
    from puzzle_trtllm.serve.runtimes.api import Runtime

_MODULES = {"reference": "puzzle_trtllm.serve.runtimes.reference", "tensorrt_llm": "tensorrt_llm"}
_INSTALL = {
    "reference": "pip install 'puzzle-trtllm[reference]'",
    "tensorrt_llm": "run in NVIDIA's TensorRT-LLM container",
}


def load_runtime(name: str) -> Runtime:
    """The module behind a runtime's name. Raises EngineError when it is unknown or not installed here."""
    if name not in _MODULES:
        raise EngineError("unknown runtime", found=name, expected=" or ".join(_MODULES))
    try:
        return cast("Runtime", importlib.import_module(_MODULES[name]))
    except ImportError as error:
        raise EngineError(f"the runtime {name} is not installed here ({error}); {_INSTALL[name]}") from None


def create_llm(engine: Engine, **overrides: Any) -> Any:
    """`LLM(...)` of the engine's own runtime on its serving copy, with `llm_args.yaml` and then `overrides`."""
    runtime = load_runtime(engine.manifest.runtime)
    return runtime.LLM(model=str(Path(engine.model_path)), **{**engine.llm_args, **overrides})
