"""model.yaml: the arguments of `LLM(...)` at top level, and what concerns Triton and this project in `triton_config`.

One file configures the served model; config.pbtxt only names its tensors. Relative paths in `triton_config` are not
supported: the folder is read by Triton's stub, whose working directory is not ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from puzzle_trtllm.yaml_files import load_model

MODEL_YAML = "model.yaml"
MIN_OPEN_REQUESTS = 1024
"""What a model takes at least, unless it is told otherwise."""


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
    max_open_requests: int = Field(default=MIN_OPEN_REQUESTS, ge=1)
    """Requests waiting or running; one more is answered UNAVAILABLE at once."""
    step_timeout_s: float = Field(default=600, ge=0)
    """Open requests for which the engine ends no step for so long have a dead engine; 0: they wait for ever. Only of a
    runtime that counts its steps."""
    vocab_size: int | None = Field(default=None, ge=1)
    """Token ids of `input_ids` must be below this; an id outside the embedding would crash a GPU engine."""


class _ModelYaml(BaseModel):
    """The whole file: what is not ours is the LLM's."""

    model_config = ConfigDict(extra="allow", frozen=True)

    triton_config: TritonConfig


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """What model.yaml says."""

    llm_args: dict[str, Any]
    triton: TritonConfig


def read_model_yaml(file: Path) -> ModelSettings:
    """Read and check model.yaml. Raises ConfigError in one line."""
    content = load_model(file, _ModelYaml)
    return ModelSettings(llm_args=content.model_extra or {}, triton=content.triton_config)
