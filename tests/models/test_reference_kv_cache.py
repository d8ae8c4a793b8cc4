"""The paged cache: what it stores, how much it holds, and that no block is ever lost."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from puzzle_trtllm.kv_layout import blocks_of_a_sequence, plan_layout
from puzzle_trtllm.models.reference.kernels.kv_storage import expand_e4m3, store
from puzzle_trtllm.models.reference.kv_cache import PagedKvCache
from puzzle_trtllm.models.reference.step import SequenceStep, plan_step
from tests.toys import toy_architecture

CPU = torch.device("cpu")
FOUR_WINDOWS = [(4, 24), (4, None), (4, 40), (4, 24), (4, 7)]


def make_cache(blocks=FOUR_WINDOWS, *, budget: int = 1 << 20, tokens: int = 200, sequences: int = 64) -> PagedKvCache:
    layout = plan_layout(
        toy_architecture(blocks),
        tokens_per_block=8,
        dtype=torch.bfloat16,
        budget_bytes=budget,
        sequence_tokens=tokens,
        max_sequences=sequences,
    )
    return PagedKvCache(layout, CPU)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_e4m3_code_expands_to_what_torch_says(dtype):
    codes = torch.arange(256, dtype=torch.uint8)
    finite = (codes & 0x7F) != 0x7F
    expected = codes.view(torch.float8_e4m3fn).to(dtype)
    assert torch.equal(expand_e4m3(codes, dtype)[finite], expected[finite])


def test_an_e4m3_store_saturates():
    stored = store(torch.tensor([1e9, -1e9, 448.0, 460.0, 0.3]), torch.float8_e4m3fn)
    assert stored.float().tolist() == [448.0, -448.0, 448.0, 448.0, 0.3125]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_an_fp8_cache_gives_back_is_modelopts_quantize_and_dequantize(dtype):
    """At unit scale, that is amax 448; subnormals, ties and values beyond the largest included."""
    from modelopt.torch.quantization.tensor_quant import fp8_eager

    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(4096, generator=generator) * torch.logspace(-4, 3, 4096)
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    codes = codes[codes.isfinite()].sort().values
    values = torch.cat([spread, codes, (codes[1:] + codes[:-1]) / 2]).to(dtype)
    given_back = expand_e4m3(store(values, torch.float8_e4m3fn).view(torch.uint8), dtype)
    assert torch.equal(given_back, fp8_eager(values, torch.tensor(448.0)).to(dtype))


@given(
    budget=st.integers(20_000, 3_000_000),
    tokens=st.integers(1, 300),
    windows=st.lists(st.one_of(st.none(), st.integers(1, 100)), min_size=1, max_size=6),
    sequences=st.integers(1, 40),
)
def test_a_layout_stays_in_its_budget_and_holds_what_it_promises(budget, tokens, windows, sequences):
    architecture = toy_architecture([(4, w) for w in windows])
    layout = plan_layout(
        architecture,
        tokens_per_block=8,
        dtype=torch.bfloat16,
        budget_bytes=budget,
        sequence_tokens=tokens,
        max_sequences=sequences,
    )
    assert layout.num_bytes <= budget
    own = sum(
        blocks_of_a_sequence(w, tokens, 8) * 8 * architecture.kv_bytes_per_token_and_layer("bf16") for w in windows
    )
    promised = min(budget // own, sequences)
    for window, count in layout.num_blocks.items():
        assert count >= promised * blocks_of_a_sequence(window, tokens, 8)


@pytest.mark.parametrize(
    ("window", "num_tokens", "blocks"),
    [(None, 100, 13), (24, 100, 4), (25, 100, 5), (1, 100, 2), (24, 16, 2), (24, 25, 4), (None, 0, 0)],
)
def test_a_window_that_has_moved_on_straddles_one_block_of_8_more_than_it_fills(window, num_tokens, blocks):
    assert blocks_of_a_sequence(window, num_tokens, 8) == blocks


def test_a_layouts_bytes_are_those_of_its_pools():
    cache = make_cache()
    assert cache.layout.num_bytes == sum(pool.storage.nbytes for pool in cache.pools.values())


ONE_OF_100_TOKENS = 4 * 2048 + 6 * 1024 + 13 * 1024
"""Bytes, by hand: a block of 8 tokens is 8 x K and V x 2 heads x 16 x 2 = 1024 bytes a layer. Two layers have window
24, 4 blocks a sequence; one has 40, 6 blocks; one none, 13 blocks."""


@pytest.mark.parametrize(
    ("budget", "changes", "blocks"),
    [
        # Two fit, and some bytes are left: the smallest window's need of another one first, then what has room.
        (2 * ONE_OF_100_TOKENS + 10_000, {}, {24: 8 + 4, 40: 12 + 1, None: 26}),
        (1 * ONE_OF_100_TOKENS + 10_000, {}, {24: 4 + 4, 40: 6 + 1, None: 13}),
        (2 * ONE_OF_100_TOKENS + 20_000, {}, {24: 8 + 4, 40: 12 + 6, None: 26 + 5}),
        # No more may run: the rest is of no use, unless prefixes are remembered, of whole prompts at most.
        (9 * ONE_OF_100_TOKENS, {"max_sequences": 2}, {24: 8, 40: 12, None: 26}),
        (9 * ONE_OF_100_TOKENS, {"max_sequences": 2, "reuse": True}, {24: 26, 40: 26, None: 26}),
        # Prompts of 50 blocks: four times what running sequences hold.
        (1 << 20, {"max_sequences": 2, "reuse": True, "sequence_tokens": 400}, {24: 32, 40: 48, None: 100}),
        (ONE_OF_100_TOKENS - 1, {}, {24: 0, 40: 0, None: 0}),
    ],
)
def test_a_budget_is_divided_by_hand(budget, changes, blocks):
    layout = plan_layout(
        toy_architecture([(4, 24), (4, None), (4, 40), (4, 24)]),
        tokens_per_block=8,
        dtype=torch.bfloat16,
        budget_bytes=budget,
        **{"sequence_tokens": 100, "max_sequences": 64, **changes},
    )
    assert layout.num_blocks == blocks


@given(window=st.one_of(st.none(), st.integers(1, 60)), chunks=st.lists(st.integers(1, 50), min_size=1, max_size=12))
def test_a_sequence_holds_the_blocks_of_what_it_can_still_see_and_no_more(window, chunks):
    cache = make_cache([(4, window)], tokens=1000, sequences=1)
    pool = cache.pools[window]
    sequence = cache.admit(sum(chunks))[window]
    end = 0
    for chunk in chunks:
        end += chunk
        pool.extend(sequence, 0 if window is None else max(0, end - window), end)
        first_needed = 0 if window is None else max(0, end - window) // 8
        assert sequence.first_block == first_needed
        assert len(sequence.blocks) == math.ceil(end / 8) - first_needed
        if window is not None:
            assert len(sequence.blocks) <= math.ceil(window / 8) + 1
    assert len(sequence.blocks) <= blocks_of_a_sequence(window, sum(chunks), 8)


def test_admission_counts_what_sequences_may_still_claim():
    cache = make_cache(budget=120_000, tokens=100)
    admitted = []
    while len(admitted) < 64 and (blocks := cache.admit(100)) is not None:
        admitted.append(blocks)
    assert 1 <= len(admitted) < 64
    assert cache.num_free == cache.num_blocks, "admission alone claims nothing"
    cache.release(admitted.pop(), 100)
    assert cache.admit(100) is not None, "being refused claims nothing either"
    assert cache.admit(100) is None


@pytest.mark.parametrize("window", [24, None])
def test_not_even_one_token_is_admitted_beside_sequences_that_may_claim_every_block(window):
    cache = make_cache([(4, window)], tokens=100, sequences=2)
    for _ in range(2):
        assert cache.admit(100) is not None
    assert cache.admit(1) is None


def test_a_step_puts_decoding_sequences_before_prompt_chunks():
    cache = make_cache()

    def part(num_tokens: int, start: int) -> SequenceStep:
        return SequenceStep(tokens=[5] * num_tokens, start=start, blocks=cache.admit(40), wants_logits=True)

    step = plan_step([part(1, 9), part(1, 3), part(4, 0), part(1, 0)], cache)
    assert (step.num_decodes, step.chunks.lengths.tolist(), step.chunks.longest) == (2, [4, 1], 4)
    assert step.positions.tolist() == [9, 3, 0, 1, 2, 3, 0]
    assert step.logit_rows.tolist() == [0, 1, 5, 6]
    for wrong in ([part(4, 0), part(1, 9)], [part(1, 0), part(1, 9)]):
        with pytest.raises(ValueError, match="decoding sequences must come before"):
            plan_step(wrong, cache)
