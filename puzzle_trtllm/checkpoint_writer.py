"""Writing checkpoint folders: streamed, sharded, and never a byte more than needed.

Two rules hold for every folder we write. `mlp.experts.*` tensors sit in shards of their own, so that a later step that
changes only small tensors can hard-link the big shards. And no tensor name occurs in two files of a folder: TensorRT-
LLM's loader globs the files and ignores the index, so a stale duplicate would win silently.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puzzle_trtllm.checkpoint import INDEX_NAME, Checkpoint
from puzzle_trtllm.file_range import BUFFER_BYTES, FileRange, write_all
from puzzle_trtllm.folders import link_or_copy
from puzzle_trtllm.output_folder import nearest_folder
from puzzle_trtllm.safetensors_file import TensorEntry, encode_header, read_header
from puzzle_trtllm.tensors import TensorSpec, is_expert_tensor

MAX_SHARD_BYTES = 5_000_000_000
PIECE_BYTES = 16 * 2**20
"""Bytes between two reports of progress."""

SHARD_PATTERN = "model-*-of-*.safetensors"
"""A file has such a name only when it is finished: shards are written under a hidden name and renamed."""

Progress = Callable[[int], None]
"""Called with the number of bytes just written."""


@dataclass(frozen=True, kw_only=True)
class PlannedTensor:
    """A tensor to be written: what it is, and a way to get its bytes when its turn comes."""

    name: str
    spec: TensorSpec
    chunks: Callable[[], Iterable[NDArray[np.uint8] | FileRange]]
    """Gives the bytes in order, as uint8 arrays or ranges of files that add up to `spec.num_bytes`."""


def copy_of(entry: TensorEntry) -> PlannedTensor:
    """Plan an unchanged tensor."""

    def chunks() -> Iterator[FileRange]:
        yield from FileRange(file=entry.file, offset=entry.offset, num_bytes=entry.num_bytes).pieces(PIECE_BYTES)

    return PlannedTensor(name=entry.name, spec=TensorSpec(dtype=entry.dtype, shape=entry.shape), chunks=chunks)


def rows_of(entry: TensorEntry, rows: Sequence[int]) -> PlannedTensor:
    """Plan the given rows (indices of the first axis, in this order) of a tensor, byte for byte."""
    row_bytes = entry.num_bytes // entry.shape[0]

    def chunks() -> Iterator[FileRange]:
        for start, count in _runs(rows):
            run = FileRange(file=entry.file, offset=entry.offset + start * row_bytes, num_bytes=count * row_bytes)
            yield from run.pieces(PIECE_BYTES)

    spec = TensorSpec(dtype=entry.dtype, shape=(len(rows), *entry.shape[1:]))
    return PlannedTensor(name=entry.name, spec=spec, chunks=chunks)


def tensor_of(name: str, dtype: str, values: NDArray[Any]) -> PlannedTensor:
    """Plan a tensor that is in memory; `values` has the bytes of `dtype` (BF16 as uint16 bit patterns)."""
    data = np.ascontiguousarray(values)  # makes a scalar 1-d: the shape is taken from `values`
    spec = TensorSpec(dtype=dtype, shape=np.shape(values))
    return PlannedTensor(name=name, spec=spec, chunks=lambda: [data.reshape(-1).view(np.uint8)])


def write_shards(
    folder: Path,
    tensors: Sequence[PlannedTensor],
    *,
    linked_shards: Mapping[Path, Sequence[str]] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    keep_finished: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write `tensors` and the index into `folder`; `linked_shards` (file: its tensor names) are hard-linked unchanged.

    With `keep_finished`, shards of the right header and size are taken for finished: only where the caller knows that
    they come from an interrupted run of this very plan (see `puzzle_trtllm.resumable_folder`).

    Raises ValueError when a tensor is planned twice or its chunks do not give the planned bytes (a bug of the caller).
    """
    linked = dict(linked_shards or {})
    names = [t.name for t in tensors] + [name for shard in linked.values() for name in shard]
    if len(names) != len(set(names)):
        raise ValueError("a tensor is planned twice")
    groups = list(_split(tensors, max_shard_bytes))
    total = len(groups) + len(linked)
    shard_names = iter([f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)])
    weight_map: dict[str, str] = {}
    for group in groups:
        shard = next(shard_names)
        _write_shard(folder / shard, group, progress, keep_finished=keep_finished)
        weight_map.update({t.name: shard for t in group})
    num_linked_bytes = 0
    for file, members in linked.items():
        shard = next(shard_names)
        link_or_copy(file, folder / shard)
        num_linked_bytes += sum(entry.num_bytes for entry in read_header(file)[0].values())
        weight_map.update(dict.fromkeys(members, shard))
    size = sum(t.spec.num_bytes for t in tensors) + num_linked_bytes
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def rewrite_checkpoint(
    source: Checkpoint,
    folder: Path,
    *,
    config: Mapping[str, Any],
    replace: Mapping[str, PlannedTensor | None],
    add: Sequence[PlannedTensor] = (),
    companions: bool = True,
    progress: Progress | None = None,
) -> None:
    """Write `source` into `folder` with some tensors replaced (None drops one) and some added.

    Shards that hold nothing but untouched expert tensors are hard-linked; everything else is written anew. Unknown
    names in `replace` are a ValueError.
    """
    unknown = set(replace) - set(source.tensors)
    if unknown:
        raise ValueError(f"not in the checkpoint: {sorted(unknown)[0]}")
    by_file: dict[Path, list[str]] = {}
    for name, entry in source.tensors.items():
        by_file.setdefault(entry.file, []).append(name)
    linked = {
        file: names
        for file, names in by_file.items()
        if all(is_expert_tensor(name) and name not in replace for name in names)
    }
    planned = [
        replacement
        for name, entry in source.tensors.items()
        if entry.file not in linked and (replacement := replace.get(name, copy_of(entry))) is not None
    ]
    write_shards(folder, [*planned, *add], linked_shards=linked, progress=progress)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if companions:
        copy_companions(source.companion_files(), folder)


