"""How the native kernels are compiled and kept: once a machine, never another user's, never half."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest

from puzzle_trtllm.models.reference.kernels import compiler
from puzzle_trtllm.process_states import is_alive

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, compiler.COMPILERS)), reason="no C++ compiler")


@pytest.fixture
def small_source(tmp_path, monkeypatch):
    source = tmp_path / "small.cpp"
    source.write_text('extern "C" int answer() { return 42; }')
    monkeypatch.setattr(compiler, "SOURCE", source)


@needs_compiler
def test_the_library_is_compiled_once_and_kept(small_source, tmp_path):
    compiler.load_library(cache=tmp_path / "cache")
    (library,) = (tmp_path / "cache").iterdir()
    before = library.stat().st_mtime_ns
    compiler.load_library(cache=tmp_path / "cache")
    assert [library] == list((tmp_path / "cache").iterdir()) and library.stat().st_mtime_ns == before


@needs_compiler
def test_a_damaged_library_is_made_anew(small_source, tmp_path):
    compiler.load_library(cache=tmp_path / "good")
    (good,) = (tmp_path / "good").iterdir()
    damaged = tmp_path / "damaged" / good.name
    damaged.parent.mkdir()
    damaged.touch()
    assert compiler.load_library(cache=damaged.parent).answer() == 42
    assert damaged.stat().st_size == good.stat().st_size


def planted(folder: Path) -> Path:
    """What another user has put in the place of the library in `folder`: it answers 666."""
    compiler.load_library(cache=folder.with_name("good"))
    (good,) = folder.with_name("good").iterdir()
    source = folder.with_name("planted.cpp")
    source.write_text('extern "C" int answer() { return 666; }')
    folder.mkdir()
    subprocess.run(["g++", "-shared", "-fPIC", "-o", str(folder / good.name), str(source)], check=True)
    return folder / good.name


@needs_compiler
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++")
@pytest.mark.parametrize("mode", [0o777, 0o775])
def test_a_library_that_others_may_write_is_made_anew(small_source, tmp_path, mode):
    library = planted(tmp_path / "cache")
    library.chmod(mode)
    assert compiler.load_library(cache=library.parent).answer() == 42
    assert library.stat().st_mode & 0o777 == 0o700


@needs_compiler
@pytest.mark.skipif(shutil.which("g++") is None or os.geteuid() != 0, reason="g++, and root, who can give files away")
@pytest.mark.parametrize("whose", ["library", "folder"])
def test_a_library_of_another_user_is_never_loaded(small_source, tmp_path, whose):
    library = planted(tmp_path / "cache")
    os.chown(library if whose == "library" else library.parent, 1234, 1234)
    assert compiler.load_library(cache=library.parent).answer() == 42


@needs_compiler
def test_a_cache_that_others_could_write_is_closed_to_them(small_source, tmp_path):
    tmp_path.joinpath("cache").mkdir()
    tmp_path.joinpath("cache").chmod(0o775)  # as under the umask 002
    compiler.load_library(cache=tmp_path / "cache")
    (library,) = (tmp_path / "cache").iterdir()
    assert [file.stat().st_mode & 0o777 for file in (library, library.parent)] == [0o700, 0o700]


@needs_compiler
@pytest.mark.parametrize("cache", ["/proc/nowhere", None])
def test_without_a_cache_the_library_is_the_process_own(small_source, tmp_path, monkeypatch, cache):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(compiler, "default_cache", Mock(side_effect=RuntimeError("a user without a home")))
    assert compiler.load_library(cache=cache and Path(cache)).answer() == 42
    assert [file.name for file in tmp_path.iterdir()] == ["small.cpp"]


def test_a_cache_has_an_absolute_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for setting, folder in (("/caches", "/caches"), ("caches", "/home/me/.cache"), ("", "/home/me/.cache")):
        monkeypatch.setenv("XDG_CACHE_HOME", setting)
        assert compiler.default_cache() == Path(folder) / "puzzle-trtllm"


@needs_compiler
def test_what_cannot_be_compiled_is_told_in_one_line_and_leaves_nothing(tmp_path):
    with pytest.raises(compiler.CompileError, match=r"^\S*: .*no-such-flag") as caught:
        compiler.load_library((*compiler.FLAGS, "--no-such-flag"), cache=tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_compiler_that_takes_too_long_ends_with_all_it_has_started(tmp_path, monkeypatch):
    driver, started = tmp_path / "g++", tmp_path / "started"
    driver.write_text(f"#!/bin/sh\n[ $1 = --version ] && exit\nsleep 1000 & echo $! > {started}\nwait\n")
    driver.chmod(0o755)
    communicate = subprocess.Popen.communicate

    def time_out_once_it_works(process: subprocess.Popen, *arguments: object, timeout: float) -> object:
        if "--version" not in process.args:
            wait_until(lambda: started.is_file() and started.read_text().endswith("\n"))
            timeout = 0.01
        return communicate(process, *arguments, timeout=timeout)

    monkeypatch.setattr(compiler, "COMPILERS", (str(driver),))
    monkeypatch.setattr(subprocess.Popen, "communicate", time_out_once_it_works)
    with pytest.raises(compiler.CompileError, match=r"timed out after 0\.01 seconds"):
        compiler.load_library(cache=tmp_path / "cache")
    wait_until(lambda: not is_alive(int(started.read_text())))
    assert not list((tmp_path / "cache").iterdir())


@needs_compiler
def test_of_two_at_once_one_compiles_and_the_other_waits_for_it(small_source, tmp_path, monkeypatch):
    """Ranks that all compile on few cores would keep each other from ever being done."""
    driver, begun, go_on, waits = tmp_path / "g++", tmp_path / "begun", tmp_path / "go on", threading.Event()
    real = next(filter(None, map(shutil.which, compiler.COMPILERS)))
    driver.write_text(
        f'#!/bin/sh\n[ $1 = --version ] && exit\necho begun >> "{begun}"\n'
        f'while [ ! -e "{go_on}" ]; do sleep 0.05; done\nexec {real} "$@"\n'
    )
    driver.chmod(0o755)
    begun.touch()
    flock = fcntl.flock

    def tell_of_waiting(file: int, operation: int) -> None:
        try:
            flock(file, operation)
        except BlockingIOError:
            waits.set()
            raise

    monkeypatch.setattr(fcntl, "flock", tell_of_waiting)
    monkeypatch.setattr(compiler, "COMPILERS", (str(driver),))
    with ThreadPoolExecutor(2) as threads:
        try:
            first = threads.submit(compiler.load_library, cache=tmp_path / "cache")
            wait_until(lambda: begun.read_text() == "begun\n")
            second = threads.submit(compiler.load_library, cache=tmp_path / "cache")
            wait_until(lambda: waits.is_set() or begun.read_text() != "begun\n")
        finally:
            go_on.touch()
        assert [library.result().answer() for library in (first, second)] == [42, 42]
    assert begun.read_text() == "begun\n"


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 200
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)
