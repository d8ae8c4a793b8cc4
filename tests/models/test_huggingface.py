"""The transformers child: equal to GptOss where GptOss can say it, right by an independent mask where it cannot."""

from __future__ import annotations

import inspect
import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GptOssConfig, GptOssForCausalLM, StaticCache
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.models.gpt_oss.modeling_gpt_oss import load_balancing_loss_func

from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.errors import CheckpointError
from puzzle_trtllm.models.huggingface.configuration_gpt_oss_puzzle import GptOssPuzzleConfig
from puzzle_trtllm.models.huggingface.loading import experts_EIO, load_causal_lm, load_child, register
from puzzle_trtllm.models.huggingface.modeling_gpt_oss_puzzle import (
    GptOssPuzzleForCausalLM,
    balancing_loss,
    puzzle_cache,
)
from tests.toys import write_overrides_by_layer

CHILD = [(6, 5), (4, None), (2, 3), (5, 17), (3, 1)]
EQUAL = [(4, 6), (4, None), (4, 6), (4, None)]


@pytest.fixture(scope="module")
def child(make_checkpoint) -> Path:
    return make_checkpoint(CHILD)


@pytest.fixture(scope="module")
def model(child) -> GptOssPuzzleForCausalLM:
    return load_causal_lm(child, dtype=torch.float32)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(7, 90, (2, 60), generator=torch.Generator().manual_seed(0))


# -- equal to gpt-oss when all layers are equal ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def equal_pair(make_checkpoint) -> tuple[GptOssForCausalLM, GptOssPuzzleForCausalLM]:
    folder = make_checkpoint(EQUAL)
    parent = load_causal_lm(folder, dtype=torch.float32)
    config = json.loads((folder / "config.json").read_text())
    blocks = [{"num_local_experts": n, "sliding_window": w} for n, w in EQUAL]
    config.update(model_type="gpt_oss_puzzle", block_configs=blocks)
    (folder / "config.json").write_text(json.dumps(config))
    return parent, load_causal_lm(folder, dtype=torch.float32)


@torch.no_grad()
def test_equal_layers_give_gpt_oss_bit_for_bit(equal_pair, tokens):
    parent, child = equal_pair
    assert type(parent) is GptOssForCausalLM and type(child) is GptOssPuzzleForCausalLM
    padding = torch.ones_like(tokens)
    padding[0, :9] = 0
    assert torch.equal(parent(tokens).logits, child(tokens).logits)
    assert torch.equal(parent(tokens, attention_mask=padding).logits, child(tokens, attention_mask=padding).logits)


def test_equal_layers_generate_the_same(equal_pair, tokens):
    padding = torch.ones_like(tokens)
    padding[1, :20] = 0
    options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
    options.update(attention_mask=padding, output_logits=True, return_dict_in_generate=True)
    parent, child = (model.generate(tokens, **options) for model in equal_pair)
    assert parent.sequences.shape == (2, 90)
    assert torch.equal(parent.sequences, child.sequences)
    assert torch.equal(torch.stack(parent.logits), torch.stack(child.logits))


def test_forward_names_what_gpt_oss_names():
    """`generate` and Trainer read the signature: what it does not name, they neither make nor keep."""
    theirs, ours = (set(inspect.signature(c.forward).parameters) for c in (GptOssForCausalLM, GptOssPuzzleForCausalLM))
    assert theirs - ours <= {"cache_position"}  # which transformers 4 alone has


def test_generate_computes_no_logits_of_the_prompt_but_the_last(model, tokens):
    lengths = []
    hook = model.lm_head.register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape[1]))
    model.generate(tokens, max_new_tokens=3, do_sample=False, eos_token_id=None)
    hook.remove()
    assert set(lengths) == {1}


@pytest.mark.parametrize("attribute", ["_experts_implementation", "_attn_implementation"])
def test_equal_layers_compute_in_the_same_way(equal_pair, attribute):
    """transformers decides by a look at a model's source file, and ours is not gpt-oss's."""
    parent, child = (getattr(model.config, attribute, None) for model in equal_pair)
    assert child == parent


