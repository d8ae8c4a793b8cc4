"""The child's configuration in transformers: the released file, every spelling of YaRN and of the blocks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

from puzzle_trtllm.models.huggingface.configuration_gpt_oss_puzzle import GptOssPuzzleConfig
from puzzle_trtllm.models.huggingface.loading import register
from puzzle_trtllm.models.huggingface.modeling_gpt_oss_puzzle import GptOssPuzzleForCausalLM
from puzzle_trtllm.rope import RopeConfig

RELEASED = Path(__file__).parents[1] / "data" / "gpt-oss-puzzle-88b.config.json"


def test_the_released_config_loads(tmp_path):
    register()
    (tmp_path / "config.json").write_bytes(RELEASED.read_bytes())
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, GptOssPuzzleConfig)
    assert config.block_configs == json.loads(RELEASED.read_text())["block_configs"]
    assert config.windows.count(128) == 18 and config.windows.count(8192) == 8 and config.windows.count(None) == 10
    assert config.layer_config(15).num_local_experts == 64
    with torch.device("meta"):
        model = GptOssPuzzleForCausalLM(config)
    # the published count of parameters (BF16 experts have no scale tensors)
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 2) == 88.15


def rope_block(config: GptOssPuzzleConfig) -> dict[str, object]:
    """transformers 5 calls it rope_parameters, 4.57 rope_scaling."""
    return getattr(config, "rope_parameters", None) or config.rope_scaling


def test_config_survives_a_round_trip(tmp_path):
    config = GptOssPuzzleConfig(**json.loads(RELEASED.read_text()))
    config.save_pretrained(tmp_path)
    again = GptOssPuzzleConfig.from_pretrained(tmp_path)
    assert again.block_configs == config.block_configs
    assert rope_block(again) == rope_block(config)
    assert again.to_dict() == config.to_dict()


YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 4096,
}


@pytest.mark.parametrize("truncate", [None, False, True])
@pytest.mark.parametrize("number", [int, float])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("type_key", ["rope_type", "type"])
def test_every_spelling_of_yarn_gives_the_same_frequencies(key, number, truncate, type_key):
    block = {k: number(v) if k in ("factor", "beta_fast", "beta_slow") else v for k, v in YARN.items()}
    block[type_key] = block.pop("rope_type")
    if truncate is not None:
        block["truncate"] = truncate
    config = {key: block} | ({"rope_theta": 150000} if key == "rope_scaling" else {})
    if key == "rope_parameters":
        block["rope_theta"] = number(150000)
    made = GptOssPuzzleConfig(**json.loads(json.dumps(config)), head_dim=64)
    rotary = GptOssRotaryEmbedding(made)
    ours = RopeConfig.from_config(config, source="test")
    assert torch.equal(rotary.inv_freq, torch.from_numpy(ours.inverse_frequencies(64)))
    assert rotary.attention_scaling == pytest.approx(ours.attention_scaling, abs=0)
    assert rope_block(made)["factor"] == 32.0 and isinstance(rope_block(made)["factor"], float)


def test_nested_block_configs_are_flattened():
    nested = [
        {"attention": {"sliding_window": 8}, "ffn": {"moe": {"num_local_experts": 4}}},
        {"ffn": {"moe": {"num_local_experts": 6}}},
    ]
    config = GptOssPuzzleConfig(block_configs=nested)
    assert config.block_configs == [
        {"num_local_experts": 4, "sliding_window": 8},
        {"num_local_experts": 6, "sliding_window": None},
    ]
    assert (config.num_hidden_layers, config.num_local_experts, config.sliding_window) == (2, 6, 8)


def test_without_block_configs_it_is_plain_gpt_oss():
    assert GptOssPuzzleConfig().block_configs[:2] == [
        {"num_local_experts": 128, "sliding_window": 128},
        {"num_local_experts": 128, "sliding_window": None},
    ]


def test_either_name_of_top_k():
    assert GptOssPuzzleConfig(experts_per_token=2).num_experts_per_tok == 2
    assert GptOssPuzzleConfig(experts_per_token=2, num_experts_per_tok=3).num_experts_per_tok == 3


def test_contradicting_layer_counts_are_refused():
    with pytest.raises(ValueError, match="block_configs has 1 entries, num_hidden_layers is 2"):
        GptOssPuzzleConfig(block_configs=[{"num_local_experts": 4, "sliding_window": 8}], num_hidden_layers=2)
    with pytest.raises(ValueError, match="integer num_local_experts"):
        GptOssPuzzleConfig(block_configs=[{"sliding_window": 8}])
    with pytest.raises(ValueError, match="block_configs, found per_layer_config alone"):
        GptOssPuzzleConfig(per_layer_config={"0": {"sliding_window": 8}})
