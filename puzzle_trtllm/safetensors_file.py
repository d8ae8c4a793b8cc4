"""One safetensors file: its header read and checked, nothing else touched.

A file is `u64 header length | JSON header | data`. The header maps each tensor to dtype, shape and a byte range of the
data. Reading only headers lets us describe a 60 GB checkpoint in milliseconds and copy tensors byte for byte without
interpreting them. What a header says is never trusted: ranges must lie in the file, not overlap, leave no hole, and
agree with dtype and shape.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puzzle_trtllm.errors import CheckpointError
from puzzle_trtllm.json_files import RepeatedKeyError, unique_keys
from puzzle_trtllm.plain_file import check_plain
from puzzle_trtllm.tensors import DTYPE_BYTES

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""
_TOO_LARGE = 2**63
_MAX_DIMENSIONS = 64
LFS_PREFIX = b"version "
"""Of what a clone without Git LFS has in a shard's place: `version https://git-lfs.github.com/spec/v1`."""


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """Where a tensor's bytes are."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    """Absolute, in the file."""
    num_bytes: int


def read_header(file: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Read `file`'s tensors and metadata. Raises CheckpointError in one line for anything damaged."""
    try:
        check_plain(file)
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            if len(prefix) < 8:
                raise CheckpointError("truncated: no header", file=file, found=f"{size} bytes")
            if prefix == LFS_PREFIX:
                raise CheckpointError(
                    "a Git LFS pointer, not the file itself", file=file, expected="`git lfs pull` first"
                )
            (length,) = struct.unpack("<Q", prefix)
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError("truncated or corrupt: the header runs past the file", file=file)
            raw = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", file=file) from None
    header = _parse(raw, file)
    metadata = _metadata(header.pop("__metadata__", {}), file)
    data_start = 8 + length
    entries = {name: _entry(name, info, file, data_start) for name, info in header.items()}
    _check_ranges(entries, file, data_start, size)
    return entries, metadata


def encode_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The length prefix and header of a file that holds `tensors` (name: dtype, shape) in this order, 8-byte padded."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + math.prod(shape) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def _parse(raw: bytes, file: Path) -> dict[str, Any]:
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique_keys)
    except RepeatedKeyError as error:
        raise CheckpointError("occurs twice in the header", file=file, key=error.key) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"corrupt header: {error}", file=file) from None
    if not isinstance(header, dict):
        raise CheckpointError("corrupt header: not an object", file=file)
    return header


def _metadata(value: Any, file: Path) -> dict[str, str]:
    """The format has text here only; other writers go on from what we read."""
    if not isinstance(value, dict):
        raise CheckpointError("must be a mapping", file=file, key="__metadata__", found=type(value).__name__)
    for key, text in value.items():
        if not isinstance(text, str):
            found = type(text).__name__
            raise CheckpointError("must be text", file=file, key=f"__metadata__.{key}", found=found)
    return value


def _entry(name: str, info: Any, file: Path, data_start: int) -> TensorEntry:
    try:
        dtype, shape, (start, end) = info["dtype"], tuple(info["shape"]), info["data_offsets"]
        numbers_fit = all(isinstance(n, int) and 0 <= n < _TOO_LARGE for n in (*shape, start, end))
        well_formed = numbers_fit and len(shape) <= _MAX_DIMENSIONS and end >= start
    except (TypeError, KeyError, ValueError):
        well_formed = False
    if not well_formed:
        raise CheckpointError("corrupt header entry", file=file, key=name)
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise CheckpointError("unknown dtype", file=file, key=name, found=dtype)
    expected = math.prod(shape) * DTYPE_BYTES[dtype]
    if end - start != expected:
        raise CheckpointError(
            "the byte range does not fit the shape", file=file, key=name, found=end - start, expected=expected
        )
    return TensorEntry(name=name, dtype=dtype, shape=shape, file=file, offset=data_start + start, num_bytes=end - start)


def _check_ranges(entries: Mapping[str, TensorEntry], file: Path, data_start: int, size: int) -> None:
    position = data_start
    for entry in sorted(entries.values(), key=lambda e: (e.offset, e.num_bytes)):
        if entry.offset < position:
            raise CheckpointError("overlaps the tensor before it", file=file, key=entry.name)
        if entry.offset > position:
            raise CheckpointError("a hole in the file before this tensor", file=file, key=entry.name)
        position = entry.offset + entry.num_bytes
        if position > size:
            raise CheckpointError(
                "the file is truncated", file=file, key=entry.name, found=f"{size} bytes", expected=f"{position} bytes"
            )
    if position != size:
        raise CheckpointError("bytes after the last tensor", file=file, found=size, expected=position)
