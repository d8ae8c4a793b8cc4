"""Reading a file that a user named or that stands in a folder, without waiting for somebody or reading for ever."""

from __future__ import annotations

import errno
import stat
from pathlib import Path

_SHELLS = (Path("/dev"), Path("/proc"))
"""Where a shell's `<(...)` and standard input are: pipes that have a writer."""


def read_plain(file: Path, *, named_pipes: bool = False) -> bytes:
    """The bytes of a file, or of a shell's pipe. Raises OSError, also for what `check_plain` refuses.

    named_pipes: read those too, for files that somebody may want to write while they are read.
    """
    is_awaited = named_pipes or any(folder in file.parents for folder in _SHELLS)
    if not (is_awaited and stat.S_ISFIFO(file.stat().st_mode)):
        check_plain(file)
    return file.read_bytes()


def check_plain(file: Path) -> None:
    """Raises OSError for a named pipe, which waits for a writer, and a device, which may have no end."""
    mode = file.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "a pipe or a device, not a file", str(file))
