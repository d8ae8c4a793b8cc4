"""Reading a file that a user named or that stands in a folder, without waiting for somebody or reading for ever."""

from __future__ import annotations

import errno
import stat
from pathlib import Path

from puzzle_trtllm.errors import PuzzleError

_SHELLS = (Path("/dev"), Path("/proc"))
"""Where a shell's `<(...)` and standard input are: pipes that have a writer."""


def read_text(file: Path, kind: type[PuzzleError], *, encoding: str = "utf-8") -> str:
    """The text of a file. Raises an error of this kind, as `read_bytes` does, also for what is no UTF-8."""
    try:
        return read_bytes(file, kind).decode(encoding)
    except UnicodeDecodeError:
        raise kind("not UTF-8 text", file=file) from None


def read_bytes(file: Path, kind: type[PuzzleError], *, named_pipes: bool = False) -> bytes:
    """The bytes of a file, or of a shell's pipe. Raises an error of this kind, also for what `check_plain` refuses.

    named_pipes: read those too, for files that somebody may want to write while they are read.
    """
    is_awaited = named_pipes or any(folder in file.parents for folder in _SHELLS)
    try:
        if not (is_awaited and stat.S_ISFIFO(file.stat().st_mode)):
            check_plain(file)
        return file.read_bytes()
    except OSError as error:
        raise kind(f"cannot be read: {error.strerror}", file=file) from None


def check_plain(file: Path) -> None:
    """Raises OSError for a named pipe, which waits for a writer, and a device, which may have no end."""
    mode = file.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "a pipe or a device, not a file", str(file))
