"""model.yaml: the arguments of `LLM(...)` at top level, and what concerns Triton and this project in `triton_config`.

One file configures the served model; config.pbtxt only names its tensors. Relative paths in `triton_config` are not
supported: the folder is read by Triton's stub, whose working directory is not ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from puzzle_trtllm.errors import ConfigError

MODEL_YAML = "model.yaml"


class TritonConfig(BaseModel):
    """`triton_config` in model.yaml. The first three keys are NVIDIA's, the others ours."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_batch_size: Literal[0] = 0
    """Triton must not batch: the engine batches in flight, and a request is one prompt."""
    decoupled: bool = True
    """False serves plain ModelInfer clients; streaming is then refused."""
    cancellation_check_period_ms: float = Field(default=25, gt=0)
    """How often all open requests are asked whether their client has gone."""
    runtime: Literal["tensorrt_llm", "reference"] = "tensorrt_llm"
    runtime_module: str | None = None
    """Import this module instead of the runtime's own; it must offer the same LLM API (tests use it)."""
    plugin: str | None = None
    """Folder of a Python package imported before the LLM is made; it registers models."""
    max_open_requests: int = Field(default=1024, ge=1)
    """Requests waiting or running; one more is answered UNAVAILABLE at once."""
    step_timeout_s: float = Field(default=600, ge=0)
    """Open requests for which the engine ends no step for so long have a dead engine; 0: they wait for ever. Only of a
    runtime that counts its steps."""
    vocab_size: int | None = Field(default=None, ge=1)
    """Token ids of `input_ids` must be below this; an id outside the embedding would crash a GPU engine."""


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """What model.yaml says."""

    llm_args: dict[str, Any]
    triton: TritonConfig


def read_model_yaml(file: Path) -> ModelSettings:
    """Read and check model.yaml. Raises ConfigError in one line."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=file) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {' '.join(str(error).split())}", file=file) from None
    if not isinstance(content, dict) or not isinstance(content.get("triton_config"), dict):
        raise ConfigError("missing key", file=file, key="triton_config", expected="a mapping")
    try:
        triton = TritonConfig.model_validate(content.pop("triton_config"), strict=True)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(["triton_config", *(str(part) for part in problem["loc"])])
        raise ConfigError(problem["msg"], file=file, key=key, found=repr(problem["input"])) from None
    return ModelSettings(llm_args=content, triton=triton)
