"""Folders that appear whole or not at all.

Every stage writes one folder. It is built in a hidden sibling on the same file system and renamed into place at the
end, so that a reader never sees half of it and a failure leaves nothing where a result is expected.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from puzzle_trtllm.errors import PuzzleError


@contextmanager
def atomic_folder(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `out` that becomes `out` if the block succeeds and vanishes if it fails.

    With `overwrite` an existing folder `out` is replaced at the very end; without it an existing non-empty `out` is a
    PuzzleError, raised before anything is written.
    """
    out = Path(out).absolute()
    if out.exists() and not out.is_dir():
        raise PuzzleError("exists and is not a folder", file=out)
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise PuzzleError("the output folder exists and is not empty (--overwrite replaces it)", file=out)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    except OSError as error:
        raise PuzzleError(f"cannot write here: {error.strerror}", file=out.parent) from None
    try:
        yield partial
        _replace(partial, out)
    except OSError as error:
        raise PuzzleError(f"writing failed: {error.strerror or error}", file=error.filename or out) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace(partial: Path, out: Path) -> None:
    old = out.with_name(f".{out.name}.old-{os.getpid()}")
    if out.exists():
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a single file through a temporary sibling and a rename."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data.encode() if isinstance(data, str) else data)
        partial.rename(path)
    except OSError as error:
        raise PuzzleError(f"cannot be written: {error.strerror}", file=path) from None
    finally:
        partial.unlink(missing_ok=True)


def link_or_copy(source: Path, target: Path) -> None:
    """Give `target` the bytes of `source` without copying where the file system allows it (hard link)."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)
