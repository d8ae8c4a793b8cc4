"""Folders that appear whole or not at all.

Every stage writes one folder. It is built in a hidden sibling on the same file system and renamed into place at the
end, so that a reader never sees half of it and a failure leaves nothing where a result is expected.

A process that is killed cannot clean up. Whoever builds a folder therefore holds a lock on the sibling (flock, which
the kernel releases with the process), and the next to write to the same place removes the siblings that nobody holds.
Process ids would not do: they are used again, and two containers that share a disk have the same ones.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from puzzle_trtllm.errors import PuzzleError

_FOLDER_ITSELF = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


@contextmanager
def atomic_folder(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `out` that becomes `out` if the block succeeds and vanishes if it fails.

    With `overwrite` an existing folder `out` is replaced at the very end; without it an existing non-empty `out` is a
    PuzzleError, raised before anything is written, or at the end if it came to be there meanwhile.
    """
    out = place_of(out)
    with claimed_sibling(out, suffix=f"partial-{os.getpid()}", overwrite=overwrite) as partial:
        clear_folder(partial)
        yield partial
        replace_folder(partial, out, overwrite=overwrite)


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Make `folder` if need be, and lock it against others who call this: for commands that write many things into it.

    Raises PuzzleError when another process holds the lock, or when there can be no such folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise PuzzleError(f"cannot write here: {error.strerror}", file=folder) from None
    try:
        if _lock(descriptor) == "held by another":
            raise PuzzleError("another process is writing this folder", file=folder)
        yield
    finally:
        os.close(descriptor)


def place_of(out: Path) -> Path:
    """Where `out` really lies: what a symbolic link points to is written, not the link.

    Raises PuzzleError for a mount point: nothing can be renamed to it, which would show only at the very end.
    """
    place = Path(os.path.realpath(out))
    if os.path.ismount(place):
        expected = f"a folder in it, such as {Path(out) / 'out'}"
        raise PuzzleError("is a mount point, which cannot be replaced", file=out, expected=expected)
    return place


def check_not_source(out: Path, *, source: Path, others: Iterable[str | Path | None] = ()) -> None:
    """Raise PuzzleError if writing `out` would replace `source`, a folder that its files are links into, or one that
    holds either; or a mount point.

    others: what else it is made from, files or folders; a name of something that is no path is none of them.
    """
    place = place_of(out)
    read = {Path(os.path.realpath(source)), *(Path(os.path.realpath(file)).parent for file in source.glob("*"))}
    if any(folder.is_relative_to(place) for folder in read):
        raise PuzzleError("the output folder would replace the checkpoint it is made from", file=out)
    for other in others:
        if other is not None and Path(other).exists() and place in Path(other).resolve().parents:
            raise PuzzleError("the output folder would replace a file it is made from", file=out, found=other)


