"""Prove that a child is its parent, byte for byte, except for what was left out.

The proof streams: for every tensor of the child it reads the same bytes from both folders, a few hundred KiB at a time,
and compares them. For cut tensors row j of the child must be the row of the j-th kept expert in the parent. Every
tensor of the child is accounted for, and so is every tensor of the parent; the first difference is named.

Two kinds of children:
- one with a derivation.json, made by `derive`: the record says what was kept, and all else must be identical, also in
  config.json (experts that were stored in the other format must be what the parent's give in it);
- one that someone else made: what was kept is found out (`match_experts`), experts and router rows must be an exact
  subset of the parent's, and other tensors may differ. Distillation retrains attention, norms and embeddings while
  experts and router stay frozen, so those are listed as retrained, and changed settings of config.json as changed.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise, zip_longest
from pathlib import Path

from puzzle_trtllm.architecture import ExpertsFormat
from puzzle_trtllm.build.converted_comparison import converted_difference, sources_of
from puzzle_trtllm.build.derivation import DERIVATION_NAME, DerivationRecord, read_derivation
from puzzle_trtllm.build.match_experts import match_experts
from puzzle_trtllm.build.progress import byte_progress
from puzzle_trtllm.build.row_comparison import first_difference, row_of, whole
from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.errors import CheckpointError
from puzzle_trtllm.safetensors_file import TensorEntry
from puzzle_trtllm.tensors import kv_scale_of

_PER_EXPERT = re.compile(r"^model\.layers\.(\d+)\.mlp\.(router|experts)\.")

KeptExperts = Sequence[Sequence[int]]
"""Per layer, the parent's index of each of the child's experts."""


@dataclass(frozen=True, kw_only=True)
class VerificationReport:
    """What was compared, and the first difference if there is one."""

    child: Path
    parent: Path
    has_record: bool
    """True when derivation.json said what was kept; False when it was found out."""
    kept_experts: tuple[tuple[int, ...], ...]
    """Per layer, the parent's index of each of the child's experts; empty when it could not be found out."""
    num_tensors: int
    """Tensors of the child found identical."""
    num_bytes: int
    """Bytes of them, compared one by one."""
    added_scales: tuple[str, ...]
    """KV scales that calibration added since; they have no counterpart."""
    retrained: tuple[str, ...]
    """Tensors besides experts and router whose values differ; a difference, not a list, when there is a record."""
    config_changes: tuple[str, ...]
    """Settings that differ, without a record; with one they are a difference."""
    first_difference: str | None
    """One line that names the tensor, the expert and the byte; None when all is as it must be."""

    @property
    def identical(self) -> bool:
        return self.first_difference is None


def verify(child: str | Path, *, against: str | Path, quiet: bool = True) -> VerificationReport:
    """Compare `child` with its parent `against`: by its derivation.json, or without one by finding its experts.

    Differences are reported, not raised. Raises CheckpointError when the comparison makes no sense: another parent than
    recorded, indices that no parent expert has, another number of layers, or a damaged folder.
    """
    child_checkpoint, parent = Checkpoint.open(child), Checkpoint.open(against)
    child_checkpoint.validate()
    if (child_checkpoint.path / DERIVATION_NAME).exists():
        record = read_derivation(child_checkpoint.path)
        _check_record(record, child_checkpoint, parent)
        return _verify_record(child_checkpoint, parent, record, quiet=quiet)
    parent.validate()
    return _verify_subset(child_checkpoint, parent, quiet=quiet)


def _verify_record(
    child: Checkpoint, parent: Checkpoint, record: DerivationRecord, *, quiet: bool
) -> VerificationReport:
    names = _names_to_compare(child, parent)
    changes = _config_changes(child, parent, experts_format=record.experts_format)
    changes += _block_changes(child, record) + _setting_changes(child, parent)
    difference = changes[0] if changes else _first_unaccounted(names, parent, record)
    comparison = _Comparison(child, parent, record.kept_experts)
    if difference is None:
        difference = comparison.run(names, may_differ=False, quiet=quiet)
    return comparison.report(has_record=True, config_changes=(), first_difference=difference)


def _verify_subset(child: Checkpoint, parent: Checkpoint, *, quiet: bool) -> VerificationReport:
    counts = child.architecture.num_layers, parent.architecture.num_layers
    if counts[0] != counts[1]:
        raise CheckpointError("the numbers of layers differ", file=child.path, found=counts[0], expected=counts[1])
    ours, theirs = child.architecture.experts_format, parent.architecture.experts_format
    if ours != theirs:
        raise CheckpointError(
            "experts in another format than the parent's, and no derivation.json that says why",
            file=child.path,
            found=ours,
            expected=theirs,
        )
    names = _names_to_compare(child, parent)
    kept, difference = _find_experts(child, parent, names)
    comparison = _Comparison(child, parent, kept)
    if difference is None:
        difference = comparison.run(names, may_differ=True, quiet=quiet)
    changes = tuple(_config_changes(child, parent))
    return comparison.report(has_record=False, config_changes=changes, first_difference=difference)


def _find_experts(
    child: Checkpoint, parent: Checkpoint, names: Sequence[str]
) -> tuple[list[tuple[int, ...]], str | None]:
    """The kept experts of every layer, or those of the layers before a difference, and that difference."""
    pairs: dict[int, list[tuple[TensorEntry, TensorEntry]]] = {}
    for name in names:
        if per_expert := _PER_EXPERT.match(name):
            if name not in parent.tensors:
                return [], f"{name}: is not in the parent"
            ours, theirs = child.entry(name), parent.entry(name)
            if mismatch := _shape_difference(ours, theirs, per_expert=True):
                return [], mismatch
            pairs.setdefault(int(per_expert[1]), []).append((ours, theirs))
    kept: list[tuple[int, ...]] = []
    for layer in range(child.architecture.num_layers):
        found = match_experts(pairs[layer])
        for row, expert in enumerate(found):
            label = f"model.layers.{layer}.mlp.experts[{row}]"
            if expert is None:
                return kept, f"{label}: is no expert of the parent"
            if expert in found[:row]:
                return kept, f"{label}: the parent's expert {expert}, as is [{found.index(expert)}]"
        kept.append(tuple(expert for expert in found if expert is not None))
    return kept, None


class _Comparison:
    """Compares tensor after tensor and keeps count."""

    def __init__(self, child: Checkpoint, parent: Checkpoint, kept_experts: KeptExperts) -> None:
        self._child, self._parent, self._kept = child, parent, kept_experts
        self._num_tensors = self._num_bytes = 0
        self._retrained: list[str] = []

    def run(self, names: Sequence[str], *, may_differ: bool, quiet: bool) -> str | None:
        """The first difference; with `may_differ`, tensors that have no row an expert are listed instead."""
        total = sum(self._child.entry(name).num_bytes for name in names)
        with byte_progress("verify", total, quiet=quiet) as progress:
            for name in names:
                entry = self._child.entry(name)
                difference = self._compare(entry)
                if difference is not None and not (may_differ and _PER_EXPERT.match(name) is None):
                    return difference
                if difference is not None:
                    self._retrained.append(name)
                else:
                    self._num_tensors += 1
                    self._num_bytes += entry.num_bytes
                progress(entry.num_bytes)
        return None

    def report(
        self, *, has_record: bool, config_changes: tuple[str, ...], first_difference: str | None
    ) -> VerificationReport:
        return VerificationReport(
            child=self._child.path,
            parent=self._parent.path,
            has_record=has_record,
            kept_experts=tuple(tuple(kept) for kept in self._kept),
            num_tensors=self._num_tensors,
            num_bytes=self._num_bytes,
            added_scales=tuple(_added_scales(self._child, self._parent)),
            retrained=tuple(self._retrained),
            config_changes=config_changes,
            first_difference=first_difference,
        )

    def _compare(self, child: TensorEntry) -> str | None:
        sources, per_expert = sources_of(child.name, self._parent), _PER_EXPERT.match(child.name)
        if not sources:
            return f"{child.name}: is not in the parent"
        if sources != (child.name,):
            return converted_difference(child, self._parent, self._kept[int(per_expert[1])] if per_expert else ())
        parent = self._parent.entry(child.name)
        if mismatch := _shape_difference(child, parent, per_expert=per_expert is not None):
            return mismatch
        if per_expert is None:
            byte = first_difference(whole(child), whole(parent))
            return None if byte is None else f"{child.name}: differs at byte {byte}"
        for row, expert in enumerate(self._kept[int(per_expert[1])]):
            byte = first_difference(row_of(child, row), row_of(parent, expert))
            if byte is not None:
                return f"{child.name}[{row}], the parent's expert {expert}: differs at byte {byte}"
        return None


def _shape_difference(child: TensorEntry, parent: TensorEntry, *, per_expert: bool) -> str | None:
    skipped = 1 if per_expert else 0
    if (child.dtype, child.shape[skipped:]) == (parent.dtype, parent.shape[skipped:]):
        return None
    return f"{child.name}: {child.dtype} {list(child.shape)} in the child, {parent.dtype} {list(parent.shape)}"


def _added_scales(child: Checkpoint, parent: Checkpoint) -> list[str]:
    return [name for name in child.tensors if name not in parent.tensors and kv_scale_of(name) is not None]


def _names_to_compare(child: Checkpoint, parent: Checkpoint) -> list[str]:
    added = set(_added_scales(child, parent))
    return [name for name in child.tensors if name not in added]


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


def _config_changes(child: Checkpoint, parent: Checkpoint, experts_format: ExpertsFormat | None = None) -> list[str]:
    """Settings besides the blocks that differ, one line each."""
    expected = parent.architecture.with_blocks(child.architecture.blocks)
    expected = replace(expected, experts_format=experts_format or expected.experts_format)
    return [
        f"config.json: {field.name}: {ours} in the child, {theirs} in the parent"
        for field in fields(expected)
        if (ours := getattr(child.architecture, field.name)) != (theirs := getattr(expected, field.name))
    ]


def _block_changes(child: Checkpoint, record: DerivationRecord) -> list[str]:
    """Layers that are not as they were derived, one line each; no tensor shows a window."""
    found = [block.to_json() for block in child.architecture.blocks]
    return [
        f"config.json: block_configs[{layer}]: {ours} in the child, {recorded} when it was derived"
        for layer, (ours, recorded) in enumerate(zip_longest(found, record.block_configs))
        if ours != recorded
    ]


def _setting_changes(child: Checkpoint, parent: Checkpoint) -> list[str]:
    """Keys of config.json that are not as deriving these blocks leaves them, one line each: engines read them too.

    Left out is what names our code, and how the experts are stored where that was to change.
    """
    expected = child.architecture.child_config(parent.config)
    converted = child.architecture.experts_format != parent.architecture.experts_format
    apart = {"auto_map", *(("quantization_config",) if converted else ())}
    return [
        f"config.json: {key}: {reprlib.repr(ours)} in the child, {reprlib.repr(theirs)} as it was derived"
        for key in sorted({*expected, *child.config} - apart)
        if (ours := child.config.get(key)) != (theirs := expected.get(key))
    ]


def _first_unaccounted(names: Sequence[str], parent: Checkpoint, record: DerivationRecord) -> str | None:
    used: set[str] = set()
    for name in names:
        sources = sources_of(name, parent)
        if not sources:
            return f"{name}: is not in the parent"
        used.update(sources)
    for name in parent.tensors:
        if name not in used and name not in record.dropped_tensors:
            return f"{name}: is missing in the child and not recorded as dropped"
    return None
