"""Ranges of files: the right bytes in any pieces, and an early end is an error, not a short copy."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puzzle_trtllm.file_range import FileRange, write_all

DATA = bytes(range(251)) * 8


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("range") / "file"
    path.write_bytes(DATA)
    return path


@given(st.integers(0, len(DATA)), st.integers(0, len(DATA)), st.integers(1, 600), st.integers(1, 600))
def test_any_pieces_and_any_buffer_give_the_same_bytes(file, start, num_bytes, piece_bytes, buffer_bytes):
    num_bytes = min(num_bytes, len(DATA) - start)
    whole = FileRange(file=file, offset=start, num_bytes=num_bytes)
    expected = DATA[start : start + num_bytes]
    assert whole.tobytes() == expected
    pieces = list(whole.pieces(piece_bytes))
    assert all(0 < piece.nbytes <= piece_bytes for piece in pieces)
    assert b"".join(bytes(part) for piece in pieces for part in piece.read(buffer_bytes)) == expected


def test_an_early_end_is_an_error(file):
    with pytest.raises(OSError, match="the file ended early"):
        FileRange(file=file, offset=len(DATA) - 3, num_bytes=4).tobytes()


def test_a_stream_that_takes_little_at_a_time_gets_all():
    class Reluctant(io.BytesIO):
        def write(self, data: memoryview) -> int:
            return super().write(bytes(data[:7]))

    stream = Reluctant()
    write_all(stream, memoryview(DATA))
    assert stream.getvalue() == DATA
