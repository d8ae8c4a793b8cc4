"""Killed with -9 at any moment: no OUT that looks complete, the parent untouched, and the next call goes on."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import puzzle_trtllm.build.derive
from puzzle_trtllm.build.derive import derive
from puzzle_trtllm.build.verify import verify
from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.checkpoint_writer import write_shards
from puzzle_trtllm.errors import PuzzleError
from puzzle_trtllm.folders import atomic_folder

PARENT_BLOCKS = [(6, 16), (6, None), (6, 16)]
CHILD_BLOCKS = [(4, 16), (6, 40), (3, None)]
SCORES = [[5, 1, 3, 9, 2, 7], [1, 2, 3, 4, 5, 6], [0.5, 0.5, 0.5, 0.5, 0.25, 0.5]]
MAX_SHARD_BYTES = 6_000


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file but derivation.json, which holds paths."""
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.iterdir())
        if file.name != "derivation.json"
    }


def shards_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of each finished shard: the same pair means it was not written again."""
    return {f.name: (f.stat().st_ino, f.stat().st_mtime_ns) for f in folder.glob("model-*-of-*.safetensors")}


class Job:
    """One derivation, run here, in a forked process that kills itself, or as the real command."""

    def __init__(self, parent: Path, out: Path, architecture: Path, importance: Path) -> None:
        self.parent, self.out = parent, out
        self.inputs = {"architecture": architecture, "importance": importance}
        self.workplace = out.with_name(f".{out.name}.partial-resumable")

    def run(self, **changes: object):
        return derive(self.parent, self.out, **{**self.inputs, "max_shard_bytes": MAX_SHARD_BYTES, **changes})

    def run_and_kill(self, *, after_bytes: int) -> bool:
        """Derive in a forked process that dies by SIGKILL once it has written so much; True if it was killed."""
        process = os.fork()
        if process == 0:
            written = 0

            def progress(num_bytes: int) -> None:
                nonlocal written
                written += num_bytes
                if written > after_bytes:
                    os.kill(os.getpid(), signal.SIGKILL)

            puzzle_trtllm.build.derive.write_shards = lambda *a, **k: write_shards(*a, **{**k, "progress": progress})
            try:
                self.run()
                os._exit(0)
            except BaseException:
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        assert status in (0, -signal.SIGKILL)
        return status != 0

    def command(self) -> list[str]:
        options = [f"--{key}={value}" for key, value in self.inputs.items()]
        limit = f"--max-shard-bytes={MAX_SHARD_BYTES}"
        return [sys.executable, "-m", "puzzle_trtllm", "derive", str(self.parent), str(self.out), *options, limit]


@pytest.fixture
def job(make_checkpoint, write_architecture, write_importance, tmp_path):
    (tmp_path / "results").mkdir()
    parent = make_checkpoint(PARENT_BLOCKS)
    return Job(parent, tmp_path / "results" / "child", write_architecture(CHILD_BLOCKS), write_importance(SCORES))


@pytest.fixture
def expected(job, tmp_path):
    """What an undisturbed derivation writes."""
    derive(job.parent, tmp_path / "undisturbed", **job.inputs, max_shard_bytes=MAX_SHARD_BYTES)
    return digests(tmp_path / "undisturbed")


def test_killed_after_any_number_of_bytes(job, expected):
    parent, rng, num_resumed = digests(job.parent), random.Random(0), 0
    total = Checkpoint.open(job.parent).weight_bytes
    for _ in range(25):
        if not job.run_and_kill(after_bytes=rng.randrange(total)):
            break
        assert not job.out.exists() and digests(job.parent) == parent
        finished = shards_of(job.workplace / "folder")
        num_resumed += bool(finished)
        if rng.random() < 0.4:
            job.run()
            assert digests(job.out) == expected and verify(job.out, against=job.parent).identical
            assert finished.items() <= shards_of(job.out).items(), "a finished shard was written again"
            assert list(job.out.parent.iterdir()) == [job.out]
            for file in job.out.iterdir():
                file.unlink()
            job.out.rmdir()
    assert num_resumed > 3 and digests(job.parent) == parent


def test_the_real_command_killed_at_random_moments(job, expected):
    """From before its first import to after its last byte; the last run is left alone."""
    parent, rng = digests(job.parent), random.Random(1)
    for _ in range(5):
        shards = len(shards_of(job.workplace / "folder")) + rng.randrange(12)
        process = subprocess.Popen(job.command(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for_shards(job, process, shards)
        process.kill()
        if process.wait() == 0:
            break
        assert digests(job.parent) == parent
        if job.out.exists():  # killed after its very last step
            assert digests(job.out) == expected
            break
    else:
        result = subprocess.run(job.command(), check=False, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    assert digests(job.out) == expected and digests(job.parent) == parent
    assert verify(job.out, against=job.parent).identical


def wait_for_shards(job: Job, process: subprocess.Popen[bytes], count: int) -> None:
    """Until so many shards are there (none: until the folder is), or the process has ended."""
    folder = job.workplace / "folder"
    while process.poll() is None:
        try:
            if sum(file.name.startswith("model-") for file in folder.iterdir()) >= count:
                return
        except FileNotFoundError:
            if job.out.exists():  # it has just got its name
                return
            time.sleep(0.001)


class TestWhatIsTakenUp:
    @pytest.fixture(autouse=True)
    def _killed(self, job):
        total = Checkpoint.open(job.parent).weight_bytes
        assert job.run_and_kill(after_bytes=total // 2)
        assert len(shards_of(job.workplace / "folder")) >= 2

    def test_the_same_job_keeps_its_finished_shards_and_says_so(self, job, expected, capsys):
        finished = shards_of(job.workplace / "folder")
        job.run(quiet=False)
        assert finished.items() <= shards_of(job.out).items() and digests(job.out) == expected
        assert "going on where a killed run stopped" in capsys.readouterr().err

    @pytest.mark.parametrize("change", ["importance", "max_shard_bytes", "a parent's file"])
    def test_another_job_starts_over(self, job, change, write_importance):
        finished = shards_of(job.workplace / "folder")
        changes: dict[str, object] = {}
        if change == "importance":
            changes["importance"] = write_importance([list(reversed(scores)) for scores in SCORES])
        elif change == "max_shard_bytes":
            changes["max_shard_bytes"] = MAX_SHARD_BYTES - 1
        else:
            os.utime(sorted(job.parent.glob("*.safetensors"))[0])
        job.run(**changes)
        assert not finished.items() & shards_of(job.out).items()
        assert verify(job.out, against=job.parent).identical

    def test_files_that_are_not_finished_shards_are_written_again(self, job, expected):
        folder = job.workplace / "folder"
        (folder / "tokenizer.json").write_text("half of it")
        (folder / ".model-00009-of-00009.safetensors.partial").write_bytes(b"half of it")
        job.run()
        assert digests(job.out) == expected

    def test_a_shard_of_the_wrong_size_is_written_again(self, job, expected):
        shard = sorted((job.workplace / "folder").glob("model-*"))[0]
        shard.write_bytes(shard.read_bytes()[:-1])
        job.run()
        assert digests(job.out) == expected

    def test_another_stage_that_writes_the_same_folder_cleans_up(self, job):
        with atomic_folder(job.out) as folder:
            (folder / "engine.json").write_text("{}")
        assert list(job.out.parent.iterdir()) == [job.out]

    def test_a_disk_too_small_for_the_rest_keeps_what_is_there(self, job, monkeypatch):
        finished = shards_of(job.workplace / "folder")
        monkeypatch.setattr("puzzle_trtllm.output_folder.HEADER_ALLOWANCE_BYTES", 2**60)
        with pytest.raises(PuzzleError, match="not enough disk space"):
            job.run()
        assert shards_of(job.workplace / "folder") == finished


def test_two_at_once_never_mix(job):
    """The second is refused in one line, and does not disturb the first."""
    refused: list[str] = []

    def write_while_another_tries(*arguments: object, **options: object) -> None:
        with pytest.raises(PuzzleError, match="another process is writing this folder") as caught:
            derive(job.parent, job.out, **job.inputs)
        refused.append(str(caught.value))
        write_shards(*arguments, **options)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("puzzle_trtllm.build.derive.write_shards", write_while_another_tries)
        job.run()
    assert len(refused) == 1 and "\n" not in refused[0]
    assert verify(job.out, against=job.parent).identical
