"""Is this a place to write to? Asked before the first byte, because a 47 GB copy should not fail at its end.

An existing output folder is replaced when overwriting is allowed, so it must not be the source, nor hold it: that would
delete what is being read.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from puzzle_trtllm.errors import PuzzleError

HEADER_ALLOWANCE_BYTES = 16 * 2**20
"""For shard headers, the index, config and tokenizer files."""


def check_output_folder(out: Path, *, source: Path, num_bytes: int) -> None:
    """Raise PuzzleError if `out` would replace `source`, or if `num_bytes` and a little more do not fit on its disk."""
    resolved = out.resolve()
    if resolved == source.resolve() or resolved in source.resolve().parents:
        raise PuzzleError("the output folder would replace the checkpoint it is made from", file=out)
    folder = resolved
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    needed = num_bytes + HEADER_ALLOWANCE_BYTES
    if free < needed:
        raise PuzzleError("not enough disk space", file=out, found=_gib(free), expected=_gib(needed))


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