def test_experts_implementation_can_be_chosen(model, tokens):
    if not hasattr(model, "set_experts_implementation"):
        pytest.skip("transformers before 5 has one implementation of experts")
    with torch.no_grad():
        grouped = model(tokens).logits
        model.set_experts_implementation("eager")
        one_by_one = model(tokens).logits
    model.set_experts_implementation("grouped_mm")
    torch.testing.assert_close(grouped, one_by_one, atol=1e-4, rtol=1e-4)


# -- devices -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_no_tensor_is_made_on_a_device_of_its_own(child, monkeypatch):
    """Operations on the meta device refuse tensors of any other, as they do on a GPU."""
    monkeypatch.setattr(torch, "autocast", lambda **_: nullcontext())  # transformers 4.57 turns it off; meta has none
    config = load_causal_lm(child).config
    with torch.device("meta"):
        model = GptOssPuzzleForCausalLM(config).eval().to(torch.bfloat16)  # grouped products have no other dtype there
    tokens, cache = torch.zeros((2, 30), dtype=torch.long, device="meta"), puzzle_cache(config)
    prefill = model(tokens, past_key_values=cache, use_cache=True).logits
    decode = model(tokens[:, :1], past_key_values=cache, use_cache=True).logits
    assert {prefill.device.type, decode.device.type, *(c.keys.device.type for c in cache.layers)} == {"meta"}
    assert decode.shape == (2, 1, config.vocab_size)


