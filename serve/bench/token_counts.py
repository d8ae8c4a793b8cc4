"""Counting tokens of a server that does not: by re-encoding its text.

A stock llmapi model streams text alone, and one response may bring several tokens, or none that shows. So when a run is
over, each answer's whole text is encoded once; a token belongs to the response that brought its last character, and has
its time. What a tokenizer would merge otherwise than the model did, and tokens without text (the end of sequence), make
the count differ slightly from the server's own: results say `token_counts: tokenizer`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace

from puzzle_trtllm.chat import ChatTokenizer
from puzzle_trtllm.serve.bench.load import Answer


def count_by_tokenizer(answers: Sequence[Answer], tokenizer: ChatTokenizer) -> list[Answer]:
    """The answers with one time for each token of their text; those that came with counts stay as they are."""
    return [_recounted(answer, tokenizer) if answer.pieces else answer for answer in answers]


def _recounted(answer: Answer, tokenizer: ChatTokenizer) -> Answer:
    ends = [characters for _, characters in answer.pieces]
    encoding = tokenizer.tokenizer.encode(answer.text, add_special_tokens=False)
    # The last character decides: a token is there when all of its text is. Byte tokens of one character share its end.
    pieces = [bisect_left(ends, min(max(end, 1), ends[-1])) for _, end in encoding.offsets]
    times_ns = tuple(answer.pieces[index][0] for index in sorted(pieces))
    return replace(answer, record=replace(answer.record, token_times_ns=times_ns or answer.record.token_times_ns))
