"""Comparing rows of tensors in two checkpoints, byte for byte, a few hundred KiB at a time.

A row is one index of a tensor's first axis: one expert's share of an expert tensor. Nothing here is shared with the
code that writes children, so that a mistake there cannot hide here. Buffers stay below the processor's cache; those
of many MiB read at a fraction of the speed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from puzzle_trtllm.errors import CheckpointError
from puzzle_trtllm.safetensors_file import TensorEntry

BUFFER_BYTES = 256 * 2**10


@dataclass(frozen=True, kw_only=True)
class Span:
    """Bytes of a file: a row, or a whole tensor."""

    file: Path
    offset: int
    num_bytes: int


def row_of(entry: TensorEntry, index: int) -> Span:
    """Row `index` of a tensor."""
    num_bytes = entry.num_bytes // entry.shape[0]
    return Span(file=entry.file, offset=entry.offset + index * num_bytes, num_bytes=num_bytes)


def whole(entry: TensorEntry) -> Span:
    """All of a tensor."""
    return Span(file=entry.file, offset=entry.offset, num_bytes=entry.num_bytes)


def read_span(span: Span, limit: int | None = None) -> bytes:
    """The bytes of a span (its first `limit`). Raises CheckpointError when the file has become shorter."""
    wanted = span.num_bytes if limit is None else min(limit, span.num_bytes)
    with span.file.open("rb") as stream:
        stream.seek(span.offset)
        data = stream.read(wanted)
    if len(data) != wanted:
        raise CheckpointError("the file ended early", file=span.file)
    return data


def first_difference(left: Span, right: Span) -> int | None:
    """The first byte in which two spans of one length differ; None if they are equal."""
    with left.file.open("rb", buffering=0) as ours, right.file.open("rb", buffering=0) as theirs:
        for stream, span in ((ours, left), (theirs, right)):
            if hasattr(os, "posix_fadvise"):  # not on macOS
                os.posix_fadvise(stream.fileno(), span.offset, span.num_bytes, os.POSIX_FADV_SEQUENTIAL)
            stream.seek(span.offset)
        for start in range(0, left.num_bytes, BUFFER_BYTES):
            count = min(BUFFER_BYTES, left.num_bytes - start)
            a, b = ours.read(count), theirs.read(count)
            if len(a) != count or len(b) != count:
                raise CheckpointError("the file ended early", file=left.file if len(a) != count else right.file)
            if a != b:
                return start + first_different_byte(a, b)
    return None


def first_different_byte(a: bytes, b: bytes) -> int:
    """Index of the first byte in which two unequal strings of one length differ."""
    return int((np.frombuffer(a, np.uint8) != np.frombuffer(b, np.uint8)).argmax())
