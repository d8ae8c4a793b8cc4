"""The tensors of the `tensorrt_llm` Triton model, as data: config.pbtxt and the request parser both come from here.

Names, types and dims are those of NVIDIA's `tensorrt_llm` model for the LLM API, so any client of that model works
unchanged. The tensors marked `extra` are ours: all optional, and absent from a response unless it was asked for.

Dims follow Triton with max_batch_size 0: the first axis is a plain axis, so `text_input` [-1] is a list of prompts that
must hold exactly one. The trap: Triton itself refuses unknown names, wrong types and wrong dims before the model sees
the request, so a tensor that is to be refused in our words must be declared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MODEL_NAME = "tensorrt_llm"
SAMPLING_PREFIX = "sampling_param_"

TritonType = Literal["STRING", "BOOL", "INT32", "INT64", "UINT64", "FP32"]
"""As in config.pbtxt without `TYPE_`. Over gRPC and HTTP the datatype STRING is called BYTES."""


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output of the model."""

    name: str
    dtype: TritonType
    dims: tuple[int, ...] = (1,)
    optional: bool = True
    extra: bool = False
    """Ours; not in NVIDIA's model."""
    unsupported: bool = False
    """Declared only so that its use gets an explanation."""


def _sampling(name: str, dtype: TritonType, *, dims: tuple[int, ...] = (1,), extra: bool = False) -> TensorSpec:
    return TensorSpec(name=SAMPLING_PREFIX + name, dtype=dtype, dims=dims, extra=extra)


INPUTS: tuple[TensorSpec, ...] = (
    TensorSpec(name="text_input", dtype="STRING", dims=(-1,), optional=False),
    TensorSpec(name="input_ids", dtype="INT32", dims=(-1,), extra=True),
    TensorSpec(name="streaming", dtype="BOOL"),
    TensorSpec(name="stream_delta", dtype="BOOL", extra=True),
    TensorSpec(name="stop", dtype="BOOL"),
    _sampling("best_of", "INT32"),
    _sampling("temperature", "FP32"),
    _sampling("top_k", "INT32"),
    _sampling("top_p", "FP32"),
    _sampling("frequency_penalty", "FP32"),
    _sampling("presence_penalty", "FP32"),
    _sampling("max_tokens", "INT32"),
    _sampling("min_tokens", "INT32", extra=True),
    _sampling("stop", "STRING", dims=(-1,)),
    _sampling("seed", "UINT64"),
    _sampling("ignore_eos", "BOOL", extra=True),
    _sampling("exclude_input_from_output", "BOOL"),
    _sampling("return_perf_metrics", "BOOL"),
    TensorSpec(name="return_finish_reason", dtype="BOOL"),
    TensorSpec(name="return_stop_reason", dtype="BOOL"),
    TensorSpec(name="return_cumulative_logprob", dtype="BOOL"),
    TensorSpec(name="return_output_ids", dtype="BOOL", extra=True),
    TensorSpec(name="image_url", dtype="STRING", dims=(-1,), unsupported=True),
    TensorSpec(name="lora_id", dtype="UINT64", unsupported=True),
    TensorSpec(name="lora_name", dtype="STRING", unsupported=True),
    TensorSpec(name="lora_path", dtype="STRING", unsupported=True),
    TensorSpec(name="lora_ckpt_source", dtype="STRING", unsupported=True),
)

OUTPUTS: tuple[TensorSpec, ...] = (
    TensorSpec(name="text_output", dtype="STRING", dims=(-1,)),
    TensorSpec(name="output_ids", dtype="INT32", dims=(-1,), extra=True),
    TensorSpec(name="num_output_tokens", dtype="INT32", extra=True),
    TensorSpec(name="finish_reason", dtype="STRING", dims=(-1,)),
    TensorSpec(name="stop_reason", dtype="STRING", dims=(-1,)),
    TensorSpec(name="cumulative_logprob", dtype="FP32", dims=(-1,)),
    TensorSpec(name="kv_cache_reused_block", dtype="INT32", dims=(-1,)),
    TensorSpec(name="kv_cache_missed_block", dtype="INT32", dims=(-1,)),
    TensorSpec(name="kv_cache_alloc_new_blocks", dtype="INT32", dims=(-1,)),
    TensorSpec(name="kv_cache_alloc_total_blocks", dtype="INT32", dims=(-1,)),
    TensorSpec(name="kv_cache_hit_rate", dtype="FP32", dims=(-1,)),
    TensorSpec(name="arrival_time_ns", dtype="INT64"),
    TensorSpec(name="first_scheduled_time_ns", dtype="INT64"),
    TensorSpec(name="first_token_time_ns", dtype="INT64"),
    TensorSpec(name="last_token_time_ns", dtype="INT64"),
    TensorSpec(name="acceptance_rate", dtype="FP32"),
    TensorSpec(name="total_accepted_draft_tokens", dtype="INT32"),
    TensorSpec(name="total_draft_tokens", dtype="INT32"),
)

INPUTS_BY_NAME = {spec.name: spec for spec in INPUTS}
EXTRA_INPUTS = frozenset(spec.name for spec in INPUTS if spec.extra)


def render_config(*, instance_count: int = 1, gpu_device_ids: str | None = None) -> str:
    """The text of config.pbtxt. `gpu_device_ids` says which instance has which GPUs (instances.py).

    max_batch_size and decoupled are left out on purpose, as in NVIDIA's: model.py sets them from model.yaml when Triton
    completes the configuration, and what is fixed here could not be changed there.
    """
    lines = [
        f'name: "{MODEL_NAME}"',
        'backend: "python"',
        f"instance_group [{{ count: {instance_count}, kind: KIND_CPU }}]",
    ]
    if gpu_device_ids is not None:
        lines.append(f'parameters {{ key: "gpu_device_ids", value: {{ string_value: "{gpu_device_ids}" }} }}')
    lines.append("")
    lines += [_render_tensor("input", spec) for spec in INPUTS]
    lines += [_render_tensor("output", spec) for spec in OUTPUTS]
    return "\n".join(lines) + "\n"


def _render_tensor(kind: Literal["input", "output"], spec: TensorSpec) -> str:
    dims = ", ".join(str(size) for size in spec.dims)
    optional = ", optional: true" if kind == "input" and spec.optional else ""
    return f'{kind} [{{ name: "{spec.name}", data_type: TYPE_{spec.dtype}, dims: [ {dims} ]{optional} }}]'
