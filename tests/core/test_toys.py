"""The toy checkpoints that other tests stand on: valid, loadable by transformers, and not degenerate."""

from __future__ import annotations

import json

import numpy as np
import pytest

from puzzle_trtllm.checkpoint import Checkpoint
from tests.toys import SPECIAL_TOKENS, TOKENS, VOCAB_SIZE, bf16_bits

PLAIN = [(4, 16), (4, None), (4, 16)]
MIXED = [(8, 16), (6, None), (5, 40), (8, None)]


def test_vocabulary_is_one_token_a_character():
    assert len(set(TOKENS)) == VOCAB_SIZE == 96
    assert len(SPECIAL_TOKENS) == 7


def test_equal_blocks_make_a_plain_gpt_oss(make_checkpoint):
    checkpoint = Checkpoint.open(make_checkpoint(PLAIN))
    checkpoint.validate()
    assert checkpoint.config["model_type"] == "gpt_oss"
    assert "block_configs" not in checkpoint.config
    assert [b.sliding_window for b in checkpoint.architecture.blocks] == [16, None, 16]


@pytest.mark.parametrize("experts_format", ["mxfp4", "bf16"])
def test_unequal_blocks_make_a_puzzle_child(make_checkpoint, experts_format):
    checkpoint = Checkpoint.open(make_checkpoint(MIXED, experts_format=experts_format))
    checkpoint.validate()
    assert checkpoint.config["model_type"] == "gpt_oss_puzzle"
    assert [(b.num_local_experts, b.sliding_window) for b in checkpoint.architecture.blocks] == MIXED


def test_scales_are_written_where_modelopt_puts_them(make_checkpoint):
    checkpoint = Checkpoint.open(make_checkpoint(PLAIN, kv_scales=[(0.5, 2.0), (1.0, 1.0), (3.0, 0.25)]))
    checkpoint.validate()
    name = "model.layers.2.self_attn.k_proj.k_scale"
    assert checkpoint.tensors[name].shape == () and float(checkpoint.numpy(name)) == 3.0
    assert json.loads((checkpoint.path / "hf_quant_config.json").read_text())["quantization"]["quant_algo"] is None


def test_same_seed_same_bytes(make_checkpoint):
    one, two, other = (Checkpoint.open(make_checkpoint(PLAIN, seed=seed)) for seed in (1, 1, 2))
    assert one.fingerprint() == two.fingerprint() != other.fingerprint()


def test_bf16_rounding_is_torchs():
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    expected = torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()
    np.testing.assert_array_equal(bf16_bits(values), expected)


def test_transformers_loads_it_and_its_logits_are_spread(make_checkpoint):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = make_checkpoint(PLAIN)
    config = transformers.Mxfp4Config(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", quantization_config=config
    ).float()  # 4.57 leaves the experts BF16
    tokens = torch.randint(0, VOCAB_SIZE, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(tokens).logits
    assert 1.0 < logits.std() < 4.0
    probabilities = logits.softmax(-1)
    entropy = -(probabilities * probabilities.log()).sum(-1).mean()
    assert 1.0 < entropy < 4.4  # uniform over 96 tokens would be 4.56
