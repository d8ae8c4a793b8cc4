"""The guard: whatever ends first, no process that a server started is left, nor its files."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import signal
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import pytest

from puzzle_trtllm.process_states import StoppedProcesses, children_of, is_alive
from puzzle_trtllm.serve.triton import guard
from puzzle_trtllm.serve.triton.process import GuardedProcess
from tests.serve.scripted import HANG_S, wait_until

# A "server" that starts a grandchild in a session of its own, writes all pids, and ignores SIGTERM if told to.
SERVER = """
import os, signal, subprocess, sys, time
deaf, pid_file = sys.argv[1] == "deaf", sys.argv[2]
if deaf:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
inner = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
middle = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {inner!r}]); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", middle], start_new_session=True, stdout=subprocess.PIPE, text=True)
grandchild = child.stdout.readline().strip()
open(pid_file + ".tmp", "w").write(f"{os.getpid()} {child.pid} {grandchild}")
os.rename(pid_file + ".tmp", pid_file)
time.sleep(float(sys.argv[3]))
sys.exit(7)
"""


class Started:
    """A guarded SERVER and the pids of its three processes."""

    def __init__(self, tmp_path: Path, *, deaf: bool = False, lives_s: float = 600) -> None:
        self.scratch, self.log = tmp_path / "scratch", tmp_path / "log"
        self.scratch.mkdir()
        self.shm = Path("/dev/shm") / f"puzzle_test_{uuid.uuid4().hex[:8]}_region"
        self.shm.write_bytes(b"left behind")
        pid_file = tmp_path / "pids"
        arguments = ["deaf" if deaf else "hears", str(pid_file), str(lives_s)]
        self.process = GuardedProcess(
            [sys.executable, "-c", SERVER, *arguments], environment={"PUZZLE_TEST": "1"}, log_file=self.log,
            grace_s=HANG_S, shm_prefix=self.shm.name.removesuffix("region"), scratch=self.scratch,
        )  # fmt: skip
        wait_until(pid_file.exists, what="the server's start")
        self.pids = [int(pid) for pid in pid_file.read_text().split()]
        assert self.pids[0] == self.process.pid

    @property
    def guard(self) -> int:
        """Its pid, of a server that lives."""
        return int(Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[1])

    def assert_all_gone(self) -> None:
        wait_until(lambda: not any(is_alive(pid) for pid in self.pids), what="all processes ended")
        wait_until(lambda: not self.shm.exists() and not self.scratch.exists(), what="files removed")


def test_stop_ends_the_whole_tree(tmp_path: Path) -> None:
    started = Started(tmp_path)
    assert started.process.exit_code() is None and all(is_alive(pid) for pid in started.pids)
    assert started.process.stop() == 128 + signal.SIGTERM
    started.assert_all_gone()


def test_a_server_that_ignores_sigterm_is_killed_after_the_grace_time(tmp_path: Path) -> None:
    started = Started(tmp_path, deaf=True)
    assert started.process.stop(grace_s=0.3) == 128 + signal.SIGKILL
    started.assert_all_gone()


def test_a_guard_that_hears_two_demands_as_one_is_asked_again(tmp_path: Path) -> None:
    """It was busy: when it looks, its stdin is closed and the signal has come that was to cut the grace time short."""
    started, codes = Started(tmp_path, deaf=True), []
    os.kill(started.guard, signal.SIGSTOP)
    os.waitid(os.P_PID, started.guard, os.WSTOPPED)
    stopping = threading.Thread(target=lambda: codes.append(started.process.stop(grace_s=0)), daemon=True)
    stopping.start()
    wait_until(lambda: signal.SIGTERM in pending_signals(started.guard), what="the signal")
    os.kill(started.guard, signal.SIGCONT)
    stopping.join(HANG_S)
    assert codes == [128 + signal.SIGKILL]
    started.assert_all_gone()


def pending_signals(pid: int) -> set[int]:
    status = Path(f"/proc/{pid}/status").read_text()
    (pending,) = (int(line.split()[1], 16) for line in status.splitlines() if line.startswith("ShdPnd:"))
    return {number for number in range(1, 65) if pending >> (number - 1) & 1}


def test_a_server_that_ends_by_itself_leaves_nothing_and_tells_its_code(tmp_path: Path) -> None:
    started = Started(tmp_path, lives_s=0.2)
    assert started.process.wait(timeout_s=HANG_S) == 7
    started.assert_all_gone()
    assert started.process.stop() == 7


def test_the_tree_ends_when_the_starter_is_killed(tmp_path: Path) -> None:
    """kill -9 gives the starter no chance to clean up; the guard sees its pipe close."""
    script = (
        "import sys, time, pathlib; sys.path.insert(0, sys.argv[2])\n"
        "from tests.serve.test_triton_guard import Started\n"
        "started = Started(pathlib.Path(sys.argv[1])); print(*started.pids, started.shm, flush=True); time.sleep(600)"
    )
    root = Path(__file__).parents[2]
    starter = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path), str(root)], stdout=subprocess.PIPE, text=True
    )
    assert starter.stdout is not None
    *pids, shm = starter.stdout.readline().split()
    starter.kill()
    starter.wait()
    wait_until(lambda: not any(is_alive(int(pid)) for pid in pids), what="all processes ended")
    wait_until(lambda: not Path(shm).exists(), what="shared memory removed")


def test_the_server_ends_when_the_guard_itself_is_killed(tmp_path: Path) -> None:
    started = Started(tmp_path)
    os.kill(started.guard, signal.SIGKILL)
    wait_until(lambda: not is_alive(started.process.pid), what="the server ended")
    for pid in started.pids[1:]:  # Triton's stubs watch their server; these do not
        os.kill(pid, signal.SIGKILL)
    assert started.process.stop() == -signal.SIGKILL
    started.assert_all_gone()


def test_shared_memory_that_no_living_guard_has_is_removed_by_the_next(tmp_path: Path) -> None:
    """A container that runs out of memory loses guard and starter at once, and its /dev/shm may outlive it."""
    names = {who: f"puzzle_test_{who}{uuid.uuid4().hex[:8]}_" for who in ("dead", "living")}
    files = {who: [Path("/dev/shm", name + what) for what in ("guarded", "region")] for who, name in names.items()}
    for file in (files["living"][1], *reversed(files["dead"])):  # the mark last: any guard that starts now may see it
        file.write_bytes(b"")
    with os.fdopen(guard.mark_shared_memory(names["living"])):
        started = Started(tmp_path)
        own = Path("/dev/shm") / f"{started.shm.name.removesuffix('region')}guarded"
        found = [file.exists() for file in (own, *files["dead"], *files["living"])]
        started.process.stop()
    for file in files["living"]:
        file.unlink()
    assert found == [True, False, False, True, True] and not own.exists()


def test_a_guard_that_starts_beside_another_does_not_take_it_for_a_dead_one(tmp_path: Path, monkeypatch) -> None:
    flock, looks = fcntl.flock, []

    def while_another_starts(file: int, how: int) -> None:
        if how & fcntl.LOCK_SH:
            looks.append(None)
            guard.remove_what_the_dead_left()
        flock(file, how)

    monkeypatch.setattr(guard, "_SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(fcntl, "flock", while_another_starts)
    with os.fdopen(guard.mark_shared_memory("puzzle_test_")):
        assert looks and [file.name for file in tmp_path.iterdir()] == ["puzzle_test_guarded"]
        guard.remove_what_the_dead_left()
        assert [file.name for file in tmp_path.iterdir()] == ["puzzle_test_guarded"]
    guard.remove_what_the_dead_left()
    assert list(tmp_path.iterdir()) == []


def test_other_users_read_neither_the_log_nor_what_passes_through_shared_memory(tmp_path: Path) -> None:
    """Triton makes its region readable to all, under any umask; the log of errors may quote prompts."""
    started = Started(tmp_path)
    wait_until(lambda: started.shm.stat().st_mode & 0o777 == 0o600, what="its own region is private")
    linked = tmp_path / "a file of ours"
    linked.touch(0o644)
    link = started.shm.with_name(f"{started.shm.name}2")
    link.symlink_to(linked)
    for number in (3, 4):  # what is there when a round begins is seen in it; when the second is done, the first is over
        later = started.shm.with_name(f"{started.shm.name}{number}")
        later.touch()
        later.chmod(0o644)
        wait_until(lambda later=later: later.stat().st_mode & 0o777 == 0o600, what="a round of the guard")
    started.process.stop()
    assert linked.stat().st_mode & 0o777 == 0o644, "a link that another user may have put there"
    assert started.log.stat().st_mode & 0o777 == 0o600


def test_a_pipe_in_the_place_of_a_mark_does_not_hold_up_the_start(tmp_path: Path) -> None:
    pipe = Path("/dev/shm") / f"puzzle_test_{uuid.uuid4().hex[:8]}_guarded"
    os.mkfifo(pipe)
    started: list[Started] = []
    try:
        thread = threading.Thread(target=lambda: started.append(Started(tmp_path)), daemon=True)
        thread.start()
        thread.join(HANG_S / 2)
        assert started, "it waits for whoever writes into the pipe"
        started[0].process.stop()
    finally:
        with contextlib.suppress(OSError):
            os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))  # lets go of who waits there
        pipe.unlink(missing_ok=True)


def test_a_process_can_wait_for_its_parents_end(tmp_path: Path) -> None:
    """As a stub does, whose engine would hold its memory for a server that was killed."""
    inner = (
        "import os, sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from puzzle_trtllm.serve.triton.process import when_orphaned\n"
        "when_orphaned(lambda: os._exit(0)); print(os.getpid(), flush=True); time.sleep(600)"
    )
    outer = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', *sys.argv[1:]]).wait()"
    root = Path(__file__).parents[2]
    parent = subprocess.Popen([sys.executable, "-c", outer, inner, str(root)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert is_alive(child)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: not is_alive(child), what="the child's end")


def test_a_process_that_is_stopped_for_good_is_told_from_one_that_goes_on() -> None:
    child = subprocess.Popen(["sleep", "600"])
    watch = StoppedProcesses(max_looks=3)
    try:
        os.kill(child.pid, signal.SIGSTOP)
        wait_until(lambda: watch.given_up(child.pid), what="three looks in a row")
        os.kill(child.pid, signal.SIGCONT)
        wait_until(lambda: not watch.given_up(child.pid), what="it goes on")
        assert not any(watch.given_up(child.pid) for _ in range(9))
        os.kill(child.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED)
        assert [watch.given_up(child.pid) for _ in range(3)] == [False, False, True]
    finally:
        child.kill()
        child.wait()
    assert not watch.given_up(child.pid)


def test_only_the_command_gets_the_environment_and_its_output_goes_to_the_log(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    code = "import os, sys; print('seen', os.environ['PUZZLE_TEST']); print('error', file=sys.stderr)"
    process = GuardedProcess(
        [sys.executable, "-c", code], environment={"PUZZLE_TEST": "a b=c"}, log_file=tmp_path / "log", grace_s=1,
        shm_prefix="puzzle_test_none_", scratch=tmp_path / "scratch",
    )  # fmt: skip
    assert process.wait(timeout_s=HANG_S) == 0
    process.stop()
    assert sorted((tmp_path / "log").read_text().split("\n")) == ["", "error", "seen a b=c"]


def log_of(code: str, folder: Path) -> str:
    """What the log holds of a Python program that has ended by itself."""
    (folder / "scratch").mkdir()
    process = GuardedProcess(
        [sys.executable, "-c", code], environment={}, log_file=folder / "log", grace_s=1,
        shm_prefix="puzzle_test_none_", scratch=folder / "scratch",
    )  # fmt: skip
    assert process.wait(timeout_s=HANG_S) == 0
    process.stop()
    return (folder / "log").read_text()


def test_a_server_may_open_as_many_files_as_the_hard_limit_allows(tmp_path: Path) -> None:
    """Every open connection is a file, and 1024 is what a shell allows before anybody asks."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, before[1]))
    try:
        seen = log_of("import resource; print(*resource.getrlimit(resource.RLIMIT_NOFILE))", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert seen.split() == [str(min(before[1], 1 << 16)), str(before[1])]


def test_a_log_that_gets_long_keeps_its_beginning_and_what_came_last(tmp_path: Path) -> None:
    """Connections that cannot be accepted are worth ten megabytes a second to libevent."""
    code = (
        "import os, time; print('first words', flush=True)\n"
        "for _ in range(65): print('x' * (1 << 20), flush=True)\n"
        "while os.fstat(1).st_size > 3 << 20: time.sleep(0.01)\n"
        "print('last words')"
    )
    log = log_of(code, tmp_path)  # cut before the last of the lines or after it
    assert log.startswith("first words\nxxx") and log.endswith("last words\n") and len(log) <= 3 << 20


def test_a_server_that_runs_for_weeks_keeps_its_files(tmp_path: Path) -> None:
    """systemd-tmpfiles takes what is old from /tmp, except from folders that it cannot lock."""
    started = Started(tmp_path)
    try:
        folder = os.open(started.scratch, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(folder)
        os.utime(started.log, (0, 0))
        wait_until(lambda: started.log.stat().st_mtime > 0, what="the log looks new")
    finally:
        started.process.stop()


def test_a_command_that_does_not_exist(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    process = GuardedProcess(
        ["/nowhere/tritonserver"], environment={}, log_file=tmp_path / "log", grace_s=1,
        shm_prefix="puzzle_test_none_", scratch=tmp_path / "scratch",
    )  # fmt: skip
    assert process.wait(timeout_s=HANG_S) == 127
    process.stop()
    assert "/nowhere/tritonserver" in (tmp_path / "log").read_text()


def test_children_and_life_are_read_from_proc() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        assert child.pid in children_of(os.getpid()) and is_alive(child.pid)
        child.kill()
        # A zombie until it is waited for, which is not alive.
        wait_until(lambda: not is_alive(child.pid), what="the child's death")
    finally:
        child.kill()
        child.wait()
    assert not is_alive(child.pid) and children_of(child.pid) == set()


@pytest.mark.parametrize("stops", [1, 2])
def test_stop_may_be_called_again(stops: int, tmp_path: Path) -> None:
    started = Started(tmp_path)
    codes = {started.process.stop() for _ in range(stops)}
    assert codes == {128 + signal.SIGTERM}
    started.assert_all_gone()
