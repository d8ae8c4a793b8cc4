"""Derived LLM arguments: the numbers by hand, overrides that win, and what cannot be refused before it is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from puzzle_trtllm.architecture import PuzzleArchitecture
from puzzle_trtllm.build.llm_args import derive_llm_args, one_sequence_bytes, to_nested
from puzzle_trtllm.engine import EngineConfig
from puzzle_trtllm.errors import ConfigError
from puzzle_trtllm.llm_args_schema import check_llm_args
from puzzle_trtllm.scenario import Scenario, load_scenario
from puzzle_trtllm.tensors import count_weight_bytes
from tests.toys import toy_architecture

CHILD = toy_architecture([(4, 16), (3, None), (4, 40), (2, None)])
SCENARIO = Scenario(name="test", input_tokens=60, output_tokens=40, concurrency=5, num_requests=9)
KV_BYTES = 2 * 2 * 16
"""One token in one layer in FP8: K and V, 2 KV heads of 16."""
ONE_SEQUENCE = (2 + 7 + 4 + 7) * 16 * KV_BYTES
"""Blocks of 16 for 100 tokens: window 16 holds 1 + 1, window 40 holds 3 + 1, full holds 7."""


def derived(architecture=CHILD, scenario=SCENARIO, **config):
    gpu = {"gpu": "h100-80gb"} if config.get("runtime") == "tensorrt_llm" else {}
    config = EngineConfig(**{"runtime": "reference", "kv_dtype": "fp8", **gpu, **config})
    return derive_llm_args(architecture, config, scenario, file="c.yaml")


def arguments(*args, **config):
    return to_nested(derived(*args, **config))


def refused(match: str, **config) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        derived(**config)
    assert str(caught.value).startswith("c.yaml: ") and "\n" not in str(caught.value)


class TestDerived:
    def test_everything_at_once(self):
        assert arguments() == {
            "backend": "pytorch",
            "tensor_parallel_size": 1,
            "max_seq_len": 100,
            "max_batch_size": 5,
            "max_num_tokens": 8192,
            "enable_chunked_prefill": True,
            "kv_cache_config": {
                "dtype": "fp8",
                "max_attention_window": [16, 100, 40, 100],
                "tokens_per_block": 16,
                "enable_block_reuse": True,
            },
        }

    def test_every_value_has_a_reason(self):
        assert all(value.reason for value in derived())

    def test_bf16_is_called_auto(self):
        assert arguments(kv_dtype="bf16")["kv_cache_config"]["dtype"] == "auto"

    def test_a_window_longer_than_a_sequence_is_cut(self):
        a = toy_architecture([(4, 300), (4, None)])
        assert arguments(a)["kv_cache_config"]["max_attention_window"] == [100, 100]

    @pytest.mark.parametrize(("window", "block"), [(3, 8), (16, 16), (31, 16), (32, 32), (500, 32), (None, 32)])
    def test_blocks_are_no_larger_than_the_smallest_window(self, window, block):
        a = toy_architecture([(4, window), (4, None)])
        assert arguments(a)["kv_cache_config"]["tokens_per_block"] == block

    def test_blocks_of_tensorrt_llm_stay_at_its_default(self):
        assert arguments(runtime="tensorrt_llm")["kv_cache_config"]["tokens_per_block"] == 32

    def test_more_sequences_than_tokens_a_step(self):
        scenario = SCENARIO.model_copy(update={"concurrency": 10_000})
        assert arguments(CHILD, scenario)["max_num_tokens"] == 10_000

    def test_the_published_child_at_the_papers_long_scenario(self):
        file = Path(__file__).parents[1] / "data" / "gpt-oss-puzzle-88b.config.json"
        child = PuzzleArchitecture.from_path(file)
        found = arguments(child, load_scenario("long"), runtime="tensorrt_llm", num_gpus=8, parallel="dep")
        windows = found["kv_cache_config"]["max_attention_window"]
        assert (len(windows), windows.count(128), windows.count(8192), windows.count(131072)) == (36, 18, 8, 10)
        assert (found["tensor_parallel_size"], found["moe_expert_parallel_size"]) == (8, 8)
        assert found["enable_attention_dp"] is True
        check_llm_args(found, target="1.2", file="x")


class TestMemoryCap:
    WEIGHTS = count_weight_bytes(CHILD)

    def test_the_cache_gets_what_the_weights_leave(self):
        kv = arguments(memory_bytes=self.WEIGHTS + 123_456)["kv_cache_config"]
        assert kv["max_gpu_total_bytes"] == 123_456

    def test_no_cap_no_key(self):
        assert "max_gpu_total_bytes" not in arguments()["kv_cache_config"]

    def test_one_sequence_by_hand(self):
        assert one_sequence_bytes(CHILD, arguments()) == ONE_SEQUENCE
        assert one_sequence_bytes(CHILD, arguments(kv_dtype="bf16")) == 2 * ONE_SEQUENCE

    def test_one_sequence_is_the_least(self):
        arguments(memory_bytes=self.WEIGHTS + ONE_SEQUENCE)
        refused(
            rf"memory_bytes: leaves no room for the KV cache of one sequence of 100 tokens .found "
            rf"{self.WEIGHTS + ONE_SEQUENCE - 1}, expected at least {self.WEIGHTS + ONE_SEQUENCE}: ",
            memory_bytes=self.WEIGHTS + ONE_SEQUENCE - 1,
        )

    @pytest.mark.parametrize("runtime", ["reference", "tensorrt_llm"])
    def test_is_the_cap_of_one_rank(self, runtime):
        a = toy_architecture([(4, 16), (2, None)], intermediate_size=256)
        cap = 10_000_000
        alone, shared = (
            arguments(a, runtime=runtime, num_gpus=ranks, memory_bytes=cap)["kv_cache_config"]["max_gpu_total_bytes"]
            for ranks in (1, 2)
        )
        assert cap - count_weight_bytes(a) == alone < shared
        # Everything but router, norms, O's bias and (reference runtime) the embedding is halved.
        assert cap - shared == pytest.approx(count_weight_bytes(a) / 2, rel=0.1)

    def test_each_rank_holds_its_own_kv_heads(self):
        one = one_sequence_bytes(CHILD, arguments())
        several = {**arguments(), "tensor_parallel_size": 2}
        assert one_sequence_bytes(CHILD, several) == one // 2
        assert one_sequence_bytes(CHILD, {**several, "tensor_parallel_size": 4}) == one // 2
        assert one_sequence_bytes(CHILD, {**several, "enable_attention_dp": True}) == one

    def test_less_than_the_weights(self):
        refused("memory_bytes: leaves no room", memory_bytes=1)


class TestOverrides:
    def test_win_and_say_so(self):
        values = derived(llm_args={"max_batch_size": 2, "kv_cache_config": {"tokens_per_block": 8}})
        found = to_nested(values)
        assert (found["max_batch_size"], found["kv_cache_config"]["tokens_per_block"]) == (2, 8)
        assert found["kv_cache_config"]["dtype"] == "fp8", "the rest of the section stays"
        reasons = {value.key: value.reason for value in values}
        assert (
            reasons["max_batch_size"] == reasons["kv_cache_config.tokens_per_block"] == "llm_args of the engine config"
        )

    def test_what_depends_on_them_follows(self):
        found = arguments(llm_args={"max_seq_len": 30})
        assert found["kv_cache_config"]["max_attention_window"] == [16, 30, 30, 30]

    def test_keys_that_nothing_is_derived_for(self):
        overrides = {"stream_interval": 10, "moe_config": {"backend": "TRITON"}, "cuda_graph_config": None}
        found = arguments(llm_args=overrides)
        assert {key: found[key] for key in overrides} == overrides

    @pytest.mark.parametrize(
        ("llm_args", "match"),
        [
            ({"max_sequence_len": 3}, "llm_args: max_sequence_len: unknown LLM argument .*max_seq_len"),
            ({"kv_cache_config": {"windows": [1]}}, r"llm_args: kv_cache_config\.windows: unknown LLM argument"),
            ({"max_batch_size": "many"}, "max_batch_size: wrong type"),
            ({"model": "x"}, r"llm_args\.model: is passed by the loader"),
            ({"max_seq_len": 513}, "max_seq_len: sequences longer than the model's positions .found 513, expected at"),
            ({"max_seq_len": None}, "max_seq_len: sequences longer"),
            (
                {"kv_cache_config": {"max_attention_window": [16, 100]}},
                r"max_attention_window: needs one entry a layer .found 2 entries, expected 4",
            ),
            (
                {"kv_cache_config": {"max_attention_window": [16, 100, 39, 100]}},
                r"max_attention_window\[2\]: smaller than the model's window .found 39, expected at least 40",
            ),
            ({"kv_cache_config": {"max_attention_window": None}}, "needs one entry a layer"),
            ({"kv_cache_config": {"tokens_per_block": 0}}, "tokens_per_block: must be positive"),
            ({"tensor_parallel_size": 0}, "tensor_parallel_size: must be positive .found 0, expected at least 1"),
            ({"max_seq_len": -5}, "max_seq_len: must be positive .found -5"),
            ({"max_batch_size": 0}, "max_batch_size: must be positive .found 0"),
            ({"max_batch_size": None}, "max_batch_size: must be positive .found null"),
            ({"max_num_tokens": -1}, "max_num_tokens: must be positive .found -1"),
            ({"kv_cache_config": {"free_gpu_memory_fraction": 5.0}}, r"free_gpu_memory_fraction: .*found 5\.0"),
            ({"kv_cache_config": {"free_gpu_memory_fraction": 0}}, "free_gpu_memory_fraction: must be above 0 and"),
            ({"kv_cache_config": {1: 2}}, r"llm_args: kv_cache_config\.1: unknown LLM argument"),
        ],
    )
    @pytest.mark.parametrize("runtime", ["reference", "tensorrt_llm"])
    def test_wrong_ones_are_one_line(self, llm_args, match, runtime):
        refused(match, llm_args=llm_args, runtime=runtime)

    @pytest.mark.parametrize(
        ("kv_dtype", "override", "expected"), [("bf16", "fp8", "auto"), ("fp8", "auto", "fp8"), ("fp8", "x", "fp8")]
    )
    def test_the_caches_dtype_is_kv_dtypes_to_say(self, kv_dtype, override, expected):
        match = (
            f'dtype: disagrees with kv_dtype: {kv_dtype} .*found "{override}", expected "{expected}"; .*set kv_dtype'
        )
        refused(match, kv_dtype=kv_dtype, llm_args={"kv_cache_config": {"dtype": override}})
        same = arguments(kv_dtype=kv_dtype, llm_args={"kv_cache_config": {"dtype": expected}})
        assert same["kv_cache_config"]["dtype"] == expected

    @pytest.mark.parametrize(("parallel", "override"), [("tp", True), ("dep", False)])
    def test_attention_dp_is_parallels_to_say(self, parallel, override):
        match = f"enable_attention_dp: disagrees with parallel: {parallel} .*set parallel"
        refused(match, runtime="tensorrt_llm", parallel=parallel, llm_args={"enable_attention_dp": override})

    def test_the_caches_bytes_are_memory_bytes_to_say(self):
        """Reports tell an engine's memory by memory_bytes."""
        override = {"kv_cache_config": {"max_gpu_total_bytes": 10**9}}
        refused(
            r"max_gpu_total_bytes: disagrees with memory_bytes: 3000000 ", memory_bytes=3_000_000, llm_args=override
        )
        assert arguments(llm_args=override)["kv_cache_config"]["max_gpu_total_bytes"] == 10**9

    def test_a_gpu_that_does_not_exist_is_told_to_every_runtime(self):
        refused(r"gpu: unknown GPU \(found h1000, expected one of: h100-80gb", runtime="reference", gpu="h1000")


