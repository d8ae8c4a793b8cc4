"""Bytes on a GPU: weights under every layout, KV cache by window, what memory leaves for it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puzzle_trtllm.architecture import PuzzleArchitecture
from puzzle_trtllm.build.planner.assumptions import Assumptions, explain_assumptions
from puzzle_trtllm.build.planner.kv_cache import KvGeometry, mean_keys
from puzzle_trtllm.build.planner.layout import Layout, parse_layout, possible_layouts
from puzzle_trtllm.build.planner.memory import activation_bytes, plan_memory
from puzzle_trtllm.build.planner.weights import active_parameters, weights_by_split, weights_per_gpu
from puzzle_trtllm.errors import ConfigError
from puzzle_trtllm.gpus import load_gpu
from puzzle_trtllm.tensors import count_parameters, count_weight_bytes
from tests.toys import toy_architecture

DATA = Path(__file__).parents[1] / "data"
PARENT = PuzzleArchitecture.from_path(DATA / "gpt-oss-120b.config.json")
CHILD = PuzzleArchitecture.from_path(DATA / "gpt-oss-puzzle-88b.config.json")


def layout(name: str, architecture: PuzzleArchitecture = CHILD) -> Layout:
    return parse_layout(name, int(name.lstrip("tpde")), architecture)


def test_one_gpu_holds_the_whole_model() -> None:
    for model in (PARENT, CHILD):
        assert sum(weights_by_split(model).values()) == count_weight_bytes(model)
        assert weights_per_gpu(model, layout("tp1")).total == count_weight_bytes(model)


def test_tp8_by_hand() -> None:
    """One layer, everything on paper: D = 64, F = 32, 8 heads and 8 KV heads of 16, vocabulary 80, 16 experts."""
    a = toy_architecture([(16, None)], num_attention_heads=8, num_key_value_heads=8, vocab_size=80)
    held = weights_per_gpu(a, layout("tp8", architecture=a))
    expert = (64 * 64 + 64 * 32) * 17 // 32 + 2 * (64 + 64)  # 17 bytes hold 32 values; biases 2F and D in BF16
    assert held.experts == 2 * expert
    query = 2 * (16 * 64 + 16 + 64 * 16 + 1)  # one head: Q, its bias, O's columns, its sink
    keys_and_values = 2 * 2 * (16 * 64 + 16)  # one KV head, K and V with bias
    copied = 2 * (64 + 64 + 64 + 64 + 16 * 64 + 16)  # O's bias, three norms, router and its bias
    assert held.attention_and_router == query + keys_and_values + copied
    assert held.vocabulary == 2 * (2 * 10 * 64)  # 10 of 80 rows, embedding and lm_head


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_tied_embedding_is_active_as_the_head(is_tied: bool) -> None:
    """Every token is multiplied with the whole head, whatever tensor holds it."""
    a = toy_architecture([(4, None)], tie_word_embeddings=is_tied)
    experts = 4 * (2 * 64 * 32 + 32 * 64 + 2 * 64)  # of 4: gate, up and down, and their biases
    total = count_parameters(a) - (0 if is_tied else a.vocab_size * a.hidden_size)
    assert a.experts_per_token == 2
    assert active_parameters(a) == total - experts // 2


def test_all_gpus_together_hold_the_model_once_and_the_copies_n_times() -> None:
    split = weights_by_split(CHILD)
    for n in (2, 4, 8):
        together = n * weights_per_gpu(CHILD, layout(f"tp{n}")).total
        assert together == count_weight_bytes(CHILD) + (n - 1) * split["nothing"]
        together = n * weights_per_gpu(CHILD, layout(f"dep{n}")).total
        assert together == split["experts"] + n * (count_weight_bytes(CHILD) - split["experts"])


def test_more_gpus_than_kv_heads_repeat_them() -> None:
    a = toy_architecture([(16, None)], num_attention_heads=8, num_key_value_heads=2)
    assert layout("tp8", architecture=a).kv_heads_per_gpu(a) == 1
    kv = KvGeometry.of(a, "bf16", layout("tp8", architecture=a))
    assert kv.bytes_per_token_and_layer == 2 * 16 * 2  # K and V of one whole head


def test_layouts_that_build_would_refuse_are_not_offered() -> None:
    """16 ranks would repeat the 8 KV heads, which TensorRT-LLM's loader cannot."""
    assert [one.name for one in possible_layouts(16, CHILD)][-3:] == ["2 x tp8", "2 x dep8", "dep16"]


