"""Room on the disk, asked for before the first byte: a 47 GB copy should not fail at its end."""

from __future__ import annotations

import shutil
from pathlib import Path

from puzzle_trtllm.errors import PuzzleError

HEADER_ALLOWANCE_BYTES = 16 * 2**20
"""For shard headers, the index, config and tokenizer files."""


def require_free_bytes(out: Path, num_bytes: int) -> None:
    """Raise PuzzleError unless `num_bytes` (and a little more) fit on the file system that will hold `out`."""
    folder = Path(out).absolute()
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    needed = num_bytes + HEADER_ALLOWANCE_BYTES
    if free < needed:
        raise PuzzleError("not enough disk space", file=out, found=_gib(free), expected=_gib(needed))


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
