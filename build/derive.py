"""Derive a Puzzle child: a byte copy of the parent without the experts that matter least.

The experts of a Puzzle child are a subset of its parent's, so nothing need be dequantized: for every layer the rows of
the six MXFP4 expert tensors (four when BF16) and of the router's weight and bias are cut to the kept experts, all by
the same ascending indices, and every other tensor is copied. Windows live in config.json alone. On request experts are
stored in the other format (`experts`), which is exact from MXFP4 to BF16 and rounds the other way.

The conversion is total. Every tensor of the parent is cut, copied, or dropped by name with a reason; an unknown one is
an error. The result is opened and validated before it gets its name, so a folder that exists is a good one. A
derivation that was killed is taken up at its last finished shard, if it is called again with the same inputs.

The trap: the router picks its top k among the kept experts and renormalises, so dropping an expert that is rarely
chosen still moves the tokens that chose it to their next choice.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np

import puzzle_trtllm
from puzzle_trtllm.architecture import PuzzleArchitecture, read_blocks
from puzzle_trtllm.build.companions import companions
from puzzle_trtllm.build.derivation import DerivationRecord, ImportanceSource
from puzzle_trtllm.build.derivation_plan import DerivationPlan, plan_child
from puzzle_trtllm.build.expert_formats import config_with_format
from puzzle_trtllm.build.importance import ExpertImportance, read_importance
from puzzle_trtllm.build.progress import byte_progress
from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.checkpoint_writer import (
    MAX_SHARD_BYTES,
    SHARD_PATTERN,
    copy_companions,
    write_shards,
)
from puzzle_trtllm.errors import CheckpointError
from puzzle_trtllm.folders import check_not_source
from puzzle_trtllm.output_folder import check_disk_space
from puzzle_trtllm.resumable_folder import finished_bytes, resumable_folder
from puzzle_trtllm.terminal import warn

_DROPPED = ((re.compile(r"\.rotary_emb\.inv_freq$"), "computed from config.json"),)
"""Tensors of old exports that no current model reads: name pattern, reason."""

_CALIBRATION_FILES = ("hf_quant_config.json", "kv_calibration.safetensors")
"""Ride along when the parent's KV scales do."""


ExpertsChoice = Literal["mxfp4", "bf16", "keep"]


def derive(
    parent: str | Path,
    out: str | Path,
    *,
    architecture: str | Path,
    importance: str | Path,
    experts: ExpertsChoice = "keep",
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    quiet: bool = True,
) -> DerivationRecord:
    """Write the child of `parent` that `architecture` describes into the new folder `out`.

    Args:
        parent: gpt-oss checkpoint folder or hub id, MXFP4 or BF16 experts.
        out: folder to create; existing and not empty is an error unless `overwrite`.
        architecture: JSON with `block_configs`, one entry a layer (a whole config.json is accepted).
        importance: safetensors file of expert scores (see `puzzle_trtllm.build.importance`).
        experts: how to store the experts; "keep" as the parent does.

    Returns the record that is also written to `out/derivation.json`. Raises a PuzzleError subclass in one line for
    anything wrong with the inputs, and leaves nothing behind. Killed, it leaves a hidden folder beside
    `out` that the next call goes on from, or removes.
    """
    source, dropped = _open_parent(parent)
    blocks = read_blocks(architecture, source.architecture)
    scores = read_importance(importance, source)
    for line in scores.warnings:
        warn(line, quiet=quiet)
    child_architecture = source.architecture.with_blocks(blocks)
    if experts != "keep":
        child_architecture = replace(child_architecture, experts_format=experts)
    plan = plan_child(source, child_architecture, scores.kept_experts(blocks), dropped)
    out = Path(out)
    check_not_source(out, source=source.path, others=(architecture, importance))
    needed = plan.num_bytes + sum(file.stat().st_size for file in _companions(source))
    where: _Target = {"job": _job(source, plan, max_shard_bytes), "keep": SHARD_PATTERN, "overwrite": overwrite}
    if finished := finished_bytes(out, **where):
        check_disk_space(out, num_bytes=needed - finished)  # before the folder is claimed: a failure there removes it
        warn(f"{out}: going on where a killed run stopped, {finished / 1e9:.2f} GB are written", quiet=quiet)
    with resumable_folder(out, **where) as folder:
        check_disk_space(out, num_bytes=needed - finished)
        with byte_progress("derive", plan.num_bytes, quiet=quiet) as progress:
            write_shards(folder, plan.tensors, max_shard_bytes=max_shard_bytes, keep_finished=True, progress=progress)
        _write_config(folder, source, plan.architecture)
        copy_companions(_companions(source), folder)  # but no older model code of a parent that is itself a child
        child = _open_result(folder, plan.architecture)
        record = _record(source, child, plan, scores, Path(architecture))
        record.write(folder)
    return record


