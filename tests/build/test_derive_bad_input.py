"""Whatever is wrong with what `derive` reads or where it writes: one clear line, and nothing left behind."""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from puzzle_trtllm.build.derive import derive
from puzzle_trtllm.checkpoint import INDEX_NAME, Checkpoint
from puzzle_trtllm.checkpoint_writer import rewrite_checkpoint, tensor_of
from puzzle_trtllm.errors import PuzzleError
from tests.front_door.cli import assert_user_error, invoke, run

PARENT_BLOCKS = [(6, 16), (6, None)]
SCORES = [[5, 1, 3, 9, 2, 7], [1, 2, 3, 4, 5, 6]]
ROUTER = "model.layers.1.mlp.router.weight"


@pytest.fixture
def parent(make_checkpoint) -> Path:
    return make_checkpoint(PARENT_BLOCKS)


@pytest.fixture
def options(write_architecture, write_importance) -> list[str]:
    architecture = write_architecture([(4, 16), (6, 40)])
    return [f"--architecture={architecture}", f"--importance={write_importance(SCORES)}"]


@pytest.fixture
def out(tmp_path) -> Path:
    (tmp_path / "results").mkdir()
    return tmp_path / "results" / "child"


def refused(parent: Path, out: Path, options: list[str], *words: str) -> None:
    """The real command, in this process: exit code 2, one line with `words`, nothing written, the parent untouched."""
    before = {file: file.read_bytes() for file in parent.iterdir()}
    assert_user_error(invoke("derive", parent, out, *options), *words)
    assert list(out.parent.iterdir()) == []
    assert {file: file.read_bytes() for file in parent.iterdir()} == before


# -- a damaged parent ----------------------------------------------------------------------------------------------


def last_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[-1]


