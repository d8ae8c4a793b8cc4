"""Tokens of a server that tells no counts: encoded again, each with the time of the response that completed it."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from puzzle_trtllm.chat import ChatTokenizer
from puzzle_trtllm.serve.bench.load import Answer
from puzzle_trtllm.serve.bench.token_counts import count_by_tokenizer
from puzzle_trtllm.serve.client.request import GenerationRequest
from puzzle_trtllm.serve.metrics.records import RequestRecord


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Byte-level, with the merge `ab`: "abc" is two tokens."""
    vocabulary = {symbol: i for i, symbol in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"])}
    inner = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return ChatTokenizer(folder=tmp_path_factory.mktemp("t"), tokenizer=inner, config={})


def counted(tokenizer, *responses):
    """The times of the tokens; response i came at (i + 1) * 10."""
    ends = [sum(map(len, responses[: i + 1])) for i in range(len(responses))]
    pieces = tuple(((i + 1) * 10, end) for i, end in enumerate(ends))
    record = RequestRecord(sent_ns=0, end_ns=99, status="completed", token_times_ns=tuple(time for time, _ in pieces))
    answer = Answer(
        request=GenerationRequest(prompt="x"),
        record=record,
        text="".join(responses),
        token_ids=(),
        finish_reason="stop",
        pieces=pieces,
    )
    return count_by_tokenizer([answer], tokenizer)[0].record.token_times_ns


def test_one_response_may_bring_several_tokens(tokenizer):
    assert counted(tokenizer, "abc", "c") == (10, 10, 20)


def test_a_token_that_spans_responses_belongs_to_the_one_that_completes_it(tokenizer):
    assert counted(tokenizer, "a", "bc") == (20, 20)


def test_the_bytes_of_one_character_are_tokens_of_one_response(tokenizer):
    assert counted(tokenizer, "c", "é", "c") == (10, 20, 20, 30)