class _Target(TypedDict):
    job: dict[str, Any]
    keep: str
    overwrite: bool


def _open_parent(parent: str | Path) -> tuple[Checkpoint, dict[str, str]]:
    """The parent without the tensors that no model reads, validated, and those tensors with the reason."""
    checkpoint = Checkpoint.open(parent)
    dropped = {
        name: reason for name in checkpoint.tensors for pattern, reason in _DROPPED if pattern.search(name) is not None
    }
    checkpoint = checkpoint.without(dropped)
    checkpoint.validate()
    for name in checkpoint.tensors:
        if ".mlp.router." in name and not np.isfinite(checkpoint.float32(name)).all():
            raise CheckpointError("NaN or infinity in a router", file=checkpoint.entry(name).file, key=name)
    return checkpoint, dropped


def _job(parent: Checkpoint, plan: DerivationPlan, max_shard_bytes: int) -> dict[str, Any]:
    """All that the child's shards depend on. Sizes and times of the parent's files stand for their bytes."""
    files = {entry.file: entry.file.stat() for entry in parent.tensors.values()}
    return {
        "tool_version": puzzle_trtllm.__version__,
        "parent": str(parent.path.resolve()),
        "parent_fingerprint": parent.fingerprint(),
        "parent_files": {file.name: [status.st_size, status.st_mtime_ns] for file, status in files.items()},
        "kept_experts": [list(kept) for kept in plan.kept_experts],
        "experts_format": plan.architecture.experts_format,
        "max_shard_bytes": max_shard_bytes,
    }


def _write_config(folder: Path, parent: Checkpoint, architecture: PuzzleArchitecture) -> None:
    from puzzle_trtllm.models.huggingface.remote_code import write_remote_code

    config = architecture.child_config(parent.config)
    if architecture.experts_format != parent.architecture.experts_format:
        config = config_with_format(config, architecture.experts_format)
    config = write_remote_code(folder, config)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _companions(parent: Checkpoint) -> list[Path]:
    files = companions(parent)
    if parent.kv_scales:
        files += [file for name in _CALIBRATION_FILES if (file := parent.path / name).is_file()]
    return files


def _open_result(folder: Path, architecture: PuzzleArchitecture) -> Checkpoint:
    child = Checkpoint.open(folder)
    child.validate()
    if child.architecture != architecture:
        raise CheckpointError("the written config does not describe the child that was asked for", file=folder)
    return child


def _record(
    parent: Checkpoint, child: Checkpoint, plan: DerivationPlan, scores: ExpertImportance, architecture_file: Path
) -> DerivationRecord:
    return DerivationRecord(
        tool_version=puzzle_trtllm.__version__,
        parent_path=str(parent.path.resolve()),
        parent_fingerprint=parent.fingerprint(),
        child_fingerprint=child.fingerprint(),
        architecture_file=str(architecture_file.resolve()),
        block_configs=[block.to_json() for block in plan.architecture.blocks],
        importance=ImportanceSource(file=str(scores.file.resolve()), metadata=dict(scores.metadata)),
        kept_experts=[list(kept) for kept in plan.kept_experts],
        experts_format=plan.architecture.experts_format,
        dropped_tensors=plan.dropped_tensors,
        warnings=list(scores.warnings),
    )
