"""A range of bytes of a file, and copying it at the speed of `cp`.

Checkpoints are copied, not interpreted, so the copy decides how long a derivation takes. Bytes go through one buffer
of 256 KiB that stays in the processor's cache: one of 16 MiB ran at a quarter of that speed, and the kernel's own
copies (copy_file_range, sendfile) were no faster on ext4 and refuse some pairs of file systems (docs/performance.md).
Files are never memory-mapped here: mapped pages would count as this process's memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

BUFFER_BYTES = 256 * 2**10


@dataclass(frozen=True, kw_only=True)
class FileRange:
    """`num_bytes` bytes of `file` from `offset` on."""

    file: Path
    offset: int
    num_bytes: int

    @property
    def nbytes(self) -> int:
        """As a numpy array calls it."""
        return self.num_bytes

    def tobytes(self) -> bytes:
        """The bytes themselves. Raises OSError when the file ends before them."""
        return b"".join(bytes(part) for part in self.read(BUFFER_BYTES))

    def read(self, buffer_bytes: int) -> Iterator[memoryview]:
        """The bytes in order; each view is valid until the next is asked for. Raises OSError on an early end."""
        buffer = memoryview(bytearray(min(buffer_bytes, max(self.num_bytes, 1))))
        with self.file.open("rb", buffering=0) as stream:
            if hasattr(os, "posix_fadvise"):  # not on macOS
                os.posix_fadvise(stream.fileno(), self.offset, self.num_bytes, os.POSIX_FADV_SEQUENTIAL)
            stream.seek(self.offset)
            left = self.num_bytes
            while left > 0:
                count = stream.readinto(buffer[: min(left, len(buffer))])
                if not count:
                    raise OSError(5, "the file ended early", str(self.file))
                yield buffer[:count]
                left -= count

    def pieces(self, piece_bytes: int) -> Iterator[FileRange]:
        """The same bytes as ranges of at most `piece_bytes`."""
        for start in range(0, self.num_bytes, piece_bytes):
            count = min(piece_bytes, self.num_bytes - start)
            yield FileRange(file=self.file, offset=self.offset + start, num_bytes=count)


def write_all(stream: FileIO, data: memoryview) -> None:
    """Write all of `data` to an unbuffered stream, which may take less at a time. Raises OSError."""
    while len(data) > 0:
        data = data[stream.write(data) :]