def test_a_scenario_longer_than_the_model():
    with pytest.raises(ConfigError, match=r"max_seq_len: sequences longer than the model's positions .found 131072"):
        derived(CHILD, load_scenario("long"))


class TestParallelism:
    @pytest.mark.parametrize(
        ("config", "match"),
        [
            (
                {"runtime": "reference", "num_gpus": 2, "parallel": "dep"},
                "parallel: .*found dep, expected tp: the reference runtime deals out attention heads",
            ),
            (
                {"runtime": "reference", "num_gpus": 2, "llm_args": {"enable_attention_dp": True}},
                "enable_attention_dp: .*expected false: the reference runtime",
            ),
            (
                {"runtime": "reference", "num_gpus": 2, "llm_args": {"moe_expert_parallel_size": 1}},
                "moe_tensor_parallel_size: .*found 2, expected at most 1: the experts' 32 in blocks of 32",
            ),
            (
                {"runtime": "reference", "num_gpus": 2},
                "moe_expert_parallel_size: .*found 2, expected a divisor of the 3 experts of layer 1",
            ),
            (
                {"num_gpus": 3, "llm_args": {"moe_expert_parallel_size": 1}},
                "tensor_parallel_size: .*found 3, expected a divisor of the 4 attention heads",
            ),
            (
                {"num_gpus": 4, "llm_args": {"moe_expert_parallel_size": 1}},
                "tensor_parallel_size: .*does not repeat KV heads .found 4, expected a divisor of the 2 KV heads",
            ),
            (
                {"num_gpus": 2, "parallel": "dep"},
                "moe_expert_parallel_size: .*found 2, expected a divisor of the 3 ",
            ),
            (
                {"num_gpus": 4, "llm_args": {"moe_expert_parallel_size": 3}},
                "moe_expert_parallel_size: .*found 3, expected a divisor of tensor_parallel_size, 4",
            ),
            ({"num_gpus": 2, "llm_args": {"tensor_parallel_size": 4}}, "tensor_parallel_size: .*at most num_gpus, 2"),
            ({"llm_args": {"pipeline_parallel_size": 2}}, "pipeline_parallel_size: .*no pipeline parallelism"),
        ],
    )
    def test_impossible_layouts_are_one_line(self, config, match):
        refused(match, **{"runtime": "tensorrt_llm", **config})

    def test_tensor_parallelism_deals_whole_experts_out(self):
        found = arguments(toy_architecture([(6, 16), (4, None)]), runtime="tensorrt_llm", num_gpus=2)
        assert (found["tensor_parallel_size"], found["moe_expert_parallel_size"]) == (2, 2)
        assert "enable_attention_dp" not in found

    def test_the_reference_runtime_deals_whole_experts_out_too(self):
        found = arguments(toy_architecture([(6, 16), (4, None)]), num_gpus=2)
        assert (found["tensor_parallel_size"], found["moe_expert_parallel_size"]) == (2, 2)

    def test_attention_dp_needs_no_head_split(self):
        a = toy_architecture([(6, 16), (3, None)])
        found = arguments(a, runtime="tensorrt_llm", num_gpus=3, parallel="dep")
        assert (found["tensor_parallel_size"], found["moe_expert_parallel_size"]) == (3, 3)