@contextmanager
def claimed_sibling(out: Path, *, suffix: str, overwrite: bool) -> Iterator[Path]:
    """Yield the folder `.{out.name}.{suffix}` beside `out`, locked, with what a killed process left in it.

    It is removed at the end, whatever happens. OSErrors of the block become one line. Raises PuzzleError when `out` is
    in the way, when nothing can be written beside it, or when another process holds the folder.
    """
    sibling = out.with_name(f".{out.name}.{suffix}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(out, but=sibling)
        check_vacant(out, overwrite=overwrite)
        lock = _make_and_lock(sibling)
    except OSError as error:
        raise PuzzleError(f"cannot write here: {error.strerror}", file=out.parent) from None
    try:
        yield sibling
    except OSError as error:
        file = error.filename2 or error.filename or out  # of a copy the second one is the one written
        raise PuzzleError(f"writing failed: {error.strerror or error}", file=file) from error
    finally:
        shutil.rmtree(sibling, ignore_errors=True)
        os.close(lock)


def check_vacant(out: Path, *, overwrite: bool) -> None:
    """Raise PuzzleError if `out` is no folder, or is one with something in it that may not be overwritten."""
    if os.path.lexists(out) and not out.is_dir():
        raise PuzzleError("exists and is not a folder", file=out)
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise PuzzleError("the output folder exists and is not empty (--overwrite replaces it)", file=out)


def clear_folder(folder: Path, *, keep: str | None = None) -> None:
    """Remove everything in `folder` but the files whose names match the pattern `keep`. Raises OSError."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif keep is None or not entry.match(keep):
            entry.unlink()


def replace_folder(folder: Path, out: Path, *, overwrite: bool) -> None:
    """Rename `folder` to `out`, removing with `overwrite` an `out` that is there.

    Raises PuzzleError when something that may not be overwritten came to be there since the start, or OSError; then
    `out` is as it was.
    """
    try:
        check_vacant(out, overwrite=overwrite)
    except PuzzleError as error:
        raise PuzzleError(f"{error}: it came meanwhile, so what was made for this place is removed") from None
    old = out.with_name(f".{out.name}.old-{os.getpid()}")
    if overwrite and out.exists():
        out.rename(old)
    try:
        folder.rename(out)  # refused by the kernel where another writer was faster than the check
    except OSError:
        if old.exists() and not out.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _make_and_lock(folder: Path) -> int:
    """Make `folder` if need be and lock it; the lock lives as long as the descriptor that is returned."""
    for _ in range(100):
        folder.mkdir(exist_ok=True)
        try:
            descriptor = os.open(folder, _FOLDER_ITSELF)
        except FileNotFoundError:
            continue  # its last owner has just removed it
        except NotADirectoryError:
            raise _of_another(folder, "a link") from None
        if os.fstat(descriptor).st_uid != _own_id(folder.parent):
            os.close(descriptor)
            raise _of_another(folder, "another user's folder")
        if _lock(descriptor) == "held by another":
            os.close(descriptor)
            raise PuzzleError("another process is writing this folder", file=folder)
        if folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat()):
            return descriptor
        os.close(descriptor)
    raise PuzzleError("cannot be locked: other processes keep removing it", file=folder)


def _own_id(folder: Path) -> int:
    """Who owns what we make in `folder`: on a network disk that may be somebody else than we are here."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_uid


def _of_another(folder: Path, found: str) -> PuzzleError:
    """It would be emptied, or what is written there changed: in a shared place its name can be foreseen."""
    return PuzzleError("is in the way", file=folder, found=found, expected="a name that nobody has taken")


def _lock(descriptor: int) -> Literal["locked", "held by another", "unsupported"]:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "held by another"
    except OSError:
        return "unsupported"  # some network disks: write unlocked, and remove nobody's leftovers
    return "locked"


def _remove_leftovers(out: Path, *, but: Path) -> None:
    """Remove what killed processes left beside `out`; a folder that one was just replacing gets its name back."""
    own = re.compile(rf"\.{re.escape(out.name)}\.(partial|old)-[^.]+")
    siblings = [entry for entry in out.parent.iterdir() if entry != but and own.fullmatch(entry.name)]
    partials = [entry for entry in siblings if ".partial-" in entry.name[len(out.name) :]]
    alive = [entry for entry in partials if not _remove_unless_locked(entry)]
    for old in (entry for entry in siblings if entry not in partials and not alive):
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(out)


def _remove_unless_locked(folder: Path) -> bool:
    """True when it is gone."""
    try:
        descriptor = os.open(folder, _FOLDER_ITSELF)
    except OSError:
        return not folder.exists()
    if _lock(descriptor) == "locked":
        shutil.rmtree(folder, ignore_errors=True)
    os.close(descriptor)
    return not folder.exists()


def check_writable(path: str | Path) -> None:
    """Raises PuzzleError when `path` could not be written; creates nothing. To be asked before hours of work."""
    file = Path(path).absolute()
    try:
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        nearest = next(folder for folder in file.parents if folder.exists())
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise PuzzleError(f"cannot be written: {error.strerror}", file=path) from None


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a single file through a temporary sibling and a rename."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)  # a killed process's, or in a shared place a link of another user's
        with partial.open("xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
        partial.rename(path)
    except OSError as error:
        raise PuzzleError(f"cannot be written: {error.strerror}", file=path) from None
    finally:
        with suppress(OSError):  # also where its folder is none
            partial.unlink()


def link_or_copy(source: Path, target: Path) -> None:
    """Give `target` the bytes of `source` without copying where the file system allows it (hard link)."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)
