"""A few layers of a checkpoint as a checkpoint of its own: real weights and shapes, small enough for any host.

Layers are renumbered and nothing else changes, so what two engines make of the slice is nonsense to read and the same
arithmetic to compare. In the 88B child layers 0, 3, 15 and 22 have both expert counts and all three windows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.checkpoint_writer import PlannedTensor, copy_companions, copy_of, write_shards
from puzzle_trtllm.errors import CheckpointError, PuzzleError
from puzzle_trtllm.folders import atomic_folder

_LAYER = re.compile(r"^(model\.layers\.)(\d+)(\..*)$")


def slice_layers(checkpoint: str | Path, out: str | Path, layers: Sequence[int]) -> Checkpoint:
    """Write the given layers (numbers in the source, in this order) of `checkpoint` to the folder `out` and open it.

    KV scales come along. Raises CheckpointError for a layer that is not there or named twice, and PuzzleError when
    `out` exists.
    """
    source = Checkpoint.open(checkpoint)
    source.validate()
    a = source.architecture
    wrong = [layer for layer in layers if not 0 <= layer < a.num_layers]
    if not layers or wrong or len(set(layers)) != len(layers):
        raise CheckpointError(
            "not layers of this checkpoint",
            file=source.path,
            key="layers",
            found=",".join(map(str, layers)) or "none",
            expected=f"different numbers from 0 to {a.num_layers - 1}",
        )
    place = {layer: index for index, layer in enumerate(layers)}
    tensors = [planned for name in source.tensors if (planned := _planned(source, name, place)) is not None]
    config = a.with_blocks([a.blocks[layer] for layer in layers]).child_config(source.config)
    with atomic_folder(Path(out)) as folder:
        write_shards(folder, tensors)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        copy_companions(source.companion_files(), folder)
        Checkpoint.open(folder).validate()
    return Checkpoint.open(out)


def read_layers(text: str) -> list[int]:
    """`"0,5,20"` as numbers. Raises PuzzleError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise PuzzleError("not layer numbers", key="--layers", found=text, expected="such as 0,3,15,22")
    return [int(part) for part in parts]


def _planned(source: Checkpoint, name: str, place: dict[int, int]) -> PlannedTensor | None:
    found = _LAYER.match(name)
    if found is None:
        return copy_of(source.entry(name))
    layer = int(found[2])
    if layer not in place:
        return None
    return replace(copy_of(source.entry(name)), name=f"{found[1]}{place[layer]}{found[3]}")