@pytest.mark.gpu
@torch.no_grad()
def test_on_a_gpu_as_on_the_cpu(child, tokens):
    on_cpu, on_gpu = load_causal_lm(child), load_causal_lm(child).to("cuda")
    if hasattr(on_gpu, "set_experts_implementation"):
        on_gpu.set_experts_implementation("eager")  # grouped products of float32 are none of CUDA's
    torch.testing.assert_close(on_gpu(tokens.cuda()).logits.cpu(), on_cpu(tokens).logits, atol=1e-3, rtol=1e-3)
    options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached, plain = (on_gpu.generate(tokens.cuda(), use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain)


# -- layers that differ ------------------------------------------------------------------------------------------------


def test_each_layer_has_its_own_experts_and_window(model):
    assert [layer.mlp.experts.num_experts for layer in model.model.layers] == [6, 4, 2, 5, 3]
    assert [layer.mlp.router.weight.shape[0] for layer in model.model.layers] == [6, 4, 2, 5, 3]
    assert [layer.self_attn.sliding_window for layer in model.model.layers] == [5, None, 3, 17, 1]


@torch.no_grad()
def test_a_layer_sees_its_window_and_no_further(model, tokens):
    """The eager attention probabilities of layer i are zero exactly where key <= query - window or key > query."""
    attentions = model(tokens, output_attentions=True).attentions
    query, key = torch.arange(60)[:, None], torch.arange(60)[None, :]
    for (_, window), probabilities in zip(CHILD, attentions, strict=True):
        visible = (key <= query) & (key > query - (window or 60))
        assert torch.equal(probabilities > 0, visible.expand_as(probabilities))


def plain_layer(model: GptOssPuzzleForCausalLM, layer_idx: int) -> torch.nn.Module:
    """The only layer of a plain GptOss with this layer's expert count and window, and its weights."""
    num_experts, window = CHILD[layer_idx]
    known = GptOssConfig().to_dict()
    settings = {key: value for key, value in model.config.to_dict().items() if key in known and key != "model_type"}
    settings.update(num_local_experts=num_experts, sliding_window=window or 128, num_hidden_layers=1)
    settings.update(layer_types=["sliding_attention" if window else "full_attention"])
    plain = GptOssForCausalLM(GptOssConfig(**settings))
    plain.set_attn_implementation("eager")
    plain.model.layers[0].load_state_dict(model.model.layers[layer_idx].state_dict())
    return plain.model.layers[0].eval()


@torch.no_grad()
def test_the_child_is_gpt_oss_layer_by_layer(model, tokens):
    hidden = model.model.embed_tokens(tokens)
    position_embeddings = model.model.rotary_emb(hidden, torch.arange(60)[None])
    captured = model.model(tokens, output_hidden_states=True).hidden_states
    query, key = torch.arange(60)[:, None], torch.arange(60)[None, :]
    for i, (_, window) in enumerate(CHILD[:-1]):  # the last hidden state is normalised
        visible = (key <= query) & (key > query - (window or 60))
        mask = torch.zeros(1, 1, 60, 60).masked_fill(~visible, torch.finfo(torch.float32).min)
        hidden = plain_layer(model, i)(hidden, attention_mask=mask, position_embeddings=position_embeddings)
        assert torch.equal(hidden, captured[i + 1]), f"layer {i}"


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[60], [1] * 60, [10, 7, 1, 1, 41], [30, 30]])
def test_cached_steps_equal_one_pass(model, tokens, chunks):
    expected = model(tokens, use_cache=False).logits
    cache, found = puzzle_cache(model.config), []
    for chunk in tokens.split(chunks, dim=1):
        found.append(model(chunk, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=2e-5, rtol=0)


@torch.no_grad()
def test_the_cache_keeps_each_layers_window(model, tokens):
    cache = model(tokens, use_cache=True).past_key_values
    # a window layer keeps the w - 1 tokens that the next query still sees beside its own
    assert [layer.keys.shape[-2] for layer in cache.layers] == [4, 60, 2, 16, 1]


def test_generate_with_and_without_cache(model, tokens):
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    padding = torch.ones_like(tokens)
    padding[0, :25] = 0
    cached = model.generate(tokens, attention_mask=padding, **options)
    assert torch.equal(cached, model.generate(tokens, attention_mask=padding, use_cache=False, **options))
    # left padding moves a sequence, it does not change what follows it
    alone = model.generate(tokens[:1, 25:], **options)
    assert torch.equal(cached[0, 60:], alone[0, 35:])


@pytest.mark.parametrize("draft", ["child", "prompt"])
def test_assisted_generation_is_greedy_generation(model, tokens, draft):
    """Both caches go back beyond the windows when drafted tokens are refused."""
    if draft == "child" and transformers.__version__.startswith("5.17."):
        pytest.skip("its masks do not fit a drafting cache that is full, gpt-oss's neither")
    options = {"max_new_tokens": 40, "do_sample": False}
    drafting = {"assistant_model": model} if draft == "child" else {"prompt_lookup_num_tokens": 4}
    prompt = torch.cat([tokens[:1], tokens[:1, :20]], dim=1)
    assert torch.equal(model.generate(prompt, **options, **drafting), model.generate(prompt, **options))


@pytest.mark.parametrize("make", [DynamicCache, partial(StaticCache, max_cache_len=80)])
def test_a_cache_that_forgets_too_early_is_refused(model, tokens, make):
    one_window = make(config=GptOssConfig(num_hidden_layers=5, sliding_window=4))
    with pytest.raises(ValueError, match="keeps 4 tokens in layer 0, whose window is 5"):
        model(tokens, past_key_values=one_window)


@pytest.mark.parametrize("given", [False, True])
def test_generate_with_a_static_cache_is_right_or_refused(model, tokens, given):
    """transformers 5.23 gives each layer its window, 4.57 gives all the smallest."""
    options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
    padding = torch.ones_like(tokens)
    padding[0, :25] = 0
    expected = model.generate(tokens, attention_mask=padding, **options)
    cache = StaticCache(config=model.config, max_cache_len=90)
    static = {"past_key_values": cache} if given else {"cache_implementation": "static"}
    if [layer.max_cache_len for layer in cache.layers] != [5, 90, 3, 17, 1]:
        with pytest.raises(ValueError, match="past_key_values keeps"):
            model.generate(tokens, attention_mask=padding, **options, **static)
    else:
        assert torch.equal(model.generate(tokens, attention_mask=padding, **options, **static), expected)


def test_continuous_batching_is_refused(model, tokens):
    with pytest.raises(ValueError, match="continuous batching cannot hold a window per layer"):
        model.generate_batch(inputs=[tokens[0].tolist()], progress_bar=False)


def test_a_static_cache_shorter_than_the_windows_holds_all(model, tokens):
    cache = StaticCache(config=GptOssConfig(num_hidden_layers=5, sliding_window=1000), max_cache_len=60)
    found = model(tokens, past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(found, model(tokens, use_cache=False).logits, atol=2e-5, rtol=0)


@pytest.mark.parametrize("blocks", [CHILD, CHILD[:4]], ids=["window of one", "no window of one"])
def test_transformers_own_cache_is_right_or_refused(make_checkpoint, tokens, blocks):
    """A user's DynamicCache(config=...): transformers 5.23 gives each layer its window, 5.17 gives all the smallest.

    A window of one token is kept wrong in every version.
    """
    model = load_causal_lm(make_checkpoint(blocks))
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    cache = DynamicCache(config=model.config)
    if [getattr(layer, "sliding_window", None) for layer in cache.layers] != [5, None, 3, 17]:
        with pytest.raises(ValueError, match="past_key_values keeps"):
            model.generate(tokens, past_key_values=cache, **options)
    else:
        found = model.generate(tokens, past_key_values=cache, **options)
        assert torch.equal(found, model.generate(tokens, use_cache=False, **options))


# -- training ----------------------------------------------------------------------------------------------------------


def test_the_balancing_loss_of_mixed_expert_counts_is_the_mean_over_layers(model, tokens):
    """Each count here has one layer: the mean of gpt-oss's loss of every layer alone, weighted in with labels."""
    padding = torch.ones_like(tokens)
    padding[0, :25] = 0
    output = model(tokens, attention_mask=padding, labels=tokens, output_router_logits=True)
    assert [logits.shape[-1] for logits in output.router_logits] == [count for count, _ in CHILD]
    alone = [
        load_balancing_loss_func((logits,), logits.shape[-1], model.num_experts_per_tok, padding)
        for logits in output.router_logits
    ]
    torch.testing.assert_close(output.aux_loss, sum(alone) / len(alone))
    plain = model(tokens, attention_mask=padding, labels=tokens)
    assert plain.router_logits is None
    torch.testing.assert_close(output.loss, plain.loss + model.router_aux_loss_coef * output.aux_loss)
    as_tuple = model(tokens, labels=tokens, output_router_logits=True, return_dict=False)
    assert isinstance(as_tuple, tuple) and as_tuple[0].ndim == 0


def test_equal_layers_have_gpt_oss_balancing_loss(equal_pair, tokens):
    parent, child = (model(tokens, labels=tokens, output_router_logits=True) for model in equal_pair)
    assert torch.equal(parent.aux_loss, child.aux_loss) and torch.equal(parent.loss, child.loss)
    torch.testing.assert_close(
        balancing_loss(child.router_logits, equal_pair[1].num_experts_per_tok, None), parent.aux_loss
    )


# -- loading -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("blocks", [CHILD, EQUAL])
def test_our_loader_equals_from_pretrained(make_checkpoint, tokens, blocks, dtype):
    folder = make_checkpoint(blocks, seed=3)
    register()
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    for parameter in theirs.parameters():  # up to 5.17 dequantized experts stay in bfloat16
        parameter.data = parameter.data.to(dtype)
    ours = load_causal_lm(folder, dtype=dtype)
    assert type(theirs) is type(ours)
    state = theirs.state_dict()
    for name, value in ours.state_dict().items():
        assert value.dtype == dtype
        assert torch.equal(value, state[name].to(dtype)), name
    assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


@pytest.mark.parametrize("blocks", [CHILD, EQUAL], ids=["child", "gpt_oss"])
@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": "absent"},
        {"rope_scaling": None},
        {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}, "max_position_embeddings": 512},
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 500.0}},
        {"num_experts_per_tok": "absent", "experts_per_token": 1},
        {"swiglu_limit": 7},
    ],
    ids=["no rope", "null rope", "no original context", "two ropes", "older top-k", "integer limit"],
)
def test_the_model_is_the_one_that_the_other_runtimes_read(make_checkpoint, blocks, changes):
    """Where transformers' defaults differ between its versions, or from what the architecture reads."""
    folder = make_checkpoint(blocks)
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    config = {key: value for key, value in config.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(config))
    a, model = Checkpoint.open(folder).architecture, load_causal_lm(folder)
    assert torch.equal(model.model.rotary_emb.inv_freq, torch.from_numpy(a.rope.inverse_frequencies(a.head_dim)))
    assert model.model.rotary_emb.attention_scaling == pytest.approx(a.rope.attention_scaling, abs=0)
    assert model.model.layers[0].mlp.router.top_k == a.experts_per_token


