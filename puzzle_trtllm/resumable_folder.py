"""A folder whose writing can be interrupted by anything and taken up again.

Like `atomic_folder` it appears whole or not at all. But what a killed process has finished is kept, beside a manifest
that says what was being written. The next writer of the same place goes on from there if its own manifest says exactly
the same, and starts over if a single key differs: half of one child must never be completed with half of another.

    .NAME.partial-resumable/job.json      the manifest
    .NAME.partial-resumable/folder/       becomes NAME

A failure that the process lives to see (a full disk, Ctrl-C) removes all of it, as everywhere else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from puzzle_trtllm.folders import (
    check_vacant,
    claimed_sibling,
    clear_folder,
    place_of,
    replace_folder,
    write_atomically,
)

_SUFFIX = "partial-resumable"


@contextmanager
def resumable_folder(out: Path, *, job: Mapping[str, Any], keep: str, overwrite: bool = False) -> Iterator[Path]:
    """Yield a folder that becomes `out`: empty, or with the finished files of a killed process that had the same job.

    Args:
        job: what is being written, JSON values; everything that the bytes depend on.
        keep: name pattern of the files that have this name only once they are finished; all others are removed.

    Raises PuzzleError as `atomic_folder` does.
    """
    out = place_of(out)
    with claimed_sibling(out, suffix=_SUFFIX, overwrite=overwrite) as workplace:
        folder = workplace / "folder"
        if _is_same_job(workplace, job):
            clear_folder(folder, keep=keep)
        else:
            clear_folder(workplace)
            folder.mkdir()
            write_atomically(workplace / "job.json", _canonical(job))
        yield folder
        replace_folder(folder, out, overwrite=overwrite)


def finished_bytes(out: Path, *, job: Mapping[str, Any], keep: str, overwrite: bool = False) -> int:
    """Bytes on disk that `resumable_folder` with these arguments would keep. Raises PuzzleError if `out` is in use."""
    out = place_of(out)
    check_vacant(out, overwrite=overwrite)
    workplace = out.with_name(f".{out.name}.{_SUFFIX}")
    if not _is_same_job(workplace, job):
        return 0
    return sum(file.stat().st_size for file in (workplace / "folder").glob(keep))


def _is_same_job(workplace: Path, job: Mapping[str, Any]) -> bool:
    try:
        return (workplace / "folder").is_dir() and (workplace / "job.json").read_text(encoding="utf-8") == _canonical(
            job
        )
    except (OSError, ValueError):
        return False


def _canonical(job: Mapping[str, Any]) -> str:
    return json.dumps(job, sort_keys=True, separators=(",", ":"))
