"""Prove that a child is its parent, byte for byte, except for what its derivation.json says was left out.

The proof streams: for every tensor of the child it reads the same bytes from both folders, a few MiB at a time, and
compares them. It shares no code with `derive`, so that a mistake there cannot hide here. For cut tensors row j of the
child must be row `kept_experts[layer][j]` of the parent. Every tensor of the child is accounted for, and so is every
tensor of the parent; the first difference is named.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path

import numpy as np

from puzzle_trtllm.build.derivation import DerivationRecord, read_derivation
from puzzle_trtllm.build.progress import byte_progress
from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.errors import CheckpointError
from puzzle_trtllm.safetensors_file import TensorEntry
from puzzle_trtllm.tensors import kv_scale_of

CHUNK_BYTES = 8 * 2**20
_PER_EXPERT = re.compile(r"^model\.layers\.(\d+)\.mlp\.(router|experts)\.")


@dataclass(frozen=True, kw_only=True)
class VerificationReport:
    """What was compared, and the first difference if there is one."""

    child: Path
    parent: Path
    num_tensors: int
    """Tensors of the child found identical."""
    num_bytes: int
    """Bytes of them, compared one by one."""
    added_scales: tuple[str, ...]
    """KV scales that calibration added since; they have no counterpart."""
    first_difference: str | None
    """One line that names the tensor, the expert and the byte; None when all is identical."""

    @property
    def identical(self) -> bool:
        return self.first_difference is None


@dataclass(frozen=True, kw_only=True)
class _Range:
    """The same bytes in both files, and how to call them."""

    label: str
    child_offset: int
    parent_offset: int
    num_bytes: int


def verify(child: str | Path, *, against: str | Path, quiet: bool = True) -> VerificationReport:
    """Compare `child` (with its derivation.json) with its parent `against`.

    Differences are reported, not raised. Raises CheckpointError when the comparison makes no sense: no
    derivation.json, another parent than recorded, indices that no parent expert has, or a damaged folder.
    """
    child_checkpoint, parent = Checkpoint.open(child), Checkpoint.open(against)
    record = read_derivation(child_checkpoint.path)
    child_checkpoint.validate()
    _check_record(record, child_checkpoint, parent)
    added = tuple(n for n in child_checkpoint.tensors if n not in parent.tensors and kv_scale_of(n) is not None)
    names = [name for name in child_checkpoint.tensors if name not in added]
    difference = _config_difference(child_checkpoint, parent) or _first_unaccounted(names, parent, record)
    num_tensors = num_bytes = 0
    total = sum(child_checkpoint.entry(name).num_bytes for name in names)
    with byte_progress("verify", total, quiet=quiet) as progress:
        for name in names if difference is None else ():
            difference = _compare(child_checkpoint.entry(name), parent.entry(name), record)
            if difference is not None:
                break
            num_tensors += 1
            num_bytes += child_checkpoint.entry(name).num_bytes
            progress(child_checkpoint.entry(name).num_bytes)
    return VerificationReport(
        child=child_checkpoint.path,
        parent=parent.path,
        num_tensors=num_tensors,
        num_bytes=num_bytes,
        added_scales=added,
        first_difference=difference,
    )


def _check_record(record: DerivationRecord, child: Checkpoint, parent: Checkpoint) -> None:
    _check_fingerprint(record, child, parent)
    counts = [block.num_local_experts for block in child.architecture.blocks]
    parents = [block.num_local_experts for block in parent.architecture.blocks]
    if not len(counts) == len(parents) == len(record.kept_experts):
        raise CheckpointError("the numbers of layers differ", file=child.path, key="kept_experts")
    for layer, (kept, count, available) in enumerate(zip(record.kept_experts, counts, parents, strict=True)):
        ascending = all(a < b for a, b in pairwise(kept))
        if len(kept) != count or not ascending or not all(0 <= expert < available for expert in kept):
            raise CheckpointError(
                "is no choice of the parent's experts",
                file=child.path / "derivation.json",
                key=f"kept_experts[{layer}]",
                found=kept,
                expected=f"{count} ascending indices below {available}",
            )


def _check_fingerprint(record: DerivationRecord, child: Checkpoint, parent: Checkpoint) -> None:
    # The fingerprint was taken without the tensors that derive drops by name.
    found = parent.without(record.dropped_tensors).fingerprint()
    if found != record.parent_fingerprint:
        raise CheckpointError(
            f"{child.path} was derived from another parent",
            file=parent.path,
            found=found,
            expected=record.parent_fingerprint,
        )


def _config_difference(child: Checkpoint, parent: Checkpoint) -> str | None:
    expected = parent.architecture.with_blocks(child.architecture.blocks)
    for field in fields(expected):
        ours, theirs = getattr(child.architecture, field.name), getattr(expected, field.name)
        if ours != theirs:
            return f"config.json: {field.name}: {ours} in the child, {theirs} in the parent"
    return None


def _first_unaccounted(names: list[str], parent: Checkpoint, record: DerivationRecord) -> str | None:
    for name in names:
        if name not in parent.tensors:
            return f"{name}: is not in the parent"
    for name in parent.tensors:
        if name not in names and name not in record.dropped_tensors:
            return f"{name}: is missing in the child and not recorded as dropped"
    return None


def _compare(child: TensorEntry, parent: TensorEntry, record: DerivationRecord) -> str | None:
    if child.dtype != parent.dtype or child.shape[1:] != parent.shape[1:]:
        return f"{child.name}: {child.dtype} {list(child.shape)} in the child, {parent.dtype} {list(parent.shape)}"
    per_expert = _PER_EXPERT.match(child.name)
    if per_expert is None and child.shape != parent.shape:
        return f"{child.name}: shape {list(child.shape)} in the child, {list(parent.shape)} in the parent"
    kept = record.kept_experts[int(per_expert[1])] if per_expert else None
    for part in _ranges(child, parent, kept):
        byte = _first_different_byte(child.file, parent.file, part)
        if byte is not None:
            return f"{part.label}: differs at byte {byte}"
    return None


def _ranges(child: TensorEntry, parent: TensorEntry, kept: list[int] | None) -> Iterator[_Range]:
    if kept is None:
        yield _Range(
            label=child.name, child_offset=child.offset, parent_offset=parent.offset, num_bytes=child.num_bytes
        )
        return
    row_bytes = child.num_bytes // child.shape[0]
    for row, expert in enumerate(kept):
        yield _Range(
            label=f"{child.name}[{row}], the parent's expert {expert}",
            child_offset=child.offset + row * row_bytes,
            parent_offset=parent.offset + expert * row_bytes,
            num_bytes=row_bytes,
        )


def _first_different_byte(child: Path, parent: Path, part: _Range) -> int | None:
    with child.open("rb") as ours, parent.open("rb") as theirs:
        ours.seek(part.child_offset)
        theirs.seek(part.parent_offset)
        for start in range(0, part.num_bytes, CHUNK_BYTES):
            count = min(CHUNK_BYTES, part.num_bytes - start)
            left, right = ours.read(count), theirs.read(count)
            if left != right:
                return start + _first_difference(left, right)
    return None


def _first_difference(left: bytes, right: bytes) -> int:
    length = min(len(left), len(right))
    unequal = np.frombuffer(left, np.uint8, length) != np.frombuffer(right, np.uint8, length)
    return int(unequal.argmax()) if unequal.any() else length