@torch.no_grad()
def test_overrides_by_layer_are_the_same_model(make_checkpoint, tokens):
    """Which transformers itself cannot load as gpt-oss."""
    folder = make_checkpoint(CHILD)
    expected = load_causal_lm(folder)(tokens).logits
    write_overrides_by_layer(folder)
    assert torch.equal(load_causal_lm(folder)(tokens).logits, expected)


def test_experts_equal_transformers_dequantization(child):
    source = Checkpoint.open(child)
    for name in ("gate_up_proj", "down_proj"):
        key = f"model.layers.3.mlp.experts.{name}"
        theirs = convert_moe_packed_tensors(source.torch(f"{key}_blocks"), source.torch(f"{key}_scales"))
        assert torch.equal(experts_EIO(source, key, torch.bfloat16), theirs)
        assert torch.equal(experts_EIO(source, key, torch.float32), theirs.float())


def test_bf16_experts_load(make_checkpoint, tokens):
    folder = make_checkpoint(CHILD, experts_format="bf16")
    weights = load_causal_lm(folder).model.layers[0].mlp.experts.gate_up_proj
    stored = Checkpoint.open(folder).torch("model.layers.0.mlp.experts.gate_up_proj")
    assert torch.equal(weights, stored.float())


def test_calibrated_scales_do_not_disturb_loading(make_checkpoint, tokens):
    plain, scaled = make_checkpoint(CHILD), make_checkpoint(CHILD, kv_scales=[(0.5, 2.0)] * 5)
    assert torch.equal(load_causal_lm(plain)(tokens).logits, load_causal_lm(scaled)(tokens).logits)


