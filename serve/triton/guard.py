"""Runs one server so that nothing of it outlives us: `python -I -S guard.py GRACE_S SHM_PREFIX FOLDER COMMAND...`.

tritonserver starts stubs, a stub starts the engine, the engine may start workers. Whoever of them is orphaned becomes
this process's child (PR_SET_CHILD_SUBREAPER), so it can find and end them all. It does so when the server ends, when it
gets SIGTERM (a second one cuts the grace time short), and when its stdin closes: the starter holds the other end of
that pipe, and the kernel closes it even if the starter was killed with -9. Should this process itself be killed, the
server gets SIGKILL (PR_SET_PDEATHSIG), its stubs end themselves (service.py), and the starter, if there is one, removes
their files. (PDEATHSIG in the starter would not do: it fires when the *thread* that forked ends.)

A container that runs out of memory loses all its processes at once, us too, and its shared memory may outlive it: the
guard that starts next removes what belongs to no living one. A file beside it, which its guard has locked, tells which.

stdout gets the server's pid in one line; the server's own output goes to stderr, a log file opened for appending. The
exit code is the server's, 128 + signal if it was killed. Afterwards FOLDER and the shared memory /dev/shm/SHM_PREFIX*
are removed, which a killed server leaves behind. Standard library only, so that it starts in 20 ms and needs no
environment.

The server may open as many files as the hard limit allows: an open connection is one, and a shell's soft limit of 1024
is fewer than it takes requests. At the limit, libevent and asyncio write megabytes a second about connections that they
cannot accept, so the log is cut when it gets long: its beginning stays, and what came last.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import resource
import select
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_POLL_S = 0.05
_MAX_FILES = 1 << 16
"""A container's hard limit may be a billion, and some programs close all files that could be open."""
_LOG_LIMIT = 64 << 20
_LOG_BEGINNING = 1 << 20
_LOG_AGE_S = 86_400
_SHARED_MEMORY = Path("/dev/shm")
_MARK = "guarded"


def main(arguments: list[str]) -> int:
    """Run the command until it ends or is to end, and clean up."""
    grace_s, shm_prefix, folder = float(arguments[0]), arguments[1], Path(arguments[2])
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    _allow_many_files()
    _keep_from_cleaners(folder)
    with contextlib.suppress(OSError):  # it may be full, or not there
        remove_what_the_dead_left()
        mark_shared_memory(shm_prefix)
    stops: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stops.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        server = subprocess.Popen(
            arguments[3:],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno(),
            preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0),  # noqa: PLW1509 (one thread)
        )
        print(server.pid, flush=True)
        status = _wait(server.pid, grace_s, stops, shm_prefix)
    except OSError as error:
        print(f"{arguments[3]}: {error.strerror}", file=sys.stderr)
        status = 127
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # at our exit it would be what ended us, and not the server's code
    _end_descendants(server_grace_s=min(grace_s, 2.0))
    remove_files(shm_prefix, folder)
    return status


def remove_files(shm_prefix: str, folder: Path) -> None:
    """What a server leaves that was killed."""
    _remove_shared_memory(shm_prefix)
    shutil.rmtree(folder, ignore_errors=True)


def _remove_shared_memory(prefix: str) -> None:
    for leftover in _SHARED_MEMORY.glob(f"{prefix}*"):
        leftover.unlink(missing_ok=True)


def _make_private(prefix: str) -> None:
    """Prompts and answers pass through it, and Triton lets all users read it, whatever the umask."""
    for region in _SHARED_MEMORY.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):  # it has just gone
            found = region.lstat()  # of our own files nobody else can make a link there
            if found.st_uid == os.geteuid() and stat.S_ISREG(found.st_mode) and found.st_mode & 0o077:
                region.chmod(0o600)


def mark_shared_memory(prefix: str) -> int:
    """The locked file that keeps other guards from it, open. It is locked before it has the name that they look for:
    one that starts at this moment would take it for a dead one's."""
    mark = _SHARED_MEMORY / f"{prefix}{_MARK}"
    unseen = mark.with_name(f"{mark.name}-soon")
    file = _lock(unseen, os.O_CREAT, fcntl.LOCK_SH)
    unseen.rename(mark)
    return file


def remove_what_the_dead_left() -> None:
    """Shared memory whose mark nobody has locked."""
    for mark in _SHARED_MEMORY.glob(f"puzzle_*_{_MARK}"):
        with contextlib.suppress(OSError):  # its guard lives, or it is another user's
            os.close(_lock(mark, 0, fcntl.LOCK_EX))
            _remove_shared_memory(mark.name.removesuffix(_MARK))


def _wait(server: int, grace_s: float, stops: list[int], shm_prefix: str) -> int:
    """Wait for the server's end, asking for it when the starter is gone; returns its exit code."""
    deadline_s = None
    while True:
        _tend_log(sys.stderr.fileno())
        _make_private(shm_prefix)
        status = _reap(server)
        if status is not None:
            return status
        if deadline_s is None:
            if stops or _stdin_closed():
                deadline_s = time.monotonic() + grace_s
                stops.clear()
                os.kill(server, signal.SIGTERM)
            continue
        if stops or time.monotonic() > deadline_s:
            os.kill(server, signal.SIGKILL)
        time.sleep(_POLL_S)


def _allow_many_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, _MAX_FILES)), hard))


def _keep_from_cleaners(folder: Path) -> None:
    """systemd-tmpfiles takes from /tmp what is ten days old, but nothing in a folder that is locked."""
    with contextlib.suppress(OSError):  # a file system without locks
        _lock(folder, 0, fcntl.LOCK_SH)


def _lock(path: Path, flags: int, how: int) -> int:
    """The open file that holds the lock. Raises OSError where another one does, and for another user's link."""
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | flags, 0o600)  # a pipe would never open
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        raise
    return file


def _tend_log(log: int) -> None:
    """Cut a long one; a server that has nothing to say keeps its log, too, from who takes old files away."""
    found = os.fstat(log)
    with contextlib.suppress(OSError):  # a log that is not ours, as /dev/null
        if found.st_size > _LOG_LIMIT:
            os.ftruncate(log, _LOG_BEGINNING)
        if time.time() - found.st_mtime > _LOG_AGE_S:
            os.utime(log)


def _stdin_closed() -> bool:
    readable, _, _ = select.select([0], [], [], _POLL_S)
    return bool(readable) and os.read(0, 1) == b""


def _reap(server: int) -> int | None:
    """Collect every child that has ended; the server's exit code if it is among them."""
    result = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return result
        if pid == 0:
            return result
        if pid == server:
            result = 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def _end_descendants(server_grace_s: float) -> None:
    deadline_s = time.monotonic() + server_grace_s
    while remaining := _descendants():
        how = signal.SIGTERM if time.monotonic() < deadline_s else signal.SIGKILL
        for pid in remaining:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, how)
        time.sleep(_POLL_S)
        _reap(0)


def _descendants() -> list[int]:
    """All processes below this one, from the parents that /proc names."""
    children: dict[int, list[int]] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            # pid (comm) state ppid ...; comm may hold anything, so split behind its last parenthesis
            parent = int(file.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError, ValueError):
            continue
        children.setdefault(parent, []).append(int(file.parent.name))
    found, queue = [], [os.getpid()]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
