"""Output folders appear whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import signal
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from puzzle_trtllm.errors import PuzzleError
from puzzle_trtllm.folders import atomic_folder, link_or_copy, locked_folder, write_atomically
from puzzle_trtllm.resumable_folder import finished_bytes, resumable_folder


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def resumable(out: Path, *, overwrite: bool = False) -> AbstractContextManager[Path]:
    return resumable_folder(out, job={}, keep="*", overwrite=overwrite)


both_kinds = pytest.mark.parametrize("kind", [atomic_folder, resumable])


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


def write_and_be_killed(out: Path, *, overwrite: bool = False, at_rename: bool = False) -> None:
    """In a forked process that dies by SIGKILL inside the block, or between the two renames of an overwrite."""
    process = os.fork()
    if process == 0:
        with atomic_folder(out, overwrite=overwrite) as partial:
            (partial / "half").write_text("")
            if not at_rename:
                os.kill(os.getpid(), signal.SIGKILL)
            Path.rename = _rename_once_then_die  # type: ignore[method-assign]
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL


def _rename_once_then_die(source: Path, target: Path) -> None:
    os.rename(source, target)  # noqa: PTH104 (Path.rename is what is replaced)
    os.kill(os.getpid(), signal.SIGKILL)


@both_kinds
class TestAPlaceThatFillsMeanwhile:
    def test_another_writers_result_is_kept(self, tmp_path, kind):
        with (
            pytest.raises(PuzzleError, match=r"out: .*not empty.*: it came meanwhile.*removed"),
            kind(tmp_path / "out"),
        ):
            with atomic_folder(tmp_path / "other") as other:
                (other / "precious").write_text("")
            (tmp_path / "other").rename(tmp_path / "out")
        assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["precious"]

    def test_a_file_is_kept_even_with_overwrite(self, tmp_path, kind):
        with (
            pytest.raises(PuzzleError, match="is not a folder: it came meanwhile"),
            kind(tmp_path / "out", overwrite=True),
        ):
            (tmp_path / "out").write_text("precious")
        assert names(tmp_path) == ["out"] and (tmp_path / "out").read_text() == "precious"

    def test_a_rename_that_fails_leaves_what_was_there(self, tmp_path, kind, monkeypatch):
        def rename(source: Path, target: Path) -> None:
            if target.name == "out" and ".old-" not in source.name:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            os.rename(source, target)  # noqa: PTH104 (Path.rename is what is replaced)

        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "old").write_text("")
        with pytest.raises(PuzzleError, match="writing failed"), kind(tmp_path / "out", overwrite=True):
            monkeypatch.setattr(Path, "rename", rename)
        assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["old"]


def test_a_copy_that_fails_names_what_could_not_be_written(tmp_path):
    failure = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "what is read", None, "what is written")
    with (
        pytest.raises(PuzzleError, match=r"^what is written: writing failed: No space left on device$"),
        atomic_folder(tmp_path / "out"),
    ):
        raise failure  # as `shutil.copyfile` does


@both_kinds
class TestALinkOrMountPoint:
    def test_a_link_is_followed_and_stays(self, tmp_path, kind):
        (tmp_path / "disk" / "data").mkdir(parents=True)
        (tmp_path / "disk" / "data" / "old").write_text("")
        (tmp_path / "out").symlink_to("disk/data")
        with kind(tmp_path / "out", overwrite=True) as folder:
            (folder / "new").write_text("")
        assert (tmp_path / "out").is_symlink()
        assert names(tmp_path) == ["disk", "out"] and names(tmp_path / "disk" / "data") == ["new"]

    def test_a_link_may_point_to_what_is_not_there_yet(self, tmp_path, kind):
        (tmp_path / "out").symlink_to("disk/data")
        with kind(tmp_path / "out") as folder:
            (folder / "new").write_text("")
        assert names(tmp_path / "disk" / "data") == ["new"]

    def test_a_link_to_itself_is_refused_at_once(self, tmp_path, kind):
        (tmp_path / "out").symlink_to("out")
        with pytest.raises(PuzzleError, match="is not a folder"), kind(tmp_path / "out"):
            pytest.fail("the block must not run")

    def test_a_mount_point_is_refused_at_once(self, kind):
        message = r"^/proc: is a mount point, which cannot be replaced .expected a folder in it, such as /proc/out"
        with pytest.raises(PuzzleError, match=message), kind(Path("/proc"), overwrite=True):
            pytest.fail("the block must not run")


def test_a_mount_point_is_refused_when_asked_what_is_finished():
    with pytest.raises(PuzzleError, match="is a mount point"):
        finished_bytes(Path("/proc"), job={}, keep="*", overwrite=True)


class TestAfterAKill:
    def test_the_next_writer_removes_what_is_left(self, tmp_path):
        write_and_be_killed(tmp_path / "out")
        (left,) = names(tmp_path)
        assert left.startswith(".out.partial-")
        with atomic_folder(tmp_path / "out") as partial:
            assert names(partial) == []
        assert names(tmp_path) == ["out"]

    def test_a_living_writers_folder_is_left_alone(self, tmp_path):
        with atomic_folder(tmp_path / "out") as partial:
            (partial / "half").write_text("")
            process = os.fork()
            if process == 0:
                with atomic_folder(tmp_path / "out"):
                    pass
                os._exit(0)
            os.waitpid(process, 0)
            assert names(partial) == ["half"]

    def test_neighbours_are_none_of_our_business(self, tmp_path):
        for name in (".other.partial-1", ".out.partial-1.txt", ".out.2.partial-1"):
            (tmp_path / name).mkdir()
        with atomic_folder(tmp_path / "out"):
            pass
        assert names(tmp_path) == [".other.partial-1", ".out.2.partial-1", ".out.partial-1.txt", "out"]

    def test_a_folder_that_was_just_being_replaced_comes_back(self, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "old").write_text("old")
        write_and_be_killed(tmp_path / "out", overwrite=True, at_rename=True)
        assert not (tmp_path / "out").exists()
        with pytest.raises(PuzzleError, match="exists and is not empty"), atomic_folder(tmp_path / "out"):
            pytest.fail("the block must not run")
        assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["old"]


SUFFIXES = {atomic_folder: f"partial-{os.getpid()}", resumable: "partial-resumable"}


@both_kinds
class TestAnotherUserInASharedPlace:
    """The names beside an output folder can be foreseen."""

    def test_what_a_planted_link_points_to_is_not_emptied(self, tmp_path, kind):
        ours = tmp_path / "home" / "thesis"
        ours.parent.mkdir()
        ours.touch()
        link = tmp_path / f".out.{SUFFIXES[kind]}"
        link.symlink_to(ours.parent)
        with (
            pytest.raises(PuzzleError, match=rf"{re.escape(link.name)}: is in the way .found a link"),
            kind(tmp_path / "out"),
        ):
            pass
        assert ours.exists() and not (tmp_path / "out").exists()

    @pytest.mark.skipif(os.geteuid() != 0, reason="root, who can give folders away")
    def test_a_planted_folder_is_not_written_into(self, tmp_path, kind):
        folder = tmp_path / f".out.{SUFFIXES[kind]}"
        (folder / "folder").mkdir(parents=True)
        os.chown(folder, 1234, 1234)
        with pytest.raises(PuzzleError, match=r"is in the way .found another user's folder"), kind(tmp_path / "out"):
            pass
        assert (folder / "folder").exists() and not (tmp_path / "out").exists()


def test_a_locked_folder_is_its_owners_alone_and_free_afterwards(tmp_path):
    out = tmp_path / "sub" / "out"
    with locked_folder(out):
        assert out.is_dir()
        with pytest.raises(PuzzleError, match=r"out: another process is writing this folder"), locked_folder(out):
            pytest.fail("the block must not run")
        with locked_folder(tmp_path / "sub" / "other"):
            pass
    with pytest.raises(RuntimeError), locked_folder(out):
        raise RuntimeError("a failure frees it too")
    with locked_folder(out):
        pass


def test_a_file_cannot_be_a_locked_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(PuzzleError, match=r"file: cannot write here: File exists"), locked_folder(tmp_path / "file"):
        pytest.fail("the block must not run")


def test_a_single_file_is_not_written_through_a_planted_link(tmp_path):
    ours = tmp_path / "thesis"
    ours.write_text("chapter 1")
    (tmp_path / f".file.partial-{os.getpid()}").symlink_to(ours)
    write_atomically(tmp_path / "file", "new")
    assert (ours.read_text(), (tmp_path / "file").read_text(), (tmp_path / "file").is_symlink()) == (
        "chapter 1",
        "new",
        False,
    )


def test_a_single_file_is_replaced_in_one_step(tmp_path):
    write_atomically(tmp_path / "sub" / "file", "one")
    write_atomically(tmp_path / "sub" / "file", b"two")
    assert (tmp_path / "sub" / "file").read_text() == "two"
    assert names(tmp_path / "sub") == ["file"]


def test_a_single_file_below_a_file_is_one_line(tmp_path):
    (tmp_path / "sub").touch()
    with pytest.raises(PuzzleError, match=r"sub/file: cannot be written"):
        write_atomically(tmp_path / "sub" / "file", "one")


def test_links_share_the_bytes_even_through_a_symlink(tmp_path):
    (tmp_path / "blob").write_text("bytes")
    (tmp_path / "link").symlink_to("blob")  # as in the hub's cache
    link_or_copy(tmp_path / "link", tmp_path / "copy")
    assert (tmp_path / "copy").stat().st_ino == (tmp_path / "blob").stat().st_ino
    assert not (tmp_path / "copy").is_symlink()