def test_transformers_passes_over_calibrated_scales(make_checkpoint):
    register()
    scaled = make_checkpoint(CHILD, kv_scales=[(0.5, 2.0)] * 5)
    _, info = AutoModelForCausalLM.from_pretrained(scaled, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]


def test_a_missing_tensor_is_named(child, tmp_path):
    config = json.loads((child / "config.json").read_text())
    config["block_configs"][2]["num_local_experts"] = 3
    for file in child.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.router\.weight.*found BF16 \[2, 64\]"):
        load_causal_lm(tmp_path)


def test_load_child_uses_the_auto_classes(child):
    assert isinstance(load_child(child, dtype=torch.float32), GptOssPuzzleForCausalLM)
    assert isinstance(AutoConfig.from_pretrained(child), GptOssPuzzleConfig)


@pytest.mark.parametrize("experts_format", ["mxfp4", "bf16"])
@torch.no_grad()
def test_a_saved_child_is_the_child_again(make_checkpoint, tokens, tmp_path, experts_format):
    """As after fine-tuning: with dequantized experts, and still a checkpoint for every stage."""
    model = load_child(make_checkpoint(CHILD, experts_format=experts_format))
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    Checkpoint.open(tmp_path).validate()
    for again in (load_child(tmp_path), load_causal_lm(tmp_path, dtype=torch.bfloat16)):
        assert torch.equal(again(tokens).logits, model(tokens).logits)
