"""The recorded schema of TensorRT-LLM's LLM arguments: what its strict classes would refuse is refused here."""

from __future__ import annotations

import pytest

from puzzle_trtllm.errors import ConfigError
from puzzle_trtllm.llm_args_schema import check_known_types, check_llm_args, fields_of, section_class

GOOD = {
    "backend": "pytorch",
    "tensor_parallel_size": 8,
    "moe_expert_parallel_size": None,
    "max_seq_len": 131072,
    "enable_attention_dp": True,
    "env_overrides": {"TRTLLM_ENABLE_PDL": "1"},
    "kv_cache_config": {"dtype": "fp8", "max_attention_window": [128, 131072], "free_gpu_memory_fraction": 0.9},
    "moe_config": {"backend": "TRITON"},
    "cuda_graph_config": None,
    "scheduler_config": {"capacity_scheduler_policy": "GUARANTEED_NO_EVICT"},
}


@pytest.mark.parametrize("target", ["1.2", "1.3", "late"])
def test_a_usual_set_of_arguments_passes(target):
    check_llm_args(GOOD, target=target, file="x.yaml")


def test_recorded_fields():
    assert {"model", "kv_cache_config", "moe_config", "stream_interval"} <= set(fields_of("TorchLlmArgs", "1.2"))
    assert fields_of("KvCacheConfig", "1.2")["max_attention_window"] == "Optional[List[PositiveInt]]"
    assert section_class("kv_cache_config") == "KvCacheConfig"
    assert section_class("cuda_graph_config") == "CudaGraphConfig"
    assert section_class("env_overrides") is None and section_class("max_seq_len") is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_batchsize": 3}, r"max_batchsize: unknown LLM argument .*did you mean max_batch_size\?"),
        (
            {"kv_cache_config": {"token_per_block": 32}},
            r"kv_cache_config\.token_per_block: unknown .*did you mean kv_cache_config\.tokens_per_block\?",
        ),
        ({"zzz": 1}, "zzz: unknown LLM argument of TensorRT-LLM's TorchLlmArgs$"),
        ({"quant_config": {}}, "quant_config: not an LLM argument: property"),
        ({"custom_module_dirs": []}, "custom_module_dirs: not an LLM argument: .*CLI option"),
        ({"_not_fields": 1}, "_not_fields: unknown"),
        ({"tensor_parallel_size": "8"}, r'tensor_parallel_size: wrong type .*found "8", expected int'),
        ({"tensor_parallel_size": True}, "tensor_parallel_size: wrong type"),
        ({"tensor_parallel_size": None}, "tensor_parallel_size: wrong type"),
        ({"enable_chunked_prefill": 1}, "enable_chunked_prefill: wrong type"),
        ({"stream_interval": 0}, "stream_interval: wrong type .*expected PositiveInt"),
        ({"max_batch_size": 2**63}, "max_batch_size: wrong type .*found 9223372036854775808, expected"),
        ({"kv_cache_config": {"max_attention_window": [128, None]}}, r"max_attention_window: wrong type"),
        ({"kv_cache_config": {"max_attention_window": 128}}, r"max_attention_window: wrong type"),
        ({"kv_cache_config": None}, "kv_cache_config: wrong type"),
        ({"moe_config": {"backend": "MAGIC"}}, r'moe_config\.backend: wrong type .*"MAGIC".*TRITON'),
        ({"moe_config": "TRITON"}, "moe_config: wrong type"),
        ({"env_overrides": {"A": 0}}, r'env_overrides\.A: wrong type .*found 0, expected a string: "0" in quotes'),
        ({"env_overrides": {"A": None}}, r"env_overrides\.A: wrong type .*found null, expected a string\)"),
        ({"env_overrides": {"A B": "x"}}, r"env_overrides\.A B: no name of an environment variable"),
        ({"env_overrides": {"1A": "x"}}, r"env_overrides\.1A: no name of an environment variable"),
        ({"env_overrides": ["A"]}, "env_overrides: wrong type"),
        ({"kv_cache_config": {"free_gpu_memory_fraction": -0.1}}, "free_gpu_memory_fraction: wrong type"),
        ({"kv_cache_config": {3: 1}}, r"kv_cache_config\.3: unknown LLM argument"),
    ],
)
def test_a_refused_argument_is_one_line(arguments, message):
    with pytest.raises(ConfigError, match=message) as caught:
        check_llm_args(arguments, target="1.2", file="x.yaml")
    assert str(caught.value).startswith("x.yaml: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "arguments", [{"num_serve_frontends": 2}, {"kv_cache_config": {"iteration_stats_interval": 2}}]
)
def test_too_new_an_argument_needs_the_newest_target(arguments):
    check_llm_args(arguments, target="late", file="x.yaml")
    for target in ("1.2", "1.3"):
        with pytest.raises(ConfigError, match=rf"not in TensorRT-LLM's line {target}, only in late \(expected"):
            check_llm_args(arguments, target=target, file="x.yaml")


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        ({"kv_cache_config": {"use_kv_cache_manager_v2": False}}, ["1.3", "late"]),
        ({"kv_cache_config": {"max_util_for_resume": 0.9}}, ["1.3", "late"]),
        ({"kv_cache_config": {"onboard_blocks": True}}, ["1.2", "1.3"]),
        ({"model_kwargs": {}}, ["1.3", "late"]),
        ({"enable_sleep": True}, ["1.2", "1.3"]),
        ({"disable_flashinfer_sampling": True}, ["1.2", "1.3"]),
        ({"scheduler_config": {"waiting_queue_policy": "fcfs"}}, ["1.3", "late"]),
        ({"cache_transceiver_config": {"transceiver_runtime": "CPP"}}, ["1.3", "late"]),
        ({"moe_config": {"backend": "AUTO"}}, ["1.3", "late"]),
        ({"moe_config": {"backend": "WIDEEP"}}, ["1.2", "1.3"]),
    ],
)
def test_what_a_line_does_not_have_is_refused_for_it_alone(arguments, lines):
    for target in ("1.2", "1.3", "late"):
        if target in lines:
            check_llm_args(arguments, target=target, file="x.yaml")
        else:
            with pytest.raises(ConfigError, match=f"line {target}, only in {' and '.join(lines)}|wrong type"):
                check_llm_args(arguments, target=target, file="x.yaml")
    check_known_types(arguments, file="x.yaml")


def test_what_no_recorded_line_has_passes_in_an_engine_that_was_edited():
    """A newer TensorRT-LLM may have added it, in a section as well; types of what is known are held to all the same."""
    new = {"added": 1, "cuda_graph_config": {"mode": "decode"}, "kv_cache_config": {"added": 1, "dtype": "fp8"}}
    check_known_types(new, file="x.yaml")
    with pytest.raises(ConfigError, match=r"x\.yaml: kv_cache_config\.dtype: wrong type .*found 1"):
        check_known_types({"kv_cache_config": {"added": 1, "dtype": 1}}, file="x.yaml")