def edit_header(shard: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the header of a shard and leave its data alone."""
    data = shard.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    raw = json.dumps(header).encode()
    shard.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])


def shift(by: int, *, which: int) -> Callable[[dict[str, Any]], None]:
    """Move the byte range of the tensor at place `which` in the file."""

    def change(header: dict[str, Any]) -> None:
        names = sorted(set(header) - {"__metadata__"}, key=lambda name: header[name]["data_offsets"])
        header[names[which]]["data_offsets"] = [offset + by for offset in header[names[which]]["data_offsets"]]

    return change


def test_a_corrupt_header(parent, out, options):
    data = bytearray(last_shard(parent).read_bytes())
    data[9:12] = b"\xff\x00{"
    last_shard(parent).write_bytes(data)
    refused(parent, out, options, last_shard(parent).name, "corrupt header")


def test_a_header_longer_than_its_file(parent, out, options):
    data = last_shard(parent).read_bytes()
    last_shard(parent).write_bytes(struct.pack("<Q", 2**40) + data[8:])
    refused(parent, out, options, last_shard(parent).name, "the header runs past the file")


def test_overlapping_offsets(parent, out, options):
    edit_header(last_shard(parent), shift(-1, which=1))
    refused(parent, out, options, last_shard(parent).name, "overlaps the tensor before it")


def test_offsets_out_of_range(parent, out, options):
    edit_header(last_shard(parent), shift(2**40, which=-1))
    refused(parent, out, options, last_shard(parent).name, "a hole in the file")


def test_a_truncated_last_shard(parent, out, options):
    last_shard(parent).write_bytes(last_shard(parent).read_bytes()[:-1])
    refused(parent, out, options, last_shard(parent).name, "truncated")


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ("model-00009-of-00009.safetensors", "missing shard"),
        ("../outside.safetensors", "names a file outside the folder"),
        ("/etc/passwd", "names a file outside the folder"),
    ],
)
def test_an_index_that_names_a_file_that_is_not_there_or_not_ours(parent, out, options, shard, message):
    (parent.parent / "outside.safetensors").write_bytes(last_shard(parent).read_bytes())
    index = json.loads((parent / INDEX_NAME).read_text())
    index["weight_map"][ROUTER] = shard
    (parent / INDEX_NAME).write_text(json.dumps(index))
    refused(parent, out, options, ROUTER, message)


def test_the_same_tensor_in_two_files(parent, out, options):
    (parent / "stale.safetensors").write_bytes(last_shard(parent).read_bytes())
    refused(parent, out, options, "stale.safetensors", "the same tensor is in two files")


def test_the_same_tensor_twice_in_a_header(parent, out, options):
    data = last_shard(parent).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length].rstrip()
    name = next(name for name in json.loads(header) if name != "__metadata__")
    entry = json.dumps(json.loads(header)[name])
    twice = header[:-1] + f", {json.dumps(name)}: {entry}}}".encode()
    last_shard(parent).write_bytes(struct.pack("<Q", len(twice)) + twice + data[8 + length :])
    refused(parent, out, options, last_shard(parent).name, name, "occurs twice")


def with_router(parent: Path, dtype: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Replace one router weight of the folder."""
    source, changed = Checkpoint.open(parent), parent.with_name("changed")
    changed.mkdir()
    values = change(np.array(source.numpy(ROUTER)))
    rewrite_checkpoint(source, changed, config=source.config, replace={ROUTER: tensor_of(ROUTER, dtype, values)})
    for file in parent.iterdir():
        file.unlink()
    parent.rmdir()
    changed.rename(parent)


def test_a_tensor_of_the_wrong_dtype(parent, out, options):
    with_router(parent, "F32", lambda bits: (bits.astype(np.uint32) << 16).view(np.float32))
    refused(parent, out, options, ROUTER, "wrong dtype or shape (found F32 [6, 64], expected BF16 [6, 64])")


@pytest.mark.parametrize("bits", [0x7FC0, 0xFF81, 0x7F80])
def test_nan_or_infinity_in_a_router(parent, out, options, bits):
    def poison(values: np.ndarray) -> np.ndarray:
        values[3, 5] = bits
        return values

    with_router(parent, "BF16", poison)
    refused(parent, out, options, ROUTER, "NaN or infinity in a router")


# -- the other inputs ----------------------------------------------------------------------------------------------


def test_importance_of_another_expert_count(parent, out, options, write_importance):
    write_importance([SCORES[0], SCORES[1] + [7]])  # over the good one
    refused(parent, out, options, "layers.1.mlp.experts.importance", "found F32 [7], expected F32 [6]")


def test_an_architecture_that_is_not_json(parent, out, options, tmp_path):
    (tmp_path / "child_architecture.json").write_text("{")
    refused(parent, out, options, "child_architecture.json", "not valid JSON")


# -- the target ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A real file system of 64 KiB; skipped where we may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", "size=64k", "none", str(folder)]
    if subprocess.run(["mount", *options], check=False, capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_too_small_is_noticed_before_the_first_byte(parent, small_disk, options):
    refused(parent, small_disk / "child", options, "not enough disk space", "found 0.00 GiB")


def test_a_disk_that_is_filled_in_the_middle(parent, small_disk, write_architecture, write_importance, monkeypatch):
    monkeypatch.setattr("puzzle_trtllm.build.derive.check_disk_space", lambda *a, **k: None)  # enough, when it asked
    inputs = {"architecture": write_architecture([(6, 16), (6, 40)]), "importance": write_importance(SCORES)}
    assert Checkpoint.open(parent).weight_bytes > os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize
    with pytest.raises(PuzzleError, match="writing failed: No space left on device") as caught:
        derive(parent, small_disk / "child", **inputs)
    assert "\n" not in str(caught.value)
    assert list(small_disk.iterdir()) == [], "what was written must not keep the disk full"


def test_a_limit_on_file_sizes(parent, out, options):
    """As a full disk, without the right to mount one: the shell's `ulimit -f`."""
    limit = Checkpoint.open(parent).weight_bytes // 4
    done = run(
        "derive", parent, out, *options, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    assert_user_error(done, "writing failed: File too large")
    assert list(out.parent.iterdir()) == []


def test_a_read_only_disk(parent, small_disk, options):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    refused(parent, small_disk / "child", options, str(small_disk), "cannot write here: Read-only file system")


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(parent, out, options):
    out.parent.chmod(0o500)
    refused(parent, out, options, str(out.parent), "cannot write here: Permission denied")


def test_a_file_where_the_folder_should_be(parent, out, options):
    out.write_text("mine")
    result = invoke("derive", parent, out, *options)
    assert_user_error(result, str(out), "exists and is not a folder")
    assert out.read_text() == "mine"
