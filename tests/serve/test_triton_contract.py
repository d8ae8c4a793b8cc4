"""The tensor contract: NVIDIA's llmapi model is contained in ours, and Triton can read what we generate."""

from __future__ import annotations

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from puzzle_trtllm.serve.triton.contract import EXTRA_INPUTS, INPUTS, OUTPUTS, render_config

# Written down from NVIDIA's triton_backend/all_models/llmapi/tensorrt_llm/config.pbtxt, not from our tables.
NVIDIA_INPUTS = """
text_input STRING -1 | streaming BOOL 1 | stop BOOL 1 | image_url STRING -1
sampling_param_best_of INT32 1 | sampling_param_temperature FP32 1 | sampling_param_top_k INT32 1
sampling_param_top_p FP32 1 | sampling_param_frequency_penalty FP32 1 | sampling_param_presence_penalty FP32 1
sampling_param_max_tokens INT32 1 | sampling_param_stop STRING -1 | sampling_param_seed UINT64 1
sampling_param_exclude_input_from_output BOOL 1 | sampling_param_return_perf_metrics BOOL 1
return_finish_reason BOOL 1 | return_stop_reason BOOL 1 | return_cumulative_logprob BOOL 1
lora_id UINT64 1 | lora_name STRING 1 | lora_path STRING 1 | lora_ckpt_source STRING 1
"""
NVIDIA_OUTPUTS = """
text_output STRING -1 | finish_reason STRING -1 | stop_reason STRING -1 | cumulative_logprob FP32 -1
kv_cache_reused_block INT32 -1 | kv_cache_missed_block INT32 -1 | kv_cache_alloc_new_blocks INT32 -1
kv_cache_alloc_total_blocks INT32 -1 | kv_cache_hit_rate FP32 -1 | arrival_time_ns INT64 1
first_scheduled_time_ns INT64 1 | first_token_time_ns INT64 1 | last_token_time_ns INT64 1 | acceptance_rate FP32 1
total_accepted_draft_tokens INT32 1 | total_draft_tokens INT32 1
"""


def table(text: str) -> dict[str, tuple[str, int]]:
    rows = [row.split() for line in text.strip().splitlines() for row in line.split("|")]
    return {name: (dtype, int(size)) for name, dtype, size in rows}


@pytest.fixture(scope="module")
def config() -> model_config_pb2.ModelConfig:
    """Our text, read by Triton's own schema."""
    return text_format.Parse(render_config(), model_config_pb2.ModelConfig())


def as_table(tensors) -> dict[str, tuple[str, int]]:
    names = model_config_pb2.DataType.Name
    return {tensor.name: (names(tensor.data_type).removeprefix("TYPE_"), *tensor.dims) for tensor in tensors}


def test_the_inputs_are_nvidias_and_our_extras(config) -> None:
    ours = as_table(config.input)
    nvidias = table(NVIDIA_INPUTS)
    assert {name: spec for name, spec in ours.items() if name not in EXTRA_INPUTS} == nvidias
    assert {name: ours[name] for name in EXTRA_INPUTS} == {
        "input_ids": ("INT32", -1),
        "stream_delta": ("BOOL", 1),
        "return_output_ids": ("BOOL", 1),
        "sampling_param_ignore_eos": ("BOOL", 1),
        "sampling_param_min_tokens": ("INT32", 1),
    }


def test_the_outputs_are_nvidias_and_our_extras(config) -> None:
    ours = as_table(config.output)
    extras = {"output_ids": ("INT32", -1), "num_output_tokens": ("INT32", 1)}
    assert ours == table(NVIDIA_OUTPUTS) | extras
    assert {spec.name for spec in OUTPUTS if spec.extra} == set(extras)


def test_only_text_input_is_required(config) -> None:
    assert [tensor.name for tensor in config.input if not tensor.optional] == ["text_input"]


def test_what_model_yaml_decides_is_left_to_it(config) -> None:
    """Triton refuses to complete a configuration that already says otherwise."""
    assert config.max_batch_size == 0 and not config.HasField("model_transaction_policy")
    assert (config.name, config.backend, config.instance_group[0].count) == ("tensorrt_llm", "python", 1)


def test_names_are_unique() -> None:
    for specs in (INPUTS, OUTPUTS):
        assert len({spec.name for spec in specs}) == len(specs)
