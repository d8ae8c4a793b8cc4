"""Calibration data: files of conversations, texts or token ids, turned into token sequences.

A JSONL file holds one record a line: `{"messages": [...], "reasoning_effort": "high"}` (rendered by the checkpoint's
own chat template), `{"text": "..."}` or `{"input_ids": [...]}`. A .txt file holds paragraphs, separated by blank lines.
Which records are taken is decided by a seed alone, so that the same command gives the same scales anywhere; what was
taken is named by a fingerprint over the token ids.

The trap is padding: the K of a pad token is in no real cache, yet a maximum over the batch would count it. So nothing
is padded: batches hold sequences of equal length. `pack=True` instead cuts the concatenation of all records into rows
of one length, which suits long plain texts; a conversation that starts in the middle of a row sits at positions where
it never occurs.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puzzle_trtllm.chat import ChatTokenizer
from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.errors import CalibrationError

DEFAULT_NAME = "calibration.jsonl"
"""Taken from the checkpoint's own folder when no dataset is named."""

_RECORD_KEYS = ("messages", "text", "input_ids")


@dataclass(frozen=True, kw_only=True)
class CalibrationDataset:
    """Token sequences, each int64 `[T]`, in sampled order."""

    source: Path
    sequences: tuple[NDArray[np.int64], ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(sequence) for sequence in self.sequences)

    @property
    def fingerprint(self) -> str:
        """`sha256:...` over the token ids and where sequences end; the file's name and format do not matter."""
        digest = hashlib.sha256()
        for sequence in self.sequences:
            digest.update(np.int64(len(sequence)).tobytes())
            digest.update(sequence.tobytes())
        return f"sha256:{digest.hexdigest()}"

    def batches(self, max_tokens: int) -> Iterator[NDArray[np.int64]]:
        """Token ids `[B, T]`, shortest first; at most `max_tokens` each unless one sequence alone is longer."""
        ordered = sorted(self.sequences, key=len)
        start = 0
        while start < len(ordered):
            length = len(ordered[start])
            stop = start + 1
            while stop < len(ordered) and len(ordered[stop]) == length and (stop + 1 - start) * length <= max_tokens:
                stop += 1
            yield np.stack(ordered[start:stop])
            start = stop


def load_dataset(
    path: str | Path | None,
    checkpoint: Checkpoint,
    *,
    max_samples: int = 512,
    max_tokens: int = 262_144,
    sequence_length: int | None = None,
    pack: bool = False,
    seed: int = 0,
) -> CalibrationDataset:
    """Read, sample and tokenize `path` (None: the checkpoint's own calibration.jsonl) for this checkpoint.

    At most `max_samples` records, fewer when they reach `max_tokens`. Sequences above `sequence_length` are cut;
    without it, one above the model's limit is an error. Raises CalibrationError naming file and line.
    """
    file = Path(path) if path is not None else checkpoint.path / DEFAULT_NAME
    if not file.is_file():
        expected = "a .jsonl or .txt file" if path is not None else "a dataset (--dataset): the checkpoint brings none"
        raise CalibrationError("missing", file=file, expected=expected)
    limit = checkpoint.architecture.max_position_embeddings
    if sequence_length is not None and not 1 <= sequence_length <= limit:
        expected = f"1 to {limit} (the model's limit)"
        raise CalibrationError("impossible", key="sequence_length", found=sequence_length, expected=expected)
    if pack and sequence_length is None:
        raise CalibrationError("packing needs a row length", key="sequence_length")
    encoder = _Encoder(checkpoint)
    sequences: list[NDArray[np.int64]] = []
    for place, record in _sample(_read_records(file), max_samples, seed):
        ids = encoder.encode(record, place)
        if sequence_length is None and len(ids) > limit:
            expected = f"at most {limit} tokens, or a sequence_length to cut at"
            raise CalibrationError("longer than the model's limit", file=place, found=len(ids), expected=expected)
        sequences.append(ids if pack else ids[:sequence_length])
        if sum(map(len, sequences)) >= max_tokens:
            break
    if pack:
        sequences = _pack(sequences, sequence_length or limit)
    sequences = [sequence for sequence in sequences if len(sequence)]
    if not sequences:
        raise CalibrationError("no tokens", file=file, expected="at least one record with text")
    return CalibrationDataset(source=file, sequences=tuple(sequences))


Record = tuple[str, dict[str, Any]]
"""Where it stands (`file:line`), and what it says."""


def _read_records(file: Path) -> list[Record]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"cannot be read: {error}", file=file) from None
    if file.suffix == ".txt":
        paragraphs = [part.strip("\n") for part in text.replace("\r\n", "\n").split("\n\n")]
        records = [(f"{file}: paragraph {i}", {"text": part}) for i, part in enumerate(paragraphs, 1) if part]
    elif file.suffix == ".jsonl":
        lines = text.split("\n")
        records = [_parse(line, f"{file}:{i}") for i, line in enumerate(lines, 1) if line.strip()]
    else:
        raise CalibrationError("unknown kind of dataset", file=file, found=file.suffix, expected=".jsonl or .txt")
    if not records:
        raise CalibrationError("empty", file=file, expected="at least one record")
    return records


def _parse(line: str, place: str) -> Record:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise CalibrationError(f"not valid JSON: {error}", file=place) from None
    found = [key for key in _RECORD_KEYS if isinstance(record, dict) and key in record]
    if len(found) != 1:
        keys = list(record) if isinstance(record, dict) else type(record).__name__
        raise CalibrationError("unknown record", file=place, found=keys, expected=f"one of {', '.join(_RECORD_KEYS)}")
    return place, record


def _sample(records: Sequence[Record], max_samples: int, seed: int) -> list[Record]:
    """A seeded choice without repetition, in a seeded order (so that a token budget cuts no particular part)."""
    return random.Random(seed).sample(list(records), min(max_samples, len(records)))


class _Encoder:
    """Records to token ids; the tokenizer is read when a record first needs it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._tokenizer: ChatTokenizer | None = None

    def encode(self, record: dict[str, Any], place: str) -> NDArray[np.int64]:
        ids = record["input_ids"] if "input_ids" in record else self._tokenize(record, place)
        valid = isinstance(ids, list) and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids)
        if not valid:
            raise CalibrationError("must be a list of token ids", file=place, key="input_ids")
        vocab_size = self._checkpoint.architecture.vocab_size
        if ids and max(ids) >= vocab_size:
            raise CalibrationError(
                "a token id outside the model's vocabulary (another model's tokenizer?)",
                file=place,
                found=max(ids),
                expected=f"below {vocab_size}",
            )
        return np.array(ids, dtype=np.int64)

    def _tokenize(self, record: dict[str, Any], place: str) -> list[int]:
        self._tokenizer = self._tokenizer or ChatTokenizer.from_folder(self._checkpoint.path)
        if "text" in record:
            if not isinstance(record["text"], str):
                raise CalibrationError("must be a string", file=place, key="text")
            return self._tokenizer.encode(record["text"])
        messages = record["messages"]
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
            raise CalibrationError("must be a list of messages", file=place, key="messages")
        text = self._tokenizer.render_chat(
            messages,
            reasoning_effort=record.get("reasoning_effort"),
            add_generation_prompt=messages[-1].get("role") != "assistant",
        )
        return self._tokenizer.encode(text)


def _pack(sequences: Sequence[NDArray[np.int64]], length: int) -> list[NDArray[np.int64]]:
    """Rows of exactly `length` from the concatenation; a last incomplete row stays, so that little data is not none."""
    stream = np.concatenate(sequences)
    return [stream[start : start + length] for start in range(0, len(stream), length)]
