"""What a model finally said, told apart from what it thought.

Harmony models (gpt-oss and its children) write in channels, and only the final one is the answer
(puzzle_trtllm/harmony.py). Reading the whole text instead would let a model that ran out of tokens score with a number
from the middle of its reasoning. A server that drops special tokens leaves `analysis3+7=10assistantfinal10`; there the
last `assistantfinal` (or a leading `final`) opens the answer. Text without any channel is an answer as it is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from puzzle_trtllm.chat import ChatTokenizer
from puzzle_trtllm.harmony import CHANNEL, FINAL, HarmonyDecoder, Header, join_pieces, speaks_harmony, split_messages

_SPECIAL_TOKEN = re.compile(r"<\|[^|<>]*\|>")


def final_answer(text: str) -> str | None:
    """The text of the last final channel, stripped; None when a channel was opened but never the final one."""
    if CHANNEL in text:
        return _last_final(split_messages(text))
    if text.startswith("final"):
        return text.removeprefix("final").strip()
    _, marker, final = text.rpartition("assistantfinal")
    if marker:
        return final.strip()
    return None if text.startswith("analysis") else _SPECIAL_TOKEN.sub("", text).strip()


def final_answer_of_tokens(token_ids: Sequence[int], tokenizer: ChatTokenizer) -> str | None:
    """The same from what the model generated itself, where text that imitates a special token fools nobody."""
    if not speaks_harmony(tokenizer.tokenizer):
        return final_answer(tokenizer.decode(token_ids))
    decoder = HarmonyDecoder(tokenizer.tokenizer)
    return _last_final(join_pieces([*decoder.feed(token_ids), *decoder.finish()]))


def _last_final(messages: Sequence[tuple[Header, str]]) -> str | None:
    finals = [body for header, body in messages if header.channel == FINAL]
    return finals[-1].strip() if finals else None
