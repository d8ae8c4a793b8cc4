"""Random token ids that stand for text, for prompts whose content does not matter."""

from __future__ import annotations

import random

NUM_SPECIAL_TOKENS = 1090
"""Ids at the end of gpt-oss's vocabulary that are no text: control tokens and room for more."""


def random_text_ids(count: int, *, vocab_size: int, source: random.Random) -> list[int]:
    """`count` ids of text; of a vocabulary too small to be gpt-oss's, any."""
    limit = vocab_size - NUM_SPECIAL_TOKENS if vocab_size > 2 * NUM_SPECIAL_TOKENS else vocab_size
    return [int(source.random() * limit) for _ in range(count)]
