"""Text that streams is the text of the whole, and what is kept for it does not grow."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puzzle_trtllm.text_stream import TextStream
from tests.core.test_harmony import IDS, TOKENIZER

END, NOBODY = IDS["<|end|>"], 10**6
"""A special token, and an id that the tokenizer does not know: models have more rows than tokenizers have tokens."""
FEW = 40
REPLACEMENT = TOKENIZER.encode("\ufffd").ids
EURO = TOKENIZER.encode("\u20ac").ids

runs = st.sampled_from(
    [REPLACEMENT * 20, EURO, EURO[:1], EURO[1:], [EURO[0]] * 40, [EURO[1]] * 40, [END] * 50, [NOBODY]]
)


@given(parts=st.lists(runs | st.lists(st.integers(0, 255)), max_size=8), skip=st.booleans())
def test_pieces_make_the_text_of_the_whole(parts, skip):
    token_ids = [token_id for part in parts for token_id in part]
    stream = TextStream(TOKENIZER, skip_special_tokens=skip)
    text = "".join(map(stream.feed, token_ids)) + stream.rest()
    assert text == TOKENIZER.decode(token_ids, skip_special_tokens=skip)


@pytest.mark.parametrize("run", [REPLACEMENT, EURO[:1], EURO[1:2], [END], [NOBODY], [EURO[0], END]])
def test_tokens_without_a_whole_character_are_not_decoded_again_for_ever(run):
    """A model that runs on behind its end (ignore_eos) writes special tokens, thousands of them."""
    stream = TextStream(TOKENIZER, skip_special_tokens=True)
    text = "".join(map(stream.feed, run * 200))
    assert len(stream._held) <= FEW
    assert len(text) >= len(TOKENIZER.decode(run * 200, skip_special_tokens=True)) - FEW


def test_a_character_may_be_cut_by_tokens_without_text():
    stream = TextStream(TOKENIZER, skip_special_tokens=True)
    assert "".join(map(stream.feed, [EURO[0], *[END] * 100, *EURO[1:]])) == "\u20ac"
