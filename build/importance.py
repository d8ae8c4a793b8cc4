"""Which experts a child keeps, from an importance file.

The file is safetensors: float32 `model.layers.{i}.mlp.experts.importance` `[num_experts]`, one a layer, larger = keep.
Its metadata says how it was made and for which parent (`parent_fingerprint`); scores learned on another model rank
experts that do not exist, so a different fingerprint is an error and an absent one a warning. Kept experts stay in
their original order: the router's rows and the experts' rows are cut by the same ascending indices. Equal scores go to
the lower index, so that the choice never depends on how a sort breaks ties.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from puzzle_trtllm.architecture import BlockConfig
from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.errors import CheckpointError, ConfigError
from puzzle_trtllm.safetensors_file import TensorEntry, read_header


@dataclass(frozen=True, kw_only=True)
class ExpertImportance:
    """Scores of every layer's experts, checked against their parent."""

    file: Path
    scores: tuple[NDArray[np.float32], ...]
    """One float32 `[num_experts]` a layer; no NaN."""
    metadata: Mapping[str, str]
    warnings: tuple[str, ...]

    def kept_experts(self, blocks: Sequence[BlockConfig]) -> tuple[tuple[int, ...], ...]:
        """The indices that each layer keeps, ascending."""
        return tuple(
            best_experts(scores, block.num_local_experts) for scores, block in zip(self.scores, blocks, strict=True)
        )


def best_experts(scores: NDArray[np.float32], count: int) -> tuple[int, ...]:
    """Indices of the `count` largest scores, ascending; of equal scores the lower index is kept."""
    ranked = sorted(range(len(scores)), key=lambda expert: (-float(scores[expert]), expert))
    return tuple(sorted(ranked[:count]))


def read_importance(path: str | Path, parent: Checkpoint) -> ExpertImportance:
    """Read an importance file and hold it to its parent.

    Raises ConfigError when it is damaged, of another model (fingerprint), lacks a layer, scores another number of
    experts, or holds a NaN.
    """
    file = Path(path)
    try:
        entries, metadata = read_header(file)
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    warnings = _check_fingerprint(file, metadata, parent)
    counts = [block.num_local_experts for block in parent.architecture.blocks]
    scores = tuple(_layer_scores(file, entries, layer, count) for layer, count in enumerate(counts))
    return ExpertImportance(file=file, scores=scores, metadata=metadata, warnings=warnings)


def _check_fingerprint(file: Path, metadata: Mapping[str, str], parent: Checkpoint) -> tuple[str, ...]:
    found = metadata.get("parent_fingerprint")
    if found is None:
        return (f"{file}: does not say which model it was made for (no parent_fingerprint)",)
    expected = parent.fingerprint()
    if found != expected:
        raise ConfigError("made for another model", file=file, key="parent_fingerprint", found=found, expected=expected)
    return ()


def _layer_scores(file: Path, entries: Mapping[str, TensorEntry], layer: int, num_experts: int) -> NDArray[np.float32]:
    name = f"model.layers.{layer}.mlp.experts.importance"
    entry = entries.get(name)
    expected = f"F32 [{num_experts}]"
    if entry is None:
        raise ConfigError("missing layer", file=file, key=name, expected=expected)
    if (entry.dtype, entry.shape) != ("F32", (num_experts,)):
        raise ConfigError(
            "wrong number of experts or dtype",
            file=file,
            key=name,
            found=f"{entry.dtype} {list(entry.shape)}",
            expected=expected,
        )
    scores = np.fromfile(file, dtype=np.float32, count=num_experts, offset=entry.offset)
    if np.isnan(scores).any():
        raise ConfigError("importance is NaN", file=file, key=name, found=f"expert {int(np.isnan(scores).argmax())}")
    return scores
