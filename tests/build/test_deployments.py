"""Deployments on GPU hosts: shipped engine configs, and the arguments that follow from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from puzzle_trtllm.architecture import PuzzleArchitecture
from puzzle_trtllm.build.derived_values import to_nested
from puzzle_trtllm.build.engine_build import explain
from puzzle_trtllm.build.expert_layout import expert_cut, warn_of_cut
from puzzle_trtllm.build.gpu_args import graph_sizes
from puzzle_trtllm.build.planner.layout import Layout
from puzzle_trtllm.build.planner.weights import weights_per_gpu
from puzzle_trtllm.engine import EngineConfig, load_engine_config
from puzzle_trtllm.errors import ConfigError
from puzzle_trtllm.llm_args_schema import check_llm_args
from puzzle_trtllm.scenario import load_scenario
from tests.build.golden_deployments import CONFIGS, GOLDEN, MODELS, deployment_files

CHILD = MODELS["child"]


def arguments(model=CHILD, **config):
    config = EngineConfig(**{"runtime": "tensorrt_llm", "gpu": "h100-80gb", "scenario": "long", **config})
    return to_nested(explain(model, config=config))


class TestShippedConfigs:
    def test_the_deployments_of_the_paper_and_two_more(self):
        assert {"h100x1-long", "h100x1-short", "h200x1", "b200x8"} <= set(CONFIGS)
        assert {f"h100x8-{load}-{kind}" for load in ("long", "short") for kind in ("tp", "dep")} <= set(CONFIGS)

    @pytest.mark.parametrize("config", CONFIGS)
    @pytest.mark.parametrize("model", MODELS)
    def test_emitted_files_are_the_golden_ones(self, config, model):
        folder = GOLDEN / config / model
        assert deployment_files(config, model) == {f.name: f.read_text() for f in folder.iterdir()}

    @pytest.mark.parametrize("config", CONFIGS)
    @pytest.mark.parametrize("target", ["1.2", "1.3", "late"])
    def test_every_line_of_tensorrt_llm_takes_the_arguments(self, config, target):
        settings = load_engine_config(config).model_copy(update={"target": target})
        for model in MODELS.values():
            values = explain(model, config=settings)
            check_llm_args(to_nested(values), target=target, file="x")
            assert all(value.reason for value in values)

    @pytest.mark.parametrize("config", CONFIGS)
    def test_a_file_holds_only_what_a_human_decides(self, config):
        keys = yaml.safe_load((Path("engine_configs") / f"{config}.yaml").read_text()).keys()
        assert keys <= {"runtime", "gpu", "num_gpus", "parallel", "kv_dtype", "scenario", "target"}

    @pytest.mark.parametrize(
        ("config", "of_one"), [("h100x8-long-dep", "long"), ("b200x8", "long"), ("h100x8-short-dep", "short")]
    )
    def test_a_node_for_throughput_is_asked_for_as_much_of_each_gpu_as_one_is(self, config, of_one):
        settings = load_engine_config(config)
        node, one = load_scenario(settings.scenario), load_scenario(of_one)
        assert (node.concurrency, node.num_requests) == (8 * one.concurrency, 8 * one.num_requests)
        assert (node.input_tokens, node.output_tokens) == (one.input_tokens, one.output_tokens)


class TestDerived:
    def test_kernels_by_gpu(self):
        found = {gpu: arguments(gpu=gpu)["moe_config"]["backend"] for gpu in ("h100-80gb", "h200-141gb", "b200-180gb")}
        assert found == {"h100-80gb": "TRITON", "h200-141gb": "TRITON", "b200-180gb": "TRTLLM"}
        assert arguments(gpu="rtx-pro-6000-96gb")["moe_config"]["backend"] == "CUTLASS"

    def test_tp8_deals_whole_experts_out_and_dep8_says_so(self):
        tp, dep = (arguments(num_gpus=8, parallel=kind) for kind in ("tp", "dep"))
        assert (tp["tensor_parallel_size"], tp["moe_expert_parallel_size"]) == (8, 8)
        assert "enable_attention_dp" not in tp and dep["enable_attention_dp"] is True

    def test_the_child_holds_more_sequences_than_the_parent(self):
        batch = {name: arguments(model, kv_dtype="fp8")["max_batch_size"] for name, model in MODELS.items()}
        assert batch["child"] > 3 * batch["parent"] > 0

    def test_fp8_holds_twice_as_many_as_bf16_and_more_where_prompts_take_much_of_the_windows(self):
        bf16, fp8 = (arguments(kv_dtype=dtype)["max_batch_size"] for dtype in ("bf16", "fp8"))
        assert 2 * bf16 <= fp8 <= 3 * bf16

    def test_the_batch_fills_the_pool_and_no_more(self):
        """By hand, in blocks of 32 KiB (FP8). One sequence is counted with its window and 8192 tokens more, in windows
        that it outgrows with a block more: 18 x 261 + 8 x 513 + 10 x 4096. Fifteen need more in windows: two prompts of
        131072 tokens and two steps of 8192 laid out whole, and what thirteen others keep."""
        values = {value.key: value for value in explain(CHILD, config="h100x1-long")}
        sequence_gib = (18 * 261 + 8 * 513 + 10 * 4096) * 32 * 1024 / 2**30
        assert f"{sequence_gib:.3f} GiB a sequence" in values["max_batch_size"].reason
        pool_gib = float(values["max_batch_size"].reason.removeprefix("what fits: ").split()[0])
        needed = {n: 18 * (8704 + (n - 2) * 5) + 8 * (8704 + (n - 2) * 257) + n * 10 * 4096 for n in (15, 16)}
        assert needed[15] * 32 * 1024 / 2**30 < pool_gib < needed[16] * 32 * 1024 / 2**30
        assert values["max_batch_size"].value == 15

    @pytest.mark.parametrize("sequences", [3, 8])
    def test_a_memory_cap_is_what_the_pool_is_counted_from(self, sequences):
        """As above; 5 of 1000 more than so many need, as shares are multiples of 1/4096, are not enough for another."""
        weights = weights_per_gpu(PuzzleArchitecture.from_path(CHILD), Layout(kind="tp", gpus_per_replica=1)).total
        others = sequences - 2
        blocks = 18 * (8704 + others * 5) + 8 * (8704 + others * 257) + sequences * 10 * 4096
        cap = weights + int(blocks * 32 * 1024 * 1.005)
        found = arguments(kv_dtype="fp8", memory_bytes=cap)
        assert found["max_batch_size"] == sequences
        assert found["kv_cache_config"]["max_gpu_total_bytes"] == cap - weights

    def test_blocks_of_another_size_are_counted_in_that_size(self):
        config = EngineConfig(
            runtime="tensorrt_llm", gpu="h100-80gb", scenario="long", kv_dtype="fp8",
            llm_args={"kv_cache_config": {"tokens_per_block": 128}},
        )  # fmt: skip
        reason = next(v.reason for v in explain(CHILD, config=config) if v.key == "max_batch_size")
        # 8320 tokens are 65 blocks and 16384 are 128, of 128 KiB a layer, and one more while the window slides.
        assert f"{(18 * 66 + 8 * 129 + 10 * 1024) * 128 * 1024 / 2**30:.3f} GiB a sequence" in reason

    def test_what_one_sequence_needs_is_told_where_none_fits(self):
        """All 36 layers of a prompt of 131072 tokens, laid out whole: 36 x 4096 blocks of 32 KiB."""
        with pytest.raises(ConfigError, match=r"memory_bytes: .*found 0\.0 GiB for.*at least 4\.50 GiB: more memory_b"):
            arguments(kv_dtype="fp8", memory_bytes=1)

    def test_a_smaller_fraction_of_the_memory_holds_fewer_sequences(self):
        small, whole = (
            arguments(kv_dtype="fp8", llm_args={"kv_cache_config": {"free_gpu_memory_fraction": fraction}})
            for fraction in (0.5, 1.0)
        )
        assert small["kv_cache_config"]["free_gpu_memory_fraction"] == 0.5
        assert small["max_batch_size"] < arguments(kv_dtype="fp8")["max_batch_size"] < whole["max_batch_size"]

    def test_graphs_end_at_the_batch_limit(self):
        assert graph_sizes(1) == [1] and graph_sizes(6) == [1, 2, 4, 6] and graph_sizes(8) == [1, 2, 4, 8]
        assert graph_sizes(200)[-4:] == [120, 128, 192, 200]

    def test_humans_win_and_what_follows_follows(self):
        found = arguments(
            llm_args={
                "max_batch_size": 3,
                "cuda_graph_config": None,
                "env_overrides": {"TRTLLM_ENABLE_PDL": "1"},
                "moe_config": {"backend": "CUTLASS"},
            }
        )
        assert (found["max_batch_size"], found["cuda_graph_config"]) == (3, None)
        assert found["moe_config"] == {"backend": "CUTLASS"}
        assert set(found["env_overrides"]) == {"TRTLLM_ENABLE_PDL", "TRTLLM_WINDOW_SIZE_SHARES"}
        assert arguments(llm_args={"max_batch_size": 3})["cuda_graph_config"]["batch_sizes"] == [1, 2, 3]

    def test_the_v2_manager_gets_no_shares(self):
        found = arguments(target="1.3", llm_args={"kv_cache_config": {"use_kv_cache_manager_v2": True}})
        assert found["kv_cache_config"]["use_kv_cache_manager_v2"] is True and "env_overrides" not in found

    def test_the_v1_manager_is_asked_for_where_there_are_two(self):
        """TensorRT-LLM 1.2 has no such key, and refuses arguments that it does not know."""
        found = {line: arguments(target=line)["kv_cache_config"] for line in ("1.2", "1.3", "late")}
        asked = {line: values.get("use_kv_cache_manager_v2", "not said") for line, values in found.items()}
        assert asked == {"1.2": "not said", "1.3": False, "late": False}
        with pytest.raises(ConfigError, match=r"use_kv_cache_manager_v2: not in TensorRT-LLM's line 1.2, only in 1.3"):
            arguments(llm_args={"kv_cache_config": {"use_kv_cache_manager_v2": True}})

    def test_a_model_with_one_window_gets_no_shares(self, tmp_path):
        config = json.loads(MODELS["parent"].read_text())
        config["layer_types"] = ["full_attention"] * 36
        (tmp_path / "config.json").write_text(json.dumps(config))
        found = arguments(tmp_path / "config.json", num_gpus=8, target="1.3")
        assert "env_overrides" not in found and "use_kv_cache_manager_v2" not in found["kv_cache_config"]

    def test_an_evicting_policy_shares_by_the_mean_length(self):
        """No window is counted with more than it keeps, but two prompts of 4096 blocks and two steps are laid out."""
        found = arguments(llm_args={"scheduler_config": {"capacity_scheduler_policy": "MAX_UTILIZATION"}})
        shares = [float(s) for s in found["env_overrides"]["TRTLLM_WINDOW_SIZE_SHARES"].split(",")]
        others = found["max_batch_size"] - 2
        needs = [18 * (8704 + others * 5), 8 * (8704 + others * 257), (others + 2) * 10 * (65536 + 32768) // 32]
        assert shares == pytest.approx([need / sum(needs) for need in needs], abs=0.01)

    def test_fewer_tokens_a_step_make_room_for_more_sequences(self):
        steps = ({"max_num_tokens": tokens} for tokens in (8192, 2048))
        batches = [arguments(kv_dtype="fp8", scenario="short", llm_args=step)["max_batch_size"] for step in steps]
        assert batches[1] > 1.5 * batches[0]

    @pytest.mark.parametrize(
        ("config", "match"),
        [
            ({"gpu": None}, r"gpu: missing key: memory and the expert kernels depend on it"),
            ({"gpu": "h100"}, r"gpu: unknown GPU \(found h100, expected one of: h100-80gb"),
            (
                {"gpu": "l40s-48gb"},
                r"num_gpus: 1 x l40s-48gb cannot hold one sequence of 131072 tokens \(found 0.0 GiB"
                r".*: more GPUs, kv_dtype fp8, or shorter sequences\)",
            ),
            ({"gpu": "l40s-48gb", "kv_dtype": "fp8"}, r"at least 4.50 GiB: more GPUs, or shorter sequences\)"),
            (
                {"llm_args": {"enable_chunked_prefill": False}},
                r"enable_chunked_prefill: a prompt must fit in one step of 8192 .*max_num_tokens of at least 65536",
            ),
            (
                {"llm_args": {"kv_cache_config": {"tokens_per_block": 48}}},
                r"tokens_per_block: its kernels need a power of two \(found 48",
            ),
            (
                {"llm_args": {"max_num_tokens": 255}},
                r"max_num_tokens: .*one of 65536 would wait for ever \(found 255, expected at least 256",
            ),
            ({"llm_args": {"dtype": "float16"}}, r"dtype: .*found float16, expected auto or bfloat16"),
            (
                {"llm_args": {"max_seq_len": 8192, "kv_cache_config": {"max_attention_window": [8192] * 35 + [8193]}}},
                r"max_attention_window\[35\]: longer than max_seq_len: .*found 8193, expected at most 8192",
            ),
            ({"num_gpus": 3}, r"moe_expert_parallel_size: impossible parallelism \(found 3, expected a divisor"),
            ({"num_gpus": 128}, r"expected a divisor of the 64 experts of layer 15"),
            ({"num_gpus": 16}, r"tensor_parallel_size: .*does not repeat KV heads \(found 16"),
            (
                {"num_gpus": 8, "llm_args": {"moe_expert_parallel_size": 1}},
                r"moe_expert_parallel_size: TRITON deals experts out whole \(found 1, expected 8, or .*CUTLASS",
            ),
            (
                {"num_gpus": 8, "llm_args": {"moe_tensor_parallel_size": 8}},
                r"moe_tensor_parallel_size: impossible parallelism \(found 8, expected .* 8 / 8\)",
            ),
            (
                {"llm_args": {"moe_config": {"load_balancer": {"num_slots": 144}}}},
                r"moe_config\.load_balancer: expert load balancing needs one expert count for all layers",
            ),
            ({"llm_args": {"moe_config": {"backed": "TRITON"}}}, r"moe_config\.backed: unknown LLM argument"),
        ],
    )
    def test_what_cannot_work_is_one_line(self, config, match):
        with pytest.raises(ConfigError, match=match) as caught:
            arguments(**config)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (
                {"swiglu_limit": 5.0},
                r"^[^:]+: runtime: the model's swiglu_limit: .* \(found 5.0, expected 7.0, or runtime: reference\)",
            ),
            ({"attention_bias": False}, r"attention_bias: .* \(found False, expected True"),
            ({"rope_scaling": None}, r"rope_scaling.rope_type: .* \(found default, expected yarn"),
        ],
    )
    def test_what_tensorrt_llm_would_compute_otherwise_is_refused(self, tmp_path, change, match):
        """Its gpt-oss has these built in: it would not notice."""
        (tmp_path / "config.json").write_text(json.dumps({**json.loads(CHILD.read_text()), **change}))
        with pytest.raises(ConfigError, match=match):
            arguments(tmp_path / "config.json", kv_dtype="fp8")


class TestPrefixReuse:
    """TensorRT-LLM 1.2's V1 manager takes the blocks found of a prompt in one window for found in all of them."""

    def reuse(self, model=CHILD, **config):
        return arguments(model, **config)["kv_cache_config"]["enable_block_reuse"]

    def test_is_off_in_the_line_that_would_answer_wrongly(self):
        assert self.reuse() is False and self.reuse(MODELS["parent"]) is False
        assert self.reuse(target="1.3") is True and self.reuse(target="late") is True

    def test_is_on_where_nothing_can_be_mixed_up(self, tmp_path):
        config = json.loads(MODELS["parent"].read_text())
        config["layer_types"] = ["full_attention"] * 36
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert self.reuse(tmp_path / "config.json", num_gpus=8) is True

    def test_cannot_be_asked_for_there(self):
        with pytest.raises(ConfigError, match=r"enable_block_reuse: 1.2 mixes up .*found true, expected false, or a"):
            self.reuse(llm_args={"kv_cache_config": {"enable_block_reuse": True}})


