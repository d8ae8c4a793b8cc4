"""The TensorRT-LLM plugin's own logic, on a stand-in for exactly the upstream interfaces in its table."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import GptOssConfig

from puzzle_trtllm import mxfp4
from puzzle_trtllm.errors import CheckpointError, EngineError
from puzzle_trtllm.models.trtllm.experts import moe_weights
from puzzle_trtllm.models.trtllm.layers import layer_plans
from puzzle_trtllm.models.trtllm.symbols import check, resolve
from puzzle_trtllm.models.trtllm.upstream import ALL_LINES, REQUIREMENTS, Requirement
from tests.models import trtllm_standin as upstream

RELEASED = Path(__file__).parents[1] / "data" / "gpt-oss-puzzle-88b.config.json"
BLOCKS = [(4, 128), (4, None), (2, 128), (4, 8192), (2, None)]
PLAIN = [(4, 128), (4, None), (4, 128), (4, None)]


@pytest.fixture(params=["1.2", "late"])
def plugin(request, monkeypatch):
    """The plugin, imported against the stand-in of one line."""
    upstream.install(monkeypatch, request.param)
    module = importlib.import_module("puzzle_trtllm.models.trtllm.modeling")
    yield module
    sys.modules.pop("puzzle_trtllm.models.trtllm.modeling", None)


def config_of(folder, **changes):
    """The serving copy's config as TensorRT-LLM loads it: GptOssConfig, which keeps unknown keys."""
    config = json.loads((folder / "config.json").read_text())
    config = {**config, "model_type": "gpt_oss", "architectures": ["GptOssPuzzleForCausalLM"], **changes}
    config.pop("quantization_config", None)
    loaded = GptOssConfig(**config)
    # What transformers 4.57 has and newer versions renamed; TensorRT-LLM pins its own.
    loaded.torch_dtype = torch.bfloat16
    return loaded


def weights_of(folder):
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def build(plugin, folder, *, load=True, quant_algo=None, moe_backend="CUTLASS", weights=None, **mapping):
    config = upstream.ModelConfig(
        pretrained_config=config_of(folder),
        mapping=upstream.Mapping(**mapping),
        quant_config=upstream.QuantConfig(quant_algo),
        moe_backend=moe_backend,
    )
    config._frozen = True
    model = plugin.GptOssPuzzleForCausalLM(config)
    if load:
        model.load_weights(weights_of(folder) if weights is None else weights)
    return model


def experts_of(block):
    return getattr(block.mlp.experts, "backend", block.mlp.experts)


class TestTable:
    def test_the_stand_in_is_what_the_table_says(self, plugin):
        findings = [check(row) for row in REQUIREMENTS]
        assert [(f.requirement.key, f.problems) for f in findings if not f.holds] == []

    def test_rows_have_one_name_and_say_what_for(self):
        assert len({row.key for row in REQUIREMENTS}) == len(REQUIREMENTS)
        for row in REQUIREMENTS:
            assert row.needed_for and row.source.startswith("tensorrt_llm/") and set(row.lines) <= set(ALL_LINES)

    @pytest.mark.parametrize(
        ("changed", "problem"),
        [
            ({"modules": ("tensorrt_llm.nowhere",)}, "nowhere"),
            ({"path": "GptOssForCausalLM.load_wieghts"}, "AttributeError"),
            ({"path": "GptOssForCausalLM.load_weights", "parameters": ("weights", "mapper")}, "no parameter mapper"),
            ({"mentions": ("self.no_such_attribute",)}, "no longer mentions self.no_such_attribute"),
        ],
    )
    def test_a_row_that_does_not_hold_is_told(self, plugin, changed, problem):
        row = {"key": "x", "modules": ("tensorrt_llm._torch.models.modeling_gpt_oss",), "path": "GptOssForCausalLM"}
        row = Requirement(**{**row, "needed_for": "test", "source": "tensorrt_llm/x.py", **changed})
        finding = check(row)
        assert not finding.holds and problem in "; ".join(finding.problems)

    def test_parameters_in_another_order_are_told(self, plugin):
        row = Requirement(
            key="x",
            modules=("tensorrt_llm._torch.models.modeling_gpt_oss",),
            path="TransformerBlock.__init__",
            parameters=("layer_idx", "config"),
            needed_for="test",
            source="tensorrt_llm/x.py",
        )
        assert "another order" in check(row).problems[0]

    def test_without_tensorrt_llm_every_row_fails_in_one_line(self):
        row = REQUIREMENTS[0]
        assert "No module named 'tensorrt_llm'" in check(row).problems[0]
        with pytest.raises(EngineError, match=r"register_auto_model: this TensorRT-LLM does not fit .* doctor"):
            resolve(row)


