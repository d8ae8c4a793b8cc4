"""The Triton model `tensorrt_llm`: copied into the repository, where Triton's Python stub imports it.

All it does is hand over to `puzzle_trtllm.serve.triton`, which must be importable by the stub's interpreter. Nothing
heavy is imported before `initialize`: the stub imports this file once more, in a process of its own, only to complete
the configuration.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils


def _settings() -> Any:
    # Some stubs start their interpreter isolated from the environment; PYTHONPATH is how a source tree is found.
    sys.path += [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path]
    from puzzle_trtllm.serve.triton.settings import MODEL_YAML, read_model_yaml

    # As in NVIDIA's model: LLM_CONFIG_PATH may name another file.
    return read_model_yaml(Path(__file__).parent / os.environ.get("LLM_CONFIG_PATH", MODEL_YAML))


@contextmanager
def _saying_why() -> Iterator[None]:
    """Make of an error the one line that log.py looks for in the server's log."""
    try:
        yield
    except Exception as error:
        kinds = {kind.__name__ for kind in type(error).__mro__}  # the import of our errors may be what failed
        reason = str(error) if "PuzzleError" in kinds else f"{type(error).__name__}: {error}"
        raise pb_utils.TritonModelException(f"cannot start: {reason}") from error


class TritonPythonModel:
    """Triton calls these four."""

    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        """Complete config.pbtxt with what model.yaml says about Triton."""
        with _saying_why():
            triton = _settings().triton
        auto_complete_model_config.set_model_transaction_policy({"decoupled": triton.decoupled})
        auto_complete_model_config.set_max_batch_size(triton.max_batch_size)
        return auto_complete_model_config

    def initialize(self, args: dict[str, str]) -> None:
        """Start the engine; returns when it can take requests."""
        with _saying_why():
            settings = _settings()
            from puzzle_trtllm.serve.triton.instances import instance_of
            from puzzle_trtllm.serve.triton.service import Service

            self._service = Service(settings, instance_of(args), Path(__file__).parent)

    def execute(self, requests: list[Any]) -> None:
        """Take requests; their responses are sent as they come, from other threads."""
        self._service.execute(requests)

    def finalize(self) -> None:
        """Stop; Triton calls this only when no request is open, or not at all (notice.py)."""
        self._service.stop()
