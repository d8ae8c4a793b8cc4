"""What a model finally said, told apart from what it thought.

Harmony models (gpt-oss and its children) write in channels:

    <|channel|>analysis<|message|>3+7=10<|end|><|start|>assistant<|channel|>final<|message|>10<|return|>

Only the final channel is the answer. Reading the whole text instead would let a model that ran out of tokens score with
a number from the middle of its reasoning. A server that drops special tokens leaves `analysis3+7=10assistantfinal10`;
there the last `assistantfinal` (or a leading `final`) opens the answer. Text without any channel is an answer as it is.
"""

from __future__ import annotations

import re

# A channel's header may go on after its name, up to <|message|> (`final <|constrain|>json`).
_FINAL_CHANNEL = re.compile(
    r"<\|channel\|>final\b(?:(?!<\|channel\|>|<\|message\|>).)*<\|message\|>((?:(?!<\|channel\|>).)*)", re.DOTALL
)
_SPECIAL_TOKEN = re.compile(r"<\|[^|<>]*\|>")


def final_answer(text: str) -> str | None:
    """The text of the last final channel, stripped; None when a channel was opened but never the final one."""
    if "<|channel|>" in text:
        finals = _FINAL_CHANNEL.findall(text)
        return _SPECIAL_TOKEN.split(finals[-1])[0].strip() if finals else None
    if text.startswith("final"):
        return text.removeprefix("final").strip()
    _, marker, final = text.rpartition("assistantfinal")
    if marker:
        return final.strip()
    return None if text.startswith("analysis") else _SPECIAL_TOKEN.sub("", text).strip()
