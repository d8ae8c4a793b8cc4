"""Prompts: exact lengths, ordinary tokens only, different from each other, equal for equal seeds."""

from __future__ import annotations

import pytest

from puzzle_trtllm.chat import ChatTokenizer
from puzzle_trtllm.serve.bench.prompts import load_requests, ordinary_token_ids, random_prompts
from tests.toys import SPECIAL_TOKENS


@pytest.fixture(scope="module")
def tokenizer(make_checkpoint):
    return ChatTokenizer.from_folder(make_checkpoint([(4, None)]))


def test_special_tokens_are_not_ordinary(tokenizer):
    ids = ordinary_token_ids(tokenizer)
    text = [tokenizer.decode([token_id]) for token_id in ids]
    assert not set(text) & set(SPECIAL_TOKENS)
    assert len(ids) == tokenizer.largest_id + 1 - len(SPECIAL_TOKENS)
    assert "7" in text


def test_prompts_have_the_exact_length_and_no_two_are_equal():
    prompts = random_prompts(range(10, 60), lengths=[33] * 20, seed=1)
    assert {len(prompt) for prompt in prompts} == {33}
    assert {token for prompt in prompts for token in prompt} <= set(range(10, 60))
    assert len({tuple(prompt) for prompt in prompts}) == 20


def test_equal_seeds_give_equal_prompts_and_other_seeds_others():
    first, again, other = (random_prompts(range(50), lengths=[8] * 3, seed=s) for s in (1, 1, 2))
    assert first == again != other


def test_no_two_prompts_begin_alike_so_that_a_prefix_cache_finds_nothing(tokenizer):
    """Neither within a load nor from round to round, whose seeds follow each other."""
    rounds = [
        load_requests(tokenizer, num_requests=128, input_tokens=128, output_tokens=1, seed=seed, exact=True)
        for seed in range(5)
    ]
    begins = {tuple(request.input_ids[:8]) for load in rounds for request in load}
    assert len(begins) == 5 * 128


def test_a_stock_server_gets_text_and_no_extras(tokenizer):
    (request,) = load_requests(tokenizer, num_requests=1, input_tokens=5, output_tokens=9, seed=0, exact=False)
    assert len(tokenizer.encode(request.prompt)) == 5
    assert (request.input_ids, request.ignore_eos, request.max_tokens) == (None, None, 9)