def bytes_to_write(source: Checkpoint, out: Path) -> int:
    """Bytes that `rewrite_checkpoint` cannot hard-link into `out`, where it changes no expert."""
    disk = nearest_folder(out).stat().st_dev
    files = {entry.file: entry.file.stat().st_dev == disk for entry in source.tensors.values()}
    files |= {entry.file: False for name, entry in source.tensors.items() if not is_expert_tensor(name)}
    return sum(entry.num_bytes for entry in source.tensors.values() if not files[entry.file])


def copy_companions(files: Iterable[Path], folder: Path) -> None:
    """Copy small files into `folder`, but none that it already has; a link would share later edits in place."""
    for file in files:
        if not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)


def _split(tensors: Sequence[PlannedTensor], max_shard_bytes: int) -> Iterator[list[PlannedTensor]]:
    """Group into shards in the given order, other tensors first, experts apart, none above the limit if it can be."""
    for wanted in (False, True):
        group: list[PlannedTensor] = []
        size = 0
        for tensor in (t for t in tensors if is_expert_tensor(t.name) is wanted):
            if group and size + tensor.spec.num_bytes > max_shard_bytes:
                yield group
                group, size = [], 0
            group.append(tensor)
            size += tensor.spec.num_bytes
        if group:
            yield group


def _write_shard(
    file: Path, tensors: Sequence[PlannedTensor], progress: Progress | None, *, keep_finished: bool
) -> None:
    header = encode_header({t.name: (t.spec.dtype, t.spec.shape) for t in tensors}, {"format": "pt"})
    num_bytes = sum(t.spec.num_bytes for t in tensors)
    if keep_finished and _is_finished(file, header, num_bytes):
        if progress is not None:
            progress(num_bytes)
        return
    partial = file.with_name(f".{file.name}.partial")
    with partial.open("wb", buffering=0) as stream:
        write_all(stream, memoryview(header))
        for tensor in tensors:
            _write_tensor(stream, tensor, progress)
    partial.rename(file)


def _write_tensor(stream: FileIO, tensor: PlannedTensor, progress: Progress | None) -> None:
    written = 0
    for chunk in tensor.chunks():
        for part in chunk.read(BUFFER_BYTES) if isinstance(chunk, FileRange) else (chunk.data,):
            write_all(stream, part)
        written += chunk.nbytes
        if progress is not None:
            progress(chunk.nbytes)
    if written != tensor.spec.num_bytes:
        raise ValueError(f"{tensor.name}: {written} bytes written, {tensor.spec.num_bytes} planned")


def _is_finished(file: Path, header: bytes, num_bytes: int) -> bool:
    if not file.is_file() or file.stat().st_size != len(header) + num_bytes:
        return False
    with file.open("rb") as stream:
        return stream.read(len(header)) == header


def _runs(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Consecutive indices as (start, count)."""
    start = 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or rows[end] != rows[end - 1] + 1:
            yield rows[start], end - start
            start = end
