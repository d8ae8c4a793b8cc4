"""Prefix reuse: what is found, what is kept, what goes first; and that a reused prefix changes no logit."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from puzzle_trtllm.models.reference.kv_cache import PagedKvCache
from puzzle_trtllm.models.reference.prefix_cache import BlockTable, extend_keys, first_visible_block
from puzzle_trtllm.models.reference.step import SequenceStep, plan_step
from tests.models.test_reference_kv_cache import make_cache
from tests.models.test_reference_model import CHILD, HOMOGENEOUS, Driver, oracle_logits, tokens_of

SIZE = 8


class Writer:
    """Sequences in a cache without a model: a step is planned and counts as written."""

    def __init__(self, cache: PagedKvCache) -> None:
        self.cache = cache

    def run(self, tokens: list[int], *, chunks: int = 1000, admitted: int = 200):
        """Admit, compute in chunks, and return (reused tokens, blocks or None when it does not fit); it stays open."""
        keys = self.cache.keys(tokens)
        start = reused = self.cache.find_prefix(keys, len(tokens))
        blocks = self.cache.admit(admitted, keys, reused)
        while blocks is not None and start < len(tokens):
            end = min(start + chunks, len(tokens))
            step = SequenceStep(tokens=tokens[start:end], start=start, blocks=blocks, wants_logits=False)
            plan_step([step], self.cache)
            self.cache.commit(blocks, keys, tokens, start, end)
            start = end
        return reused, blocks


def expected_reuse(tokens: list[int], other: list[int]) -> int:
    """Full blocks that both begin with; one token at least is left over."""
    same = next(
        (i for i, (a, b) in enumerate(zip(tokens, other, strict=False)) if a != b), min(len(tokens), len(other))
    )
    return min(same, len(tokens) - 1) // SIZE * SIZE


@given(common=st.integers(0, 70), rest=st.integers(1, 60), other=st.integers(1, 60), chunk=st.integers(1, 90))
def test_a_prompt_starts_where_it_leaves_an_earlier_one_whatever_the_windows_and_chunks(common, rest, other, chunk):
    writer = Writer(make_cache(budget=1 << 24, sequences=20))
    shared = tokens_of(common, seed=1)
    first, second = shared + [1] * rest, shared + [2] * other
    _, blocks = writer.run(first, chunks=chunk)
    reused, _ = writer.run(second, chunks=chunk)
    assert reused == expected_reuse(second, first)
    writer.cache.release(blocks, 200)
    again, _ = writer.run(first, chunks=chunk)
    assert again == expected_reuse(first, first), "what an ended sequence wrote is still there"


@given(chunk=st.integers(1, 90), length=st.integers(10, 150))
def test_between_steps_a_window_group_holds_its_window_and_no_more(chunk, length):
    writer = Writer(make_cache(budget=1 << 24, sequences=20))
    _, blocks = writer.run(tokens_of(length, seed=3), chunks=chunk)
    for window, own in blocks.items():
        if window is not None:
            assert own.first_block >= max(0, length - window) // SIZE - 1
            assert len(own.blocks) <= -(-window // SIZE) + 1


def test_a_window_that_is_no_longer_there_shortens_the_reuse():
    """A hit needs the blocks that the next query sees in every group, and those only."""
    cache = make_cache([(4, 24), (4, None)], budget=1 << 22, sequences=4)
    writer, tokens = Writer(cache), tokens_of(100, seed=4)
    writer.run(tokens)
    table = cache.pools[24].table
    keys = cache.keys(tokens)
    assert cache.find_prefix(keys, 100) == 96
    # At 96 the window of 24 reaches back to token 73, block 9; at 88 to block 8, and so on.
    assert cache.admit(200, keys, 96)[24].first_block == first_visible_block(24, 96, SIZE) == 9
    del table._block_of[keys[9]]
    assert cache.find_prefix(keys, 100) == 72


def test_one_token_at_least_is_computed():
    writer = Writer(make_cache(budget=1 << 24, sequences=20))
    tokens = tokens_of(64, seed=5)
    writer.run(tokens)
    assert writer.run(tokens)[0] == 56
    assert writer.run([*tokens, 1])[0] == 64


def test_the_same_block_after_another_beginning_is_another_block():
    keys, others = [], []
    extend_keys(keys, [1] * 16, 16, SIZE)
    extend_keys(others, [2] * 8 + [1] * 8, 16, SIZE)
    assert len({*keys, *others}) == 4, "the two halves of the first differ too: the key is that of the whole prefix"


@given(data=st.data())
def test_the_longest_prefix_is_found_whatever_blocks_are_gone(data):
    cache = make_cache(budget=1 << 24, sequences=20)
    tokens = tokens_of(24 * SIZE, seed=1)
    keys = cache.keys(tokens)
    known = {}
    for window, pool in cache.pools.items():
        known[window] = data.draw(st.sets(st.sampled_from(range(len(keys))), min_size=(window is None and 20) or 0))
        for index in known[window]:
            pool.table.remember(pool.table.take(), keys[index])

    def is_reusable(count: int) -> bool:
        views = (range(first_visible_block(w, count * SIZE, SIZE), count) for w in cache.pools)
        return all(known[w].issuperset(view) for w, view in zip(cache.pools, views, strict=True))

    longest = next(count for count in range(23, -1, -1) if is_reusable(count))  # one token is left to compute
    reused = cache.find_prefix(keys, len(tokens))
    assert reused == longest * SIZE
    for window, own in cache.admit(200, keys, reused).items():
        pool = cache.pools[window]
        first = first_visible_block(window, reused, SIZE)
        assert own.blocks == pool.table.find(keys[first:longest]) and own.first_block == first


@pytest.mark.parametrize(
    ("window", "num_tokens", "block"), [(None, 80, 0), (8, 16, 1), (9, 16, 1), (10, 16, 0), (1, 16, 2), (24, 16, 0)]
)
def test_the_next_token_sees_itself_and_a_window_less_one_of_tokens_before_it(window, num_tokens, block):
    assert first_visible_block(window, num_tokens, 8) == block


def test_reuse_is_counted_in_blocks_of_prompts_of_every_group():
    cache = make_cache()  # four groups, blocks of 8
    assert cache.count_reuse(21, 16) == (2 * 4, 3 * 4 - 2 * 4)
    assert cache.count_reuse(24, 0) == (0, 12)


def test_a_block_is_in_use_by_one_and_keeps_the_first_key_it_is_known_by():
    table = BlockTable(2)
    block = table.take()
    assert [table.is_in_use(block), table.is_in_use(1 - block)] == [True, False]
    table.remember(block, b"first")
    table.remember(block, b"second")
    assert table.find([b"first"]) == [block] and table.count_leading([b"second"]) == 0


def test_without_reuse_nothing_is_found_and_nothing_more_is_written():
    cache = make_cache(budget=1 << 24, sequences=20)
    plain = PagedKvCache(cache.layout, cache.device, reuse=False)
    tokens = tokens_of(100, seed=6)
    for _ in range(2):
        reused, blocks = Writer(plain).run(tokens)
        assert reused == 0
        assert sum(own.num_taken for own in blocks.values()) == 13 + 4 + 6 + 2  # None, 24, 40, 7: no window in full


def test_the_least_recently_used_prefix_goes_first_and_of_one_its_end():
    table = BlockTable(4)
    blocks = [table.take() for _ in range(4)]
    for block, key in zip(blocks, (b"a0", b"a1", b"b0", b"b1"), strict=True):
        table.remember(block, key)
    table.give_back(blocks[:2])
    table.give_back(blocks[2:])
    table.share(table.find([b"a0"]))  # used again: now the youngest
    table.give_back(blocks[:1])
    gone = []
    for _ in range(4):
        table.take()
        gone += [key for key in (b"a0", b"a1", b"b0", b"b1") if not table.count_leading([key]) and key not in gone]
    assert gone == [b"a1", b"b1", b"b0", b"a0"]


def test_shared_blocks_make_room_for_more_sequences_where_attention_is_full():
    """8 sequences of 25 blocks fit by themselves; with 20 blocks in common 36 do."""
    tokens = tokens_of(160, seed=7)
    cache = make_cache([(4, None)], budget=1 << 30, tokens=200, sequences=8)
    writer, opened = Writer(cache), []
    while (blocks := writer.run([*tokens, len(opened) + 1])[1]) is not None:
        opened.append(blocks)
    assert len(opened) == 1 + (8 * 25 - 25) // 5
    assert cache.num_free == 200 - 20 - len(opened)
    for blocks in opened:
        for pool in cache.pools.values():
            pool.extend(blocks[None], 0, 200)  # every one of them can grow to its end
    assert cache.num_free == 0
    rng = random.Random(0)
    for blocks in rng.sample(opened, len(opened)):
        cache.release(blocks, 200)
    assert cache.num_free == cache.num_blocks == 200 and cache.pools[None].num_reserved == 0


class PrefixDriver(Driver):
    """A Driver whose sequences look for their beginning in the cache, and are remembered."""

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(folder, **options)
        self.cache = PagedKvCache(self.cache.layout, self.cache.device, reuse=True)

    def add(self, tokens: list[int]) -> int:
        keys = self.cache.keys(tokens)
        self.reused = self.cache.find_prefix(keys, len(tokens))
        self.tokens.append(list(tokens))
        self.blocks.append(self.cache.admit(512, keys, self.reused))
        return len(self.tokens) - 1

    def step(self, *parts: tuple[int, int, int]) -> torch.Tensor:
        logits = super().step(*parts)
        for i, start, end in parts:
            keys = self.cache.keys(self.tokens[i][:start])
            self.cache.commit(self.blocks[i], keys, self.tokens[i], start, end)
        return logits

    def complete(self, sequence: int, chunk: int) -> torch.Tensor:
        """Everything that is not reused, in chunks; the last logits of each."""
        length = len(self.tokens[sequence])
        starts = range(self.reused, length, chunk)
        return torch.cat([self.step((sequence, s, min(s + chunk, length))) for s in starts])


@pytest.mark.parametrize("blocks", [HOMOGENEOUS, CHILD], ids=["gpt_oss", "child"])
@pytest.mark.parametrize("chunk", [1, 13, 200])
def test_logits_after_a_reused_prefix_equal_transformers(make_checkpoint, blocks, chunk):
    folder = make_checkpoint(blocks)
    shared = tokens_of(80, seed=10)
    driver = PrefixDriver(folder)
    for seed, (length, reused) in enumerate([(40, 0), (25, 80), (1, 80), (61, 80)]):
        tokens = shared + tokens_of(length, seed=20 + seed)
        sequence = driver.add(tokens)
        assert driver.reused == reused
        logits = driver.complete(sequence, chunk)
        expected = oracle_logits(folder, tokens)[[*range(reused + chunk - 1, len(tokens) - 1, chunk), len(tokens) - 1]]
        assert (logits - expected).abs().max() < 1e-4


def test_with_an_fp8_cache_reuse_on_and_off_give_the_same_logits(make_checkpoint):
    folder = make_checkpoint(CHILD)
    shared = tokens_of(80, seed=11)
    warm, cold = (PrefixDriver(folder, kv_dtype=torch.float8_e4m3fn) for _ in range(2))
    warm.complete(warm.add(shared + tokens_of(30, seed=1)), 200)
    tokens = shared + tokens_of(50, seed=2)
    hit, miss = warm.add(tokens), cold.add(tokens)
    assert (warm.reused, cold.reused) == (80, 0)
    assert (warm.complete(hit, 200) - cold.complete(miss, 200)).abs().max() < 1e-4


def test_a_conversation_goes_on_from_what_was_generated(make_checkpoint):
    folder = make_checkpoint(CHILD)
    driver = PrefixDriver(folder)
    sequence = driver.add(tokens_of(50, seed=12))
    logits = driver.complete(sequence, 64)[-1]
    tokens = driver.tokens[sequence]
    for _ in range(45):
        tokens.append(int(logits.argmax()))
        logits = driver.step((sequence, len(tokens) - 1, len(tokens)))[0]
    driver.cache.release(driver.blocks[sequence], 512)
    turn = tokens + tokens_of(9, seed=13)
    following = driver.add(turn)
    assert driver.reused == 88, "50 of the first prompt and 45 answered, in blocks of 8"
    assert (driver.complete(following, 64)[-1] - oracle_logits(folder, turn)[-1]).abs().max() < 1e-4
