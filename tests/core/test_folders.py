"""Output folders appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from puzzle_trtllm.errors import PuzzleError
from puzzle_trtllm.folders import atomic_folder, link_or_copy, write_atomically


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_result_appears_only_at_the_end(tmp_path):
    with atomic_folder(tmp_path / "deep" / "out") as partial:
        (partial / "file").write_text("content")
        assert not (tmp_path / "deep" / "out").exists()
        assert partial.parent == tmp_path / "deep", "the rename must stay on one file system"
    assert names(tmp_path / "deep") == ["out"]
    assert (tmp_path / "deep" / "out" / "file").read_text() == "content"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_nothing(tmp_path, error):
    with pytest.raises(error), atomic_folder(tmp_path / "out") as partial:
        (partial / "half").write_text("")
        raise error
    assert names(tmp_path) == []


def test_a_failure_keeps_what_was_there(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "out", overwrite=True) as partial:
        (partial / "new").write_text("new")
        raise RuntimeError
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["old"]


def test_overwrite_replaces_everything(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with atomic_folder(tmp_path / "out", overwrite=True) as partial:
        (partial / "new").write_text("new")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["new"]


def test_an_existing_folder_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with pytest.raises(PuzzleError, match=r"exists and is not empty"), atomic_folder(tmp_path / "out"):
        pytest.fail("the block must not run")
    assert names(tmp_path) == ["out"]


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out") as partial:
        (partial / "file").write_text("")
    assert names(tmp_path / "out") == ["file"]


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(PuzzleError, match="is not a folder"), atomic_folder(tmp_path / "out"):
        pytest.fail("the block must not run")


def test_no_room_to_write_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PuzzleError, match="cannot write here") as caught, atomic_folder(tmp_path / "file" / "out"):
        pytest.fail("the block must not run")
    assert "\n" not in str(caught.value)


def test_a_full_disk_in_the_middle_is_one_line(tmp_path):
    with pytest.raises(PuzzleError, match="No space left on device"), atomic_folder(tmp_path / "out") as partial:
        (partial / "half").write_text("")
        raise OSError(28, os.strerror(28), str(partial / "half"))
    assert names(tmp_path) == []


def test_a_single_file_is_replaced_in_one_step(tmp_path):
    write_atomically(tmp_path / "sub" / "file", "one")
    write_atomically(tmp_path / "sub" / "file", b"two")
    assert (tmp_path / "sub" / "file").read_text() == "two"
    assert names(tmp_path / "sub") == ["file"]


def test_links_share_the_bytes_even_through_a_symlink(tmp_path):
    (tmp_path / "blob").write_text("bytes")
    (tmp_path / "link").symlink_to("blob")  # as in the hub's cache
    link_or_copy(tmp_path / "link", tmp_path / "copy")
    assert (tmp_path / "copy").stat().st_ino == (tmp_path / "blob").stat().st_ino
    assert not (tmp_path / "copy").is_symlink()