class TestCutExperts:
    @pytest.mark.parametrize(
        ("gpu", "expert", "cut", "ending"),
        [
            ("h100-80gb", 4, 2, "are unverified"),
            ("b200-180gb", 1, 8, "are unverified, and 90 MXFP4 blocks do not divide by 8"),
        ],
    )
    def test_only_under_cutlass_and_marked_unverified(self, gpu, expert, cut, ending):
        ranks = {"moe_expert_parallel_size": expert, "moe_tensor_parallel_size": cut}
        found = arguments(gpu=gpu, num_gpus=8, llm_args={"moe_config": {"backend": "CUTLASS"}, **ranks})
        assert found["moe_tensor_parallel_size"] == cut
        (warning,) = warn_of_cut(PuzzleArchitecture.from_path(CHILD), found)
        assert warning.endswith(ending)

    @pytest.mark.parametrize("gpu", ["h100-80gb", "l40s-48gb"])
    @pytest.mark.parametrize("model", MODELS)
    def test_no_block_is_cut_below_blackwell_where_the_loader_would_mix_up_the_scales(self, model, gpu):
        ranks = {"moe_expert_parallel_size": 2, "moe_tensor_parallel_size": 4}
        with pytest.raises(ConfigError, match=r"wrong scales \(found 4, expected a divisor of the experts' 90 blocks"):
            arguments(MODELS[model], gpu=gpu, num_gpus=8, llm_args={"moe_config": {"backend": "CUTLASS"}, **ranks})

    @pytest.mark.parametrize(("model", "match"), [("parent", "TRITON deals experts out whole"), ("child", "wrong")])
    def test_what_auto_becomes_is_held_to_the_same(self, model, match):
        ranks = {"moe_expert_parallel_size": 2, "moe_tensor_parallel_size": 4}
        auto = {"num_gpus": 8, "target": "1.3", "llm_args": {"moe_config": {"backend": "AUTO"}, **ranks}}
        with pytest.raises(ConfigError, match=match):
            arguments(MODELS[model], **auto)

    def test_cut_by_what_expert_parallelism_leaves_over(self):
        whole = arguments(num_gpus=8)
        assert expert_cut(whole) == 1 and warn_of_cut(PuzzleArchitecture.from_path(CHILD), whole) == []
        assert expert_cut({"tensor_parallel_size": 8, "moe_expert_parallel_size": 4}) == 2

    def test_a_parent_may_balance_its_experts(self):
        balanced = {"moe_config": {"load_balancer": {"num_slots": 144}}}
        assert arguments(MODELS["parent"], num_gpus=8, llm_args=balanced)["moe_config"]["load_balancer"]

    @pytest.mark.parametrize(
        ("backend", "target", "warned"),
        [("TRITON", "1.3", True), ("TRITON", "late", True), ("TRITON", "1.2", False), ("CUTLASS", "late", False)],
    )
    def test_kernels_that_newer_lines_will_lose_are_told(self, capsys, backend, target, warned):
        config = EngineConfig(
            runtime="tensorrt_llm", gpu="h100-80gb", scenario="long", target=target,
            llm_args={"moe_config": {"backend": backend}},
        )  # fmt: skip
        explain(CHILD, config=config, quiet=False)
        assert ("deprecated its TRITON expert kernels in 1.3" in capsys.readouterr().err) is warned