class TestModel:
    def test_registered_under_our_name(self, plugin):
        assert upstream.REGISTRY["GptOssPuzzleForCausalLM"] is plugin.GptOssPuzzleForCausalLM
        assert plugin.GptOssPuzzleForCausalLM.__module__ == "puzzle_trtllm.models.trtllm.modeling"

    def test_every_layer_follows_its_own_block(self, plugin, make_checkpoint):
        model = build(plugin, make_checkpoint(BLOCKS), moe_ep_size=2, tp_size=2)
        blocks = model.model.block
        assert [b.attn.sliding_window for b in blocks] == [128, None, 128, 8192, None]
        assert [b.mlp.gate.weight.shape[0] for b in blocks] == [4, 4, 2, 4, 2]
        assert [experts_of(b).num_experts for b in blocks] == [4, 4, 2, 4, 2]
        for name in ("swiglu_alpha", "swiglu_beta", "swiglu_limit"):
            assert [len(getattr(b.mlp, name)) for b in blocks] == [2, 2, 1, 2, 1]
        assert model.post_init_done and model.model.model_config is model.model_config

    def test_the_shared_config_is_not_touched_and_layers_register_in_one_place(self, plugin, make_checkpoint):
        model = build(plugin, make_checkpoint(BLOCKS), load=False)
        config = model.model_config.pretrained_config
        assert (config.num_local_experts, config.num_hidden_layers) == (4, 5)
        assert list(model.model_config.extra_attrs["attn_layers"]) == [0, 1, 2, 3, 4]

    def test_a_homogeneous_model_is_built_as_upstream_builds_it(self, plugin, make_checkpoint):
        folder = make_checkpoint(PLAIN)
        ours = build(plugin, folder, load=False)
        theirs = upstream.GptOssForCausalLM(upstream.ModelConfig(pretrained_config=config_of(folder)))
        assert [(n, p.shape) for n, p in ours.named_parameters()] == [
            (n, p.shape) for n, p in theirs.named_parameters()
        ]
        for mine, other in zip(ours.model.block, theirs.model.block, strict=True):
            assert mine.attn.sliding_window == other.attn.sliding_window

    def test_new_router_widths_take_the_plain_linear(self, plugin, make_checkpoint, monkeypatch):
        monkeypatch.setattr("puzzle_trtllm.models.trtllm.layers.UPSTREAM_NUM_EXPERTS", frozenset({4}))
        model = build(plugin, make_checkpoint(BLOCKS))
        x = torch.randn(3, 64, dtype=torch.bfloat16)
        for block, (count, _) in zip(model.model.block, BLOCKS, strict=True):
            plain = torch.nn.functional.linear(x, block.mlp.gate.weight, block.mlp.gate.bias)
            expected = plain if count != 4 else torch.ones_like(plain)
            assert torch.equal(block.mlp.compute_gate_output(x), expected)
            assert torch.equal(block.mlp.compute_gate_output(x, lora_params=None), expected)
        assert not any(name.endswith("compute_gate_output") for name, _ in model.named_modules())

    def test_the_plain_router_hands_lora_on(self, plugin, make_checkpoint, monkeypatch):
        monkeypatch.setattr("puzzle_trtllm.models.trtllm.layers.UPSTREAM_NUM_EXPERTS", frozenset())
        mlp = build(plugin, make_checkpoint(BLOCKS)).model.block[3].mlp
        x = torch.randn(3, 64, dtype=torch.bfloat16)
        found = mlp.compute_gate_output(x, lora_params={"delta": 2.0})
        assert torch.equal(found, mlp.gate(x) + 2.0 + 3)

    @pytest.mark.parametrize(
        ("mapping", "match"),
        [
            (
                {"moe_ep_size": 4},
                r"moe_expert_parallel_size on layer 2: .*found 4, expected a divisor of its 2 experts",
            ),
            ({"tp_size": 4}, r"tensor_parallel_size: .*found 4, expected a divisor of 4 heads and 2 KV heads"),
            ({"pp_size": 2}, r"pipeline_parallel_size: .*found 2, expected 1"),
        ],
    )
    def test_impossible_layouts_are_refused(self, plugin, make_checkpoint, mapping, match):
        with pytest.raises(EngineError, match=match):
            build(plugin, make_checkpoint(BLOCKS), load=False, **mapping)

    def test_an_mxfp4_block_is_not_cut_where_upstream_mixes_up_the_scales(self, plugin, make_checkpoint):
        folder = make_checkpoint(BLOCKS, intermediate_size=96)  # three blocks
        cut = {"load": False, "tp_size": 2, "moe_tp_size": 2}
        with pytest.raises(EngineError, match=r"moe_tensor.*found 2, expected a divisor of the experts' 3 MXFP4 "):
            build(plugin, folder, quant_algo="W4A16_MXFP4", **cut)
        build(plugin, folder, quant_algo="W4A16_MXFP4", moe_backend="TRITON", **cut)
        build(plugin, folder, quant_algo="W4A8_MXFP4_MXFP8", **cut)

    def test_attention_data_parallelism_deals_out_no_heads(self, plugin, make_checkpoint):
        model = build(plugin, make_checkpoint(BLOCKS), tp_size=4, moe_ep_size=2, enable_attention_dp=True)
        assert model.model.block[0].attn.sinks.shape == (4,)

    def test_expert_load_balancing_is_refused(self, plugin, make_checkpoint):
        config = upstream.ModelConfig(
            pretrained_config=config_of(make_checkpoint(BLOCKS)), moe_load_balancer={"num_slots": 8}
        )
        with pytest.raises(EngineError, match=r"moe_config\.load_balancer: .*one expert count for all layers"):
            plugin.GptOssPuzzleForCausalLM(config)


