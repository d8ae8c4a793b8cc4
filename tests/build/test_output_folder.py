"""What must fit on the disk: all bytes that are written, companions included."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from puzzle_trtllm import output_folder
from puzzle_trtllm.build.derive import derive
from puzzle_trtllm.errors import PuzzleError
from puzzle_trtllm.output_folder import check_disk_space, check_output_folder


def test_exactly_what_is_needed_is_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(
        output_folder.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(total=0, used=0, free=2**30)
    )
    enough = 2**30 - output_folder.HEADER_ALLOWANCE_BYTES
    check_disk_space(tmp_path / "child", num_bytes=enough)
    with pytest.raises(
        PuzzleError,
        match=r"not enough disk space .found 1\.00 GiB, 1,073,741,824 bytes, expected 1\.00 GiB, 1,073,741,825 bytes",
    ):
        check_disk_space(tmp_path / "child", num_bytes=enough + 1)


def test_a_mount_point_is_refused(tmp_path):
    with pytest.raises(PuzzleError, match="/proc: is a mount point"):
        check_output_folder(Path("/proc"), source=tmp_path, num_bytes=0)


def test_what_the_files_of_the_source_are_links_to_is_not_replaced(tmp_path):
    """As in the hub's cache: snapshots/COMMIT/config.json is a link into blobs/."""
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "123").touch()
    (snapshot / "config.json").symlink_to("../../blobs/123")
    for out in (blobs, tmp_path / "hub"):
        with pytest.raises(PuzzleError, match="would replace the checkpoint it is made from"):
            check_output_folder(out, source=snapshot, num_bytes=0)
    check_output_folder(blobs / "out", source=snapshot, num_bytes=0)


def test_a_link_to_itself_has_a_disk_too(tmp_path):
    (tmp_path / "out").symlink_to("out")
    check_output_folder(tmp_path / "out", source=tmp_path / "parent", num_bytes=0)


def test_derive_asks_for_its_shards_and_what_it_copies(
    make_checkpoint, write_architecture, write_importance, tmp_path, monkeypatch
):
    parent = make_checkpoint([(6, 16)])
    inputs = {"architecture": write_architecture([(4, 16)]), "importance": write_importance([[1, 2, 3, 4, 5, 6]])}
    asked: list[int] = []
    monkeypatch.setattr(
        "puzzle_trtllm.build.derive.check_disk_space", lambda out, *, num_bytes: asked.append(num_bytes)
    )
    derive(parent, tmp_path / "child", **inputs)
    shards = sum(f.stat().st_size - 8 - int.from_bytes(f.read_bytes()[:8], "little")
                 for f in (tmp_path / "child").glob("*.safetensors"))  # fmt: skip
    names = ("chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    assert asked == [shards + sum((parent / name).stat().st_size for name in names)]