def test_layouts_that_the_smallest_layer_forbids() -> None:
    """64 experts cannot be dealt to 128 GPUs, and 64 heads not to 3."""
    with pytest.raises(ConfigError, match="64 experts of layer 15"):
        layout("dep128")
    with pytest.raises(ConfigError, match="tp3"):
        layout("tp3")
    assert [one.name for one in possible_layouts(4, CHILD)] == ["4 x tp1", "2 x tp2", "2 x dep2", "tp4", "dep4"]
    assert [one.num_gpus for one in possible_layouts(6, CHILD)] == [6, 6, 6]  # tp1, tp2, dep2: 4 and 6 do not go


def test_kv_bytes_are_those_of_the_architecture() -> None:
    for model, dtype in ((PARENT, "bf16"), (CHILD, "fp8")):
        kv = KvGeometry.of(model, dtype, layout("tp1"))
        for length in (1, 127, 128, 129, 8192, 131072):
            assert kv.bytes_per_sequence(length) == model.kv_bytes_per_sequence(length, dtype)
            on_eight = KvGeometry.of(model, dtype, layout("tp8"))
            assert 8 * on_eight.bytes_per_sequence(length) == kv.bytes_per_sequence(length)


def test_windows_that_are_not_filled_count_as_full_layers() -> None:
    kv = KvGeometry.of(CHILD, "fp8", layout("tp1"))
    assert kv.layers_by_window == ((128, 18), (8192, 8), (None, 10))
    assert dict(kv.clamped(8192)) == {128: 18, 8192: 18}
    assert dict(kv.clamped(100)) == {100: 36}


@given(st.integers(0, 60), st.integers(1, 60), st.one_of(st.none(), st.integers(1, 80)))
def test_mean_keys_against_counting(start: int, length: int, window: int | None) -> None:
    """The oracle is the mask itself: key k is seen from position p if and only if p - window < k <= p."""
    seen = [sum(1 for k in range(p + 1) if window is None or k > p - window) for p in range(start, start + length)]
    assert math.isclose(mean_keys(start, start + length, window), sum(seen) / length)


def test_memory_adds_up_under_both_rules() -> None:
    gpu = load_gpu("h100-80gb")
    for rule in ("free", "total"):
        m = plan_memory(PARENT, gpu, layout("tp1"), Assumptions(memory_rule=rule))
        used = m.context + m.weights.total + m.activations + m.graphs
        assert used + m.kv_pool + m.unused == m.total == 81559 * 2**20
        free = m.total - used
        assert m.kv_pool == int(0.9 * free if rule == "free" else 0.9 * m.total - used)


def test_a_model_that_does_not_fit_leaves_nothing() -> None:
    m = plan_memory(PARENT, load_gpu("l40s-48gb"), layout("tp1"), Assumptions())
    assert m.kv_pool == 0
    assert m.unused < 0


def test_activations_are_the_larger_of_experts_and_logits() -> None:
    few, many = Assumptions(max_batch_size=1), Assumptions(max_batch_size=8192)
    # BF16: residual and normed input 2D, and for each of 4 experts gate, up and product 3F and the output D
    assert activation_bytes(CHILD, layout("tp1"), few) == 8192 * 2 * (2 * 2880 + 4 * (3 * 2880 + 2880))
    assert activation_bytes(CHILD, layout("tp1"), many) == 8192 * 201088 * 4
    assert activation_bytes(CHILD, layout("tp2"), many) == 8192 * 201088 * 4 // 2
    # A step of 8192 tokens has no more rows of logits.
    assert activation_bytes(CHILD, layout("tp1"), Assumptions(max_batch_size=10_000)) == 8192 * 201088 * 4
    # dep8: the inputs of the seven other GPUs beside its own
    assert activation_bytes(CHILD, layout("dep8"), few) == 8192 * 2 * ((2 + 7) * 2880 + 4 * (3 * 2880 + 2880))


def test_every_assumption_has_a_reason_and_a_changed_one_says_so() -> None:
    stated = {name: reason for name, _, reason in explain_assumptions(Assumptions(graph_bytes=5))}
    assert all(len(reason) > 20 for reason in stated.values())
    assert stated["graph_bytes"].startswith("given (default 1073741824: ")
    assert not stated["context_bytes"].startswith("given")
