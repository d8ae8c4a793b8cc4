"""Harmony: whatever messages a model writes come out as they went in, however their tokens arrive."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from puzzle_trtllm.harmony import (
    CALL,
    END,
    RETURN,
    HarmonyDecoder,
    Header,
    join_pieces,
    speaks_harmony,
    special_tokens,
    split_messages,
)

SPECIAL = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>")


def byte_tokenizer(special: tuple[str, ...] = SPECIAL) -> Tokenizer:
    """One token a byte, as at the bottom of every byte-level BPE: any character may be cut anywhere."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return tokenizer


TOKENIZER = byte_tokenizer()
IDS = {content: token_id for token_id, content in special_tokens(TOKENIZER).items()}


def encode(*parts: str) -> list[int]:
    """Parts that are special tokens become one id; all others are text, whatever it looks like."""
    alphabet = byte_tokenizer(())
    return [i for part in parts for i in ([IDS[part]] if part in IDS else alphabet.encode(part).ids)]


def decode(*chunks: list[int]) -> list[tuple[Header, str]]:
    decoder = HarmonyDecoder(TOKENIZER)
    return join_pieces([*(piece for chunk in chunks for piece in decoder.feed(chunk)), *decoder.finish()])


bodies = st.text(max_size=20)
headers = st.one_of(
    st.builds(Header, channel=st.sampled_from(["analysis", "commentary", "final"])),
    st.builds(Header, channel=st.just("commentary"), recipient=st.sampled_from(["functions.add", "browser.open"])),
)


@st.composite
def generations(draw):
    """(messages, the parts a model generates for them, cut places)."""
    messages = draw(st.lists(st.tuples(headers, bodies), min_size=1, max_size=4))
    parts: list[str] = []
    for index, (header, body) in enumerate(messages):
        if index:
            parts += ["<|start|>", "assistant"]
        to = f" to={header.recipient}" if header.recipient else ""
        before, after = draw(st.sampled_from([("", to), (to, "")]))
        constrain = ["<|constrain|>", "json"] if to and draw(st.booleans()) else []
        parts += [before, "<|channel|>", header.channel + after, *constrain, "<|message|>", body]
        parts.append(draw(st.sampled_from([RETURN, CALL])) if index == len(messages) - 1 else END)
    return messages, [part for part in parts if part]


@given(generations(), st.data())
def test_messages_come_out_as_they_went_in_wherever_the_stream_is_cut(generation, data):
    messages, parts = generation
    ids = encode(*parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=6)))
    edges = [0, *cuts, len(ids)]
    assert decode(*(ids[a:b] for a, b in pairwise(edges))) == messages


@given(st.lists(st.sampled_from([*SPECIAL, "analysis", "final", " to=functions.f", "ä", ""]), max_size=12))
def test_no_sequence_of_tokens_breaks_it(parts):
    """Pieces never come before their message has begun, and text of bodies is never lost."""
    found = decode(encode(*[part for part in parts if part]))
    assert sum(len(text) for _, text in found) <= sum(len(part) for part in parts if part not in SPECIAL)


def test_what_only_looks_like_a_special_token_is_text():
    body = "<|end|><|start|>assistant<|channel|>final<|message|>42"
    assert decode(encode("<|channel|>", "analysis", "<|message|>", body)) == [(Header(channel="analysis"), body)]


def test_a_character_shows_when_its_last_byte_has_come():
    decoder = HarmonyDecoder(TOKENIZER)
    first, *rest = encode("€")
    opened = [IDS["<|channel|>"], *encode("final"), IDS["<|message|>"]]
    assert [piece.text for piece in decoder.feed([*opened, first])] == [""]
    assert [piece.text for piece in decoder.feed(rest)] == ["€"]


def test_bytes_that_never_become_a_character_show_as_a_replacement():
    assert decode([*encode("<|message|>", "a"), encode("€")[0]]) == [(Header(), "a\ufffd")]


def test_analysis_tokens_are_counted_without_the_format_around_them():
    decoder = HarmonyDecoder(TOKENIZER)
    parts = ("<|channel|>", "analysis", "<|message|>", "12345", END, "<|start|>", "assistant", "<|channel|>", "final")
    list(decoder.feed(encode(*parts, "<|message|>", "99")))
    assert decoder.analysis_tokens == 5


@pytest.mark.parametrize(
    ("parts", "messages"),
    [
        (["4", "2"], [(Header(), "42")]),  # a model that knows no harmony
        (["42", RETURN], [(Header(), "42")]),
        (["<|channel|>", "analysis"], []),  # cut inside a header
        (["<|message|>", "42"], [(Header(), "42")]),
        ([" to=functions.f", "<|channel|>", "commentary", "<|message|>", "{}"],
         [(Header(channel="commentary", recipient="functions.f"), "{}")]),
        (["<|channel|>", "final", "<|message|>", "1", "<|channel|>", "final", "<|message|>", "2"],
         [(Header(), "1"), (Header(), "2")]),  # an <|end|> forgotten
        (["<|message|>", "42", END, "and so on"], [(Header(), "42")]),  # text where a header is due
    ],
)  # fmt: skip
def test_generations_cut_or_malformed(parts, messages):
    assert decode(encode(*parts)) == messages


def test_a_text_with_its_special_tokens_splits_alike():
    text = "<|channel|>analysis<|message|>3+7<|end|><|start|>assistant<|channel|>final<|message|>10<|return|>"
    assert split_messages(text) == [(Header(channel="analysis"), "3+7"), (Header(), "10")]


def test_only_a_tokenizer_with_its_tokens_speaks_harmony():
    assert speaks_harmony(TOKENIZER)
    assert not speaks_harmony(byte_tokenizer(("<|start|>", "<|end|>")))
