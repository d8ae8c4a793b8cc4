"""Calibration data: conversations, texts or token ids, turned into token sequences.

A record is `{"messages": [...], "reasoning_effort": "high"}` (rendered by the checkpoint's own chat template),
`{"text": "..."}` or `{"input_ids": [...]}`; `records` says where they may come from, `record_encoder` what becomes of
them. Which are taken is decided by a seed alone, so that the same command gives the same scales anywhere; what was
taken is named by a fingerprint over the token ids.

The trap is padding: the K of a pad token is in no real cache, yet a maximum over the batch would count it. So nothing
is padded: batches hold sequences of equal length. `pack=True` instead cuts the concatenation of all records into rows
of one length, which suits long plain texts; a conversation that starts in the middle of a row sits at positions where
it never occurs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from puzzle_trtllm.calibration.record_encoder import RecordEncoder
from puzzle_trtllm.calibration.records import draw_records
from puzzle_trtllm.chat import REASONING_EFFORTS
from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.errors import CalibrationError

OWN_NAME = "calibration.jsonl"
"""Taken from the checkpoint's own folder when no dataset is named."""

BUNDLED = Path(__file__).parent / "default_conversations.jsonl"
"""Taken when the checkpoint brings none: a few conversations of many kinds. Enough to run, too little to rely on."""


class DataOptions(TypedDict, total=False):
    """What to calibrate on; the keywords of `load_dataset`, and of every function that calls it."""

    dataset: str | Path | None
    """A .jsonl, .txt or .parquet file, a folder of data files, or a dataset's name on the hub; None: the checkpoint's
    own calibration.jsonl, or else the bundled conversations."""
    dataset_config: str | None
    """Of a dataset on the hub or in a folder."""
    split: str
    """Of a dataset on the hub or in a folder; "train" if not given."""
    column: str | None
    """The column with the messages, text or token ids; None: whichever of those names there is."""
    efforts: Sequence[str]
    """Reasoning efforts, in turn, for conversations that name none."""
    max_samples: int
    """Records at most (512)."""
    max_tokens: int
    """No further record is taken once there are this many tokens."""
    sequence_length: int | None
    """Cut sequences at this many tokens; None: one above the model's limit is an error."""
    pack: bool
    """Fill rows of `sequence_length` with several records."""
    seed: int
    """Which records are drawn, and in which order (0)."""


@dataclass(frozen=True, kw_only=True)
class CalibrationDataset:
    """Token sequences, each int64 `[T]`, in sampled order."""

    source: str | Path
    sequences: tuple[NDArray[np.int64], ...]
    contents: tuple[bytes, ...] = ()
    """By sequence a digest of what its record says (EncodedRecord.content); none where rows hold several records."""

    @property
    def num_tokens(self) -> int:
        return sum(len(sequence) for sequence in self.sequences)

    @property
    def is_bundled(self) -> bool:
        """Whether these are the conversations that come with this package."""
        return self.source == BUNDLED

    @property
    def fingerprint(self) -> str:
        """`sha256:...` over the token ids and where sequences end; the file's name and format do not matter."""
        digest = hashlib.sha256()
        for sequence in self.sequences:
            digest.update(np.int64(len(sequence)).tobytes())
            digest.update(sequence.tobytes())
        return f"sha256:{digest.hexdigest()}"

    def subset(self, kept: Sequence[bool]) -> CalibrationDataset:
        """The sequences for which `kept` is true."""
        sequences, contents = compress(self.sequences, kept), compress(self.contents, kept)
        return replace(self, sequences=tuple(sequences), contents=tuple(contents))

    def packed(self, length: int) -> CalibrationDataset:
        """Rows of exactly `length` tokens; a last incomplete one stays, so that little data is not none."""
        if not self.sequences:
            return self
        stream = np.concatenate(self.sequences)
        rows = tuple(stream[start : start + length] for start in range(0, len(stream), length))
        return replace(self, sequences=rows, contents=())

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
    dataset: str | Path | None,
    checkpoint: Checkpoint,
    *,
    dataset_config: str | None = None,
    split: str = "train",
    column: str | None = None,
    efforts: Sequence[str] = (),
    max_samples: int = 512,
    max_tokens: int = 262_144,
    sequence_length: int | None = None,
    pack: bool = False,
    seed: int = 0,
    pack_later: bool = False,
) -> CalibrationDataset:
    """Draw, render and tokenize `dataset` for this checkpoint; DataOptions says what each keyword means.

    `pack_later` leaves what `pack` asks for to the caller (`CalibrationDataset.packed`), who gets whole records.
    Raises CalibrationError naming file and line.
    """
    limit = checkpoint.architecture.max_position_embeddings
    _check_options(efforts, sequence_length, limit, pack)
    source = _named_or_default(dataset, checkpoint)
    bundled = source == BUNDLED
    encoder = RecordEncoder(checkpoint, column=column, efforts=efforts, plain_without_template=bundled)
    if bundled and sequence_length is None:
        sequence_length = limit
    sequences: list[NDArray[np.int64]] = []
    contents: list[bytes] = []
    num_tokens = 0
    records = draw_records(
        source, columns=encoder.columns, max_samples=max_samples, seed=seed, config=dataset_config, split=split
    )
    for place, record in records:
        encoded = encoder.encode(record, place)
        ids = encoded.ids
        if sequence_length is None and len(ids) > limit:
            expected = f"at most {limit} tokens, or a sequence_length to cut at"
            raise CalibrationError("longer than the model's limit", file=place, found=len(ids), expected=expected)
        sequences.append(ids if pack else ids[:sequence_length])
        contents.append(encoded.content)
        num_tokens += len(sequences[-1])
        if num_tokens >= max_tokens:
            break
    found = CalibrationDataset(source=source, sequences=tuple(sequences), contents=tuple(contents))
    found = found.subset([len(sequence) > 0 for sequence in sequences])
    if not found.sequences:
        raise CalibrationError("no tokens", file=source, expected="at least one record with text")
    return found.packed(sequence_length or limit) if pack and not pack_later else found


def load_chosen(
    checkpoint: Checkpoint, options: DataOptions, *, max_tokens: int, pack_later: bool = False
) -> CalibrationDataset:
    """`load_dataset` with the keywords of `options`; `max_tokens` holds when they do not say."""
    named: dict[str, Any] = {"max_tokens": max_tokens, "dataset": None, **options}
    return load_dataset(named.pop("dataset"), checkpoint, pack_later=pack_later, **named)


def _check_options(efforts: Sequence[str], sequence_length: int | None, limit: int, pack: bool) -> None:
    if sequence_length is not None and not 1 <= sequence_length <= limit:
        expected = f"1 to {limit} (the model's limit)"
        raise CalibrationError("impossible", key="sequence_length", found=sequence_length, expected=expected)
    if pack and sequence_length is None:
        raise CalibrationError("packing needs a row length", key="sequence_length")
    for effort in efforts:
        if effort not in REASONING_EFFORTS:
            expected = ", ".join(REASONING_EFFORTS)
            raise CalibrationError("unknown reasoning effort", key="efforts", found=effort, expected=expected)


def _named_or_default(dataset: str | Path | None, checkpoint: Checkpoint) -> str | Path:
    if dataset is not None:
        return dataset
    own = checkpoint.path / OWN_NAME
    return own if own.is_file() else BUNDLED
