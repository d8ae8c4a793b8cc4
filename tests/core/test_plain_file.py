"""A pipe or a device where a file is expected is refused at once; what a shell pipes in is read."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.errors import PuzzleError
from puzzle_trtllm.json_files import read_json_object
from puzzle_trtllm.safetensors_file import read_header
from puzzle_trtllm.serve.acceptance.recording import Recording
from puzzle_trtllm.serve.client.secret import read_secret
from puzzle_trtllm.serve.client.tls import ClientTls
from puzzle_trtllm.serve.evaluate.problems import load_problems
from puzzle_trtllm.trace import read_trace
from puzzle_trtllm.yaml_files import read_mapping

READERS: dict[str, Callable[[Path], object]] = {
    "JSON": lambda file: read_json_object(file, PuzzleError),
    "YAML": read_mapping,
    "problems": load_problems,
    "shard": read_header,
    "recording": Recording.load,
    "secret": read_secret,
    "certificate": lambda file: ClientTls(ca_cert=file).credentials(),
}
WORDS = "cannot be read: a pipe or a device, not a file"


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[Path]:
    """A named pipe that an empty text waits in: who reads it gets that, and does not hang."""
    file = tmp_path / "pipe"
    os.mkfifo(file)
    writer = threading.Thread(target=lambda: file.write_bytes(b""), daemon=True)
    writer.start()
    yield file
    while writer.is_alive():  # nobody has read: it still waits, or comes to wait only now
        os.close(os.open(file, os.O_RDONLY | os.O_NONBLOCK))
        writer.join(0.05)


@pytest.mark.parametrize("kind", READERS)
def test_neither_a_named_pipe_nor_a_device_is_read(pipe: Path, kind: str) -> None:
    for file in (pipe, Path("/dev/null")):
        with pytest.raises(PuzzleError, match=f"{file}: {WORDS}"):
            READERS[kind](file)


def test_a_trace_may_be_a_named_pipe_and_no_device() -> None:
    with pytest.raises(PuzzleError, match=f"/dev/null: {WORDS}"):
        read_trace("/dev/null")


def test_what_a_shell_pipes_in_is_read() -> None:
    """`--architecture <(jq ...)`: bash calls it /dev/fd/63."""
    reading, writing = os.pipe()
    os.write(writing, b'{"a": 1}')
    os.close(writing)
    assert read_json_object(Path(f"/dev/fd/{reading}"), PuzzleError) == {"a": 1}
    os.close(reading)


def test_a_pipe_in_a_checkpoint_is_not_a_file_that_the_model_lacks(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint([(4, None)])
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")
    with pytest.raises(PuzzleError, match=r"tokenizer\.json: is a pipe or a device, not a file"):
        Checkpoint.open(folder)
