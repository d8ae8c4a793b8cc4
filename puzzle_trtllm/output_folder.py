"""Is this a place to write to? Asked before the first byte, because a 47 GB copy should not fail at its end.

An existing output folder is replaced when overwriting is allowed, so it must not be the source, nor hold it: that would
delete what is being read.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from puzzle_trtllm.errors import PuzzleError
from puzzle_trtllm.folders import check_not_source

HEADER_ALLOWANCE_BYTES = 16 * 2**20
"""For shard headers, the index, config.json and our own records."""


def check_output_folder(out: Path, *, source: Path, num_bytes: int, others: Iterable[str | Path | None] = ()) -> None:
    """Raise PuzzleError if `out` would replace what it is made from, or if `num_bytes` and a little more do not fit on
    its disk."""
    check_not_source(out, source=source, others=others)
    check_disk_space(out, num_bytes=num_bytes)


def check_disk_space(out: Path, *, num_bytes: int) -> None:
    """Raise PuzzleError if `num_bytes` and a little more do not fit on the disk of `out`, which need not exist."""
    free = shutil.disk_usage(nearest_folder(out)).free
    needed = num_bytes + HEADER_ALLOWANCE_BYTES
    if free < needed:
        raise PuzzleError("not enough disk space", file=out, found=_gib(free), expected=_gib(needed))


def nearest_folder(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there."""
    folder = Path(os.path.realpath(path))
    while not folder.is_dir():
        folder = folder.parent
    return folder


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB, {num_bytes:,} bytes"