class TestLoading:
    @pytest.mark.parametrize("experts_format", ["mxfp4", "bf16"])
    @pytest.mark.parametrize("rank", [0, 1])
    def test_every_parameter_is_filled_once_with_its_ranks_part(self, plugin, make_checkpoint, experts_format, rank):
        folder = make_checkpoint(BLOCKS, experts_format=experts_format)
        tensors = weights_of(folder)
        model = build(plugin, folder, tp_size=2, tp_rank=rank, moe_ep_size=2, moe_ep_rank=rank)
        counted = [m for m in model.modules() if isinstance(m, upstream.Counted)]
        assert {m.fills for m in counted} == {1}
        unfilled = [n for n, p in model.named_parameters() if p.isnan().any()]
        assert unfilled == [f"model.block.{i}.next_layer_layernorm.weight" for i in range(5)]
        for i, block in enumerate(model.model.block):
            attn = f"model.layers.{i}.self_attn"
            assert torch.equal(block.attn.sinks, tensors[f"{attn}.sinks"][2 * rank : 2 * rank + 2].float())
            own = [t.chunk(2)[rank] for t in (tensors[f"{attn}.{x}_proj.weight"] for x in "qkv")]
            assert torch.equal(block.attn.qkv_proj.weight, torch.cat(own))
            assert torch.equal(block.mlp.gate.bias, tensors[f"model.layers.{i}.mlp.router.bias"])
            assert torch.equal(block.attn.norm.weight, tensors[f"model.layers.{i}.input_layernorm.weight"].float())
        assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])
        assert torch.equal(model.model.embedding.weight, tensors["model.embed_tokens.weight"])

    def test_experts_are_the_checkpoints_de_interleaved_and_transposed(self, plugin, make_checkpoint):
        """Oracle: dequantize the file's own tensors with numpy, take even rows as gate and odd rows as up."""
        folder = make_checkpoint(BLOCKS)
        tensors = {
            name: t.float().numpy() if t.dtype == torch.bfloat16 else t.numpy()
            for name, t in weights_of(folder).items()
        }
        model = build(plugin, folder, moe_ep_size=2, moe_ep_rank=1)
        for i, (count, _) in enumerate(BLOCKS):
            name = f"model.layers.{i}.mlp.experts."
            loaded = experts_of(model.model.block[i]).loaded
            assert sorted(loaded["gate_up_proj"]) == list(range(count // 2, count))
            for e in loaded["gate_up_proj"]:
                raw = tensors[f"{name}gate_up_proj_blocks"][e], tensors[f"{name}gate_up_proj_scales"][e]
                rows = mxfp4.dequantize(*raw)
                expected = np.concatenate([rows[0::2], rows[1::2]])
                assert np.array_equal(
                    dequantized(loaded["gate_up_proj"][e], loaded["gate_up_proj_weight_scale"][e]), expected
                )
                raw = tensors[f"{name}down_proj_blocks"][e], tensors[f"{name}down_proj_scales"][e]
                assert np.array_equal(
                    dequantized(loaded["down_proj"][e], loaded["down_proj_weight_scale"][e]), mxfp4.dequantize(*raw)
                )
                bias = tensors[f"{name}gate_up_proj_bias"][e]
                assert np.array_equal(
                    loaded["gate_up_proj.bias"][e].float().numpy(), np.concatenate([bias[0::2], bias[1::2]])
                )

    def test_bf16_experts_keep_their_orientation(self):
        gate_up = torch.arange(2 * 3 * 4.0).reshape(2, 3, 4)  # [E, D, 2F]
        tensors = {
            "gate_up_proj": gate_up,
            "gate_up_proj_bias": torch.tensor([[0.0, 1, 2, 3]] * 2),
            "down_proj": torch.arange(2 * 2 * 3.0).reshape(2, 2, 3),
            "down_proj_bias": torch.zeros(2, 3),
        }
        weights = moe_weights(tensors, local_experts=[1], dtype=torch.bfloat16)
        assert weights["gate_up_proj"][0] is None and weights["gate_up_proj"][1].dtype == torch.bfloat16
        assert weights["gate_up_proj"][1].tolist() == [[12, 14, 13, 15], [16, 18, 17, 19], [20, 22, 21, 23]]
        assert weights["gate_up_proj.bias"][1].tolist() == [0, 2, 1, 3]
        assert weights["down_proj"][1].tolist() == [[6, 7, 8], [9, 10, 11]]

    def test_w4a16_gets_its_scales_by_expert(self, plugin, make_checkpoint):
        folder = make_checkpoint(BLOCKS)
        scales = weights_of(folder)["model.layers.2.mlp.experts.gate_up_proj_scales"]
        model = build(plugin, folder, quant_algo="W4A16_MXFP4")
        loaded = experts_of(model.model.block[2]).loaded
        assert torch.equal(loaded["w1"][1], scales[1, 0::2]) and torch.equal(loaded["w3"][1], scales[1, 1::2])
        down = weights_of(folder)["model.layers.2.mlp.experts.down_proj_scales"]
        assert torch.equal(loaded["w2"][1], down[1]) and not torch.equal(down[0], down[1])

    def test_kv_scales_are_dropped_by_name(self, plugin, make_checkpoint):
        build(plugin, make_checkpoint(BLOCKS, kv_scales=[(1.0, 2.0)] * 5))

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (
                lambda w: w.pop("model.layers.3.mlp.router.bias"),
                r"missing \(found 1, first model\.layers\.3\.mlp\.router\.bias",
            ),
            (lambda w: w.pop("model.layers.3.self_attn.sinks"), r"tensors are missing \(found 1, first model.layers.3"),
            (
                lambda w: w.update({"model.layers.0.surprise": torch.ones(1)}),
                r"layers\.0\.surprise: .* no module takes",
            ),
            (lambda w: w.update({"model.layers.5.input_layernorm.weight": torch.ones(1)}), "no module takes"),
        ],
    )
    def test_totality_of_tensors(self, plugin, make_checkpoint, change, match):
        folder = make_checkpoint(BLOCKS)
        weights = weights_of(folder)
        change(weights)
        with pytest.raises(CheckpointError, match=match):
            build(plugin, folder, weights=weights)

    def test_expert_tensors_must_have_the_configs_count(self, plugin, make_checkpoint):
        folder = make_checkpoint(BLOCKS)
        weights = {n: t[:3] if ".layers.1.mlp.experts." in n else t for n, t in weights_of(folder).items()}
        with pytest.raises(CheckpointError, match=r"block\.1\.mlp\.experts: .*found 3, expected 4"):
            build(plugin, folder, weights=weights)

    def test_expert_tensors_of_one_layer_must_agree_on_their_number(self, plugin, make_checkpoint):
        folder = make_checkpoint(BLOCKS)
        weights = weights_of(folder)
        name = "model.layers.1.mlp.experts.down_proj_bias"
        with pytest.raises(CheckpointError, match=r"of one layer disagree on their number .*'down_proj_bias': 3"):
            build(plugin, folder, weights={**weights, name: weights[name][:3]})

    def test_a_module_that_upstream_added_is_noticed(self, plugin, make_checkpoint):
        folder = make_checkpoint(BLOCKS)
        model = build(plugin, folder, load=False)
        model.model.block[1].attn.new_norm = upstream.RMSNorm(8)
        with pytest.raises(EngineError, match=r"block\.1\.attn\.new_norm: .*does not know"):
            model.load_weights(weights_of(folder))

    def test_experts_that_would_be_filled_twice_are_noticed(self, plugin, make_checkpoint):
        """A wrapper with parameters of its own beside its backend's: one of the two would be filled wrongly."""
        folder = make_checkpoint(BLOCKS)
        model = build(plugin, folder, load=False)
        mlp = model.model.block[1].mlp
        mlp.experts = torch.nn.Module()
        mlp.experts.weight = torch.nn.Parameter(torch.zeros(1))
        mlp.experts.load_weights = lambda weights: None
        mlp.experts.backend = upstream.MoE(4, upstream.Mapping(), None)
        with pytest.raises(EngineError, match=r"block\.1\.mlp\.experts\.backend: .*met twice"):
            model.load_weights(weights_of(folder))

    def test_a_module_that_upstream_removed_is_noticed(self, plugin, make_checkpoint):
        folder = make_checkpoint(BLOCKS)
        model = build(plugin, folder, load=False)
        del model.model.block[1].attn.norm
        with pytest.raises(EngineError, match=r"expected and not found \(found model\.block\.1\.attn\.norm\)"):
            model.load_weights(weights_of(folder))

    def test_a_tied_head_is_filled_from_the_embedding_or_is_no_module_of_its_own(self, plugin, make_checkpoint):
        folder = make_checkpoint(BLOCKS, tie_word_embeddings=True)
        model = build(plugin, folder)
        assert torch.equal(model.lm_head.weight, weights_of(folder)["model.embed_tokens.weight"])
        model = build(plugin, folder, load=False)
        del model.lm_head
        model.load_weights(weights_of(folder))

    def test_a_head_that_is_not_tied_must_be_there(self, plugin, make_checkpoint):
        folder = make_checkpoint(BLOCKS)
        model = build(plugin, folder, load=False)
        assert not torch.equal(*(weights_of(folder)[f"{n}.weight"] for n in ("lm_head", "model.embed_tokens")))
        del model.lm_head
        with pytest.raises(EngineError, match=r"expected and not found \(found lm_head\)"):
            model.load_weights(weights_of(folder))

    def test_a_norm_may_have_parameters_that_are_none_and_no_others(self, plugin, make_checkpoint):
        folder = make_checkpoint(BLOCKS)
        model = build(plugin, folder, load=False)
        norm = model.model.block[1].attn.norm
        norm.register_parameter("bias", None)
        model.load_weights(weights_of(folder))
        assert torch.equal(norm.weight, weights_of(folder)["model.layers.1.input_layernorm.weight"].float())
        model = build(plugin, folder, load=False)
        model.model.block[1].attn.norm.bias = torch.nn.Parameter(torch.zeros(64))
        with pytest.raises(EngineError, match=r"block\.1\.attn\.norm: other parameters than expected"):
            model.load_weights(weights_of(folder))

    def test_a_draft_model_is_left_alone(self, plugin, make_checkpoint):
        folder = make_checkpoint(BLOCKS)
        model = build(plugin, folder, load=False)
        model.draft_model = upstream.RMSNorm(4)
        model.draft_model.inner = upstream.RMSNorm(4)
        model.load_weights(weights_of(folder))


def dequantized(packed, scales):
    """[in/2, out] bytes and [in/32, out] scales -> float32 [out, in], by the codec that the file tests use."""
    blocks = packed.transpose(0, 1).contiguous().unflatten(-1, (-1, 16)).numpy()
    return mxfp4.dequantize(blocks, scales.transpose(0, 1).contiguous().numpy())


def test_the_released_child_has_the_published_plan():
    config = GptOssConfig(**json.loads(RELEASED.read_text()))
    plans = layer_plans(config)
    assert [p.num_experts for p in plans] == [128] * 15 + [64, 128, 64, 128, 64, 128] + [64] * 15
    assert [p.layer for p in plans if p.window == 8192] == [3, 5, 21, 23, 27, 31, 33, 35]
    assert {p.num_experts for p in plans if p.plain_router} == {64}


def test_everything_but_modeling_is_importable_without_torch_or_tensorrt_llm():
    code = (
        "import sys, puzzle_trtllm.models.trtllm.layers, puzzle_trtllm.models.trtllm.names, "
        "puzzle_trtllm.models.trtllm.symbols; "
        "print([m for m in ('torch', 'transformers', 'tensorrt_llm', 'rich') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
