"""Records to token ids: text as it stands, conversations through the checkpoint's own chat template.

Templates may print today's date (gpt-oss's does), which would give other scales tomorrow; here it is always
TEMPLATE_DATE. The tokenizer is read when a record first needs it, and held to the model: a token that the embedding
has no row for means that it belongs to another model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puzzle_trtllm.chat import REASONING_EFFORTS, ChatTokenizer
from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.errors import CalibrationError, CheckpointError, PuzzleError

TEMPLATE_DATE = datetime(2025, 8, 5)
"""The day of gpt-oss's release."""

COLUMNS = ("messages", "text", "input_ids")
"""What a record says, in whichever of these columns it has."""

COLUMNS_BESIDE = ("reasoning_effort", "attention_mask")
"""What is read of a record besides."""

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True, kw_only=True)
class EncodedRecord:
    """What a record became."""

    ids: NDArray[np.int64]
    """`[T]`"""
    content: bytes
    """A digest of what it says, which for a conversation leaves its effort out."""


class RecordEncoder:
    """Encodes the records of one dataset for one checkpoint.

    `column` is where a record says what it says; None takes whichever of COLUMNS it has. `efforts` are taken in turn by
    conversations that name no `reasoning_effort` of their own; empty leaves the template's default. With
    `plain_without_template` a checkpoint that has no chat template gets a conversation's texts, one below the other.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        column: str | None = None,
        efforts: Sequence[str] = (),
        plain_without_template: bool = False,
    ) -> None:
        self._checkpoint, self._column, self._efforts = checkpoint, column, tuple(efforts)
        self._plain_without_template = plain_without_template
        self._num_conversations = 0
        self._tokenizer: ChatTokenizer | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """All that `encode` reads of a record."""
        return (*self._wanted, *COLUMNS_BESIDE)

    @property
    def _wanted(self) -> tuple[str, ...]:
        return COLUMNS if self._column is None else (self._column,)

    def encode(self, record: Mapping[str, Any], place: str) -> EncodedRecord:
        """Raises CalibrationError naming `place`, CheckpointError when the tokenizer cannot be used."""
        column, value = self._said(record, place)
        if isinstance(value, str) and column not in ("messages", "input_ids"):
            return self._encoded(self._tokens(value, place), place)
        if _is_token_ids(value) and column not in ("messages", "text"):
            return self._encoded(_unpadded(value, record.get("attention_mask"), place), place)
        if column == "input_ids":
            raise CalibrationError("must be a list of token ids", file=place, key=column)
        if column == "text":
            raise CalibrationError("must be a string", file=place, key=column)
        messages = _messages(value, column, place)
        ids = self._encode_chat(messages, _effort(record, place), place)
        return self._encoded(ids, place, content=json.dumps(messages, sort_keys=True, default=str))

    def _said(self, record: Mapping[str, Any], place: str) -> tuple[str, Any]:
        found = [column for column in self._wanted if record.get(column) is not None]
        if len(found) != 1:
            expected = f"one of {', '.join(COLUMNS)} (--column names another)" if self._column is None else self._column
            raise CalibrationError("unknown record", file=place, found=list(record), expected=expected)
        return found[0], record[found[0]]

    def _encode_chat(self, messages: list[dict[str, Any]], effort: str | None, place: str) -> list[int]:
        tokenizer = self._read_tokenizer()
        if self._plain_without_template and not tokenizer.has_template:
            return self._tokens("\n".join(message.get("content", "") for message in messages), place)
        if effort is None and self._efforts:
            effort = self._efforts[self._num_conversations % len(self._efforts)]
            self._num_conversations += 1
        try:
            text = tokenizer.render_chat(
                messages,
                reasoning_effort=effort,
                add_generation_prompt=messages[-1].get("role") != "assistant",
                now=TEMPLATE_DATE,
            )
        except CheckpointError as error:
            raise CalibrationError(str(error), file=place) from None
        return self._tokens(text, place)

    def _tokens(self, text: str, place: str) -> list[int]:
        tokenizer = self._read_tokenizer()
        try:
            return tokenizer.encode(text)
        except PuzzleError as error:
            raise CalibrationError(str(error), file=place) from None

    def _read_tokenizer(self) -> ChatTokenizer:
        if self._tokenizer is None:
            tokenizer = ChatTokenizer.from_folder(self._checkpoint.path)
            try:
                tokenizer.check_vocabulary(self._checkpoint.architecture.vocab_size)
            except CheckpointError as error:
                raise CalibrationError(str(error)) from None
            self._tokenizer = tokenizer
        return self._tokenizer

    def _encoded(self, ids: Sequence[int], place: str, *, content: str | None = None) -> EncodedRecord:
        """Checked against the vocabulary; without `content` the ids are what the record says."""
        vocab_size = self._checkpoint.architecture.vocab_size
        if len(ids) and max(ids) >= vocab_size:
            raise CalibrationError(
                "a token id outside the model's vocabulary (another model's tokenizer?)",
                file=place,
                found=max(ids),
                expected=f"below {vocab_size}",
            )
        array = np.array(ids, dtype=np.int64)
        said = array.tobytes() if content is None else content.encode()
        return EncodedRecord(ids=array, content=hashlib.sha256(said).digest())


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(i) is int and i >= 0 for i in value)


def _unpadded(ids: list[int], mask: Any, place: str) -> list[int]:
    """The ids that `mask` keeps; None keeps all."""
    if mask is None:
        return ids
    if not isinstance(mask, list) or len(mask) != len(ids) or not all(type(m) is int and m in (0, 1) for m in mask):
        raise CalibrationError(
            "does not fit the token ids",
            file=place,
            key="attention_mask",
            expected=f"a list of {len(ids)} zeros and ones",
        )
    return [i for i, kept in zip(ids, mask, strict=True) if kept]


def _effort(record: Mapping[str, Any], place: str) -> str | None:
    """What the record asks for. Templates are no check: gpt-oss's prints whatever it is given."""
    effort: str | None = record.get("reasoning_effort")
    if effort is not None and effort not in REASONING_EFFORTS:
        raise CalibrationError(
            "unknown reasoning effort",
            file=place,
            key="reasoning_effort",
            found=effort,
            expected=", ".join(REASONING_EFFORTS),
        )
    return effort


def _messages(value: Any, column: str, place: str) -> list[dict[str, Any]]:
    """Messages as templates read them, also from `{"from": "human", "value": ...}`.

    What a message says must be text: many templates print anything, a list as Python writes it.
    """
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise CalibrationError("must be a list of messages", file=place, key=column)
    messages = []
    for number, message in enumerate(value):
        kept = {key: part for key, part in message.items() if part is not None}  # Arrow fills absent keys with null
        if "from" in kept and "value" in kept:
            role = str(kept["from"])
            kept = {"role": _SHAREGPT_ROLES.get(role, role), "content": kept["value"]}
        if "role" not in kept:
            raise CalibrationError("must be a list of messages", file=place, key=column)
        if "content" in kept:
            kept["content"] = _joined(kept["content"])
        for key in ("role", "content"):
            if not isinstance(kept.get(key, ""), str):
                found = type(kept[key]).__name__
                expected = "a string" if key == "role" else "a string or a list of text parts"
                raise CalibrationError(
                    "not text", file=place, key=f"{column}[{number}].{key}", found=found, expected=expected
                )
        messages.append(kept)
    return messages


def _joined(content: Any) -> Any:
    """The text of a list of `{"type": "text", "text": ...}`; anything else as it is."""
    if not isinstance(content, list):
        return content
    parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
    texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
    return "".join(texts) if len(texts) == len(content) else content
