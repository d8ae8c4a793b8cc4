"""The set-up: every check says what is missing and what mends it, and a .venv counts as done only when it is."""

from __future__ import annotations

import ast
import errno
import fcntl
import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

import bootstrap
from requirements import machine
from tests.front_door.cli import ROOT

Usage = namedtuple("Usage", "total used free")
SHARED = {"LIBDIR": "", "MULTIARCH": "x86_64-linux-gnu"}


# -- the machine -----------------------------------------------------------------------------------------------------


def test_this_machine_passes() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "bootstrap.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "FAIL" not in done.stderr
    assert f"Python {sys.version_info.major}.{sys.version_info.minor}" in done.stderr


@pytest.mark.parametrize(
    ("version", "mend"),
    [((3, 9, 18), "apt-get install python3.11"), ((3, 8, 0), "python3.11-venv"), ((3, 13, 0), "libpython3.11")],
)
def test_pythons_that_will_not_do(version: tuple[int, ...], mend: str) -> None:
    check = machine.check_python(version)
    assert not check.passed
    assert mend in str(check.mend)
    assert "Python " + ".".join(map(str, version)) in check.found


@pytest.mark.parametrize("version", [(3, 10, 0), (3, 11, 2), (3, 12, 9)])
def test_pythons_that_will_do(version: tuple[int, ...]) -> None:
    check = machine.check_python(version)
    assert check.passed
    assert ("lock is for 3.11" in check.found) == (version[:2] != (3, 11))


def test_an_unfit_python_is_not_asked_for_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "sys", namedtuple("sys", "version_info base_prefix")((3, 9, 1), "/nowhere"))
    checks = machine.all_checks(ROOT, resuming=False)
    failed = [check.found for check in checks if not check.passed]
    assert len(failed) == 1
    assert "Python 3.9.1 is too old" in failed[0]


def test_missing_venv_module() -> None:
    check = machine.check_venv((3, 11, 2), find_spec=lambda name: None if name == "ensurepip" else object())
    assert check.mend == "sudo apt-get install python3.11-venv"
    assert "ensurepip" in check.found


def test_libpython_of_a_debian_python(tmp_path: Path) -> None:
    missing = machine.check_libpython((3, 11, 2), {**SHARED, "LIBDIR": str(tmp_path)}, "/usr-none")
    assert not missing.passed
    debian = machine.check_libpython((3, 42, 0), {**SHARED, "LIBDIR": str(tmp_path)}, "/usr")
    assert debian.mend == "sudo apt-get install libpython3.42"


def test_libpython_of_another_build_is_no_substitute(tmp_path: Path) -> None:
    """A static pyenv build must not be sent to the system's library, which brings another standard library."""
    check = machine.check_libpython((3, 11, 7), {"LIBDIR": str(tmp_path / "lib"), "MULTIARCH": None}, str(tmp_path))
    assert not check.passed
    assert "--enable-shared" in str(check.mend)


@pytest.mark.parametrize("folder", ["lib", "lib/x86_64-linux-gnu"])
def test_libpython_is_found_beside_its_interpreter(folder: str, tmp_path: Path) -> None:
    library = tmp_path / folder / "libpython3.11.so.1.0"
    library.parent.mkdir(parents=True)
    library.touch()
    assert machine.check_libpython((3, 11, 7), SHARED, str(tmp_path)) == machine.Check(str(library))


@pytest.mark.parametrize(
    ("version", "passed"), [("glibc 2.35", True), ("glibc 2.41", True), ("glibc 2.31", False), ("", False)]
)
def test_glibc(version: str, passed: bool) -> None:
    assert machine.check_glibc(version).passed is passed


@pytest.mark.parametrize(
    ("system", "processor", "passed"),
    [("Linux", "x86_64", True), ("Linux", "aarch64", True), ("Linux", "ppc64le", False), ("Darwin", "arm64", False)],
)
def test_platform(system: str, processor: str, passed: bool) -> None:
    assert machine.check_platform(system, processor).passed is passed


@pytest.mark.parametrize(
    ("folder", "passed"),
    [
        ("/home/me/it's a [puzzle]~1", True),
        ("/home/jürgen/puzzle", False),
        ("/home/$USER/puzzle", False),
        ("/home/a:b", False),
        ("/home/a\nb", False),
        ('/home/"a"', False),
    ],
)
def test_where_a_checkout_may_lie(folder: str, passed: bool) -> None:
    assert machine.check_path(Path(folder)).passed is passed


def test_low_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**12, 10**12, 2.9e9))
    checks = machine.all_checks(tmp_path, resuming=False)
    (failed,) = [check for check in checks if not check.passed]
    assert failed.found == f"2.9 GB free in {tmp_path}, 3 GB needed"
    assert all(check.passed for check in machine.all_checks(tmp_path, resuming=True))


def test_shared_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "mount -t tmpfs" in str(machine.check_shm(tmp_path / "none").mend)
    assert machine.check_shm(tmp_path).passed
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(2**26, 2**26 - 2**24, 2**24))
    check = machine.check_shm(tmp_path)
    assert check.found == f"16 MiB free in {tmp_path}, 32 MiB needed"
    assert "--shm-size" in str(check.mend)


def test_a_failed_check_ends_before_anything_is_made(
    monkeypatch: pytest.MonkeyPatch, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = machine.Check("no libpython3.11.so.1.0 in /lib", "sudo apt-get install libpython3.11")
    monkeypatch.setattr(bootstrap, "all_checks", lambda root, resuming: [machine.Check("Python 3.11.2"), failed])
    monkeypatch.setattr(bootstrap, "run", lambda *_: pytest.fail("something was run"))
    assert bootstrap.main([]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "  FAIL  no libpython3.11.so.1.0 in /lib: sudo apt-get install libpython3.11"
    assert not (project / ".venv").exists()


@pytest.mark.parametrize("file", ["bootstrap.py", "requirements/machine.py"])
def test_an_old_python_can_read_it(file: str) -> None:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"), feature_version=(3, 8))
    imported = {
        (node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    allowed = set(sys.stdlib_module_names) | {"requirements"}
    assert {name.partition(".")[0] for name in imported} <= allowed


# -- .venv -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files that the set-up reads, with bootstrap's paths turned to it."""
    (tmp_path / "requirements").mkdir()
    for name in ("pyproject.toml", "requirements/cpu-py311.txt", "requirements/numpy1.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    venv = tmp_path / ".venv"
    for name, value in {
        "ROOT": tmp_path,
        "VENV": venv,
        "RECORD": venv / bootstrap.RECORD.name,
        "LOG": venv / "setup.log",
        "LOCK": tmp_path / "requirements" / "cpu-py311.txt",
        "NUMPY1": tmp_path / "requirements" / "numpy1.txt",
        "PYPROJECT": tmp_path / "pyproject.toml",
    }.items():
        monkeypatch.setattr(bootstrap, name, value)
    return tmp_path


def finish(project: Path) -> None:
    """A complete .venv, as far as the set-up looks."""
    (project / ".venv" / "bin").mkdir(parents=True)
    (project / ".venv" / "bin" / "puzzle-trtllm").touch()
    bootstrap.write_record("complete")


def test_a_finished_environment_is_left_alone(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(project)
    monkeypatch.setattr(bootstrap, "all_checks", lambda *_, **__: pytest.fail("nothing is to be checked"))
    assert bootstrap.main([]) == 0


def test_the_lock_is_one_that_nfs_grants(tmp_path: Path) -> None:
    """An exclusive one is refused there on a file that is open for reading only."""
    (tmp_path / "file").touch()
    with bootstrap.open_for_lock(tmp_path / "file") as file:
        assert file.writable()
        assert bootstrap.wait_for_other_set_ups(file)
        with bootstrap.open_for_lock(tmp_path / "file") as second, pytest.raises(BlockingIOError):
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_disk_without_locks_is_noted_and_no_obstacle(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(file: object, operation: int) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(bootstrap.fcntl, "flock", refuse)
    monkeypatch.setattr(bootstrap, "set_up_with_the_best_torch", lambda: None)
    assert bootstrap.main([]) == 0
    told = capsys.readouterr().err
    assert "note  this disk has no locks" in told
    assert told.endswith(f"`. {project}/.venv/bin/activate` puts puzzle-trtllm on the PATH\n")


@pytest.mark.parametrize("file", ["pyproject.toml", "requirements/cpu-py311.txt", "requirements/numpy1.txt"])
def test_a_changed_requirement_makes_it_out_of_date(file: str, project: Path) -> None:
    finish(project)
    assert bootstrap.is_current()
    with (project / file).open("a", encoding="utf-8") as stream:
        stream.write("# changed\n")
    assert not bootstrap.is_current()


@pytest.mark.parametrize("key", ["root", "python", "version"])
def test_another_interpreter_or_place_makes_it_out_of_date(key: str, project: Path) -> None:
    finish(project)
    record = json.loads(bootstrap.RECORD.read_text(encoding="utf-8"))
    bootstrap.RECORD.write_text(json.dumps({**record, key: "another"}), encoding="utf-8")
    assert not bootstrap.is_current()


def test_an_interrupted_set_up_is_not_taken_for_done(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []

    def run(title: str, command: list[str]) -> None:
        steps.append(title)
        if title == "environment":
            (project / ".venv" / "bin").mkdir(parents=True)
        if title == "packages" and steps.count("packages") == 1:
            raise KeyboardInterrupt
        if title == "puzzle-trtllm itself":
            (project / ".venv" / "bin" / "puzzle-trtllm").touch()

    monkeypatch.setattr(bootstrap, "run", run)
    monkeypatch.setattr(bootstrap, "existing_torch", lambda python: None)
    monkeypatch.setattr(bootstrap, "offers_cpu_build", lambda version: True)
    assert bootstrap.main([]) == 130
    assert bootstrap.recorded()["state"] == "installing"
    assert not bootstrap.is_current()
    monkeypatch.setattr(bootstrap, "is_usable", lambda *, shared: True)
    assert bootstrap.main([]) == 0
    assert bootstrap.is_current()
    assert steps == ["environment", "packages", "packages", "puzzle-trtllm itself"]


def test_an_environment_of_nobody_is_not_used(project: Path) -> None:
    assert not bootstrap.is_usable(shared=False)
    (project / ".venv").mkdir()
    (project / ".venv" / "pyvenv.cfg").write_text("include-system-site-packages = false\n", encoding="utf-8")
    assert not bootstrap.is_usable(shared=False)  # it has no interpreter


def test_a_real_environment_is_used_again(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bootstrap.make_venv(shared=False)
    assert bootstrap.is_usable(shared=False)
    assert not bootstrap.is_usable(shared=True)
    assert not bootstrap.is_current()
    marker = project / ".venv" / "marker"
    marker.touch()
    bootstrap.make_venv(shared=False)
    assert marker.exists()
    with monkeypatch.context() as patch:  # one that has begun to get its own torch goes on with that
        tried: list[str | None] = []
        patch.setattr(bootstrap, "set_up", tried.append)
        patch.setattr(bootstrap, "existing_torch", lambda python: "2.11.0+cu130")
        bootstrap.set_up_with_the_best_torch()
        assert tried == [None]
    bootstrap.make_venv(shared=True)
    assert not marker.exists()
    assert bootstrap.is_usable(shared=True)


def test_what_pip_was_interrupted_at_is_installed_again(project: Path) -> None:
    packages = project / ".venv" / "lib" / "python3.11" / "site-packages"
    for name, files in {"whole": ("METADATA", "RECORD", "INSTALLER"), "half": ("METADATA", "RECORD")}.items():
        (packages / f"{name}-1.0.dist-info").mkdir(parents=True)
        for file in files:
            (packages / f"{name}-1.0.dist-info" / file).touch()
    bootstrap.forget_half_installed()
    assert [folder.name for folder in packages.iterdir()] == ["whole-1.0.dist-info"]


def test_a_failing_step_shows_the_reason(project: Path) -> None:
    program = "print('much talk'); print('ERROR: No matching distribution found for torch'); raise SystemExit(1)"
    with pytest.raises(bootstrap.SetupError, match="No matching distribution found for torch") as error:
        bootstrap.run("packages", [sys.executable, "-c", program])
    assert "much talk" not in str(error.value)
    assert "much talk" in bootstrap.LOG.read_text(encoding="utf-8")


# -- torch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "specifiers", "fits"),
    [
        ("2.11.0+cu130", ">=2.9", True),
        ("2.9.0", ">=2.9", True),
        ("2.10.1", ">=2.9,<2.10", False),
        ("2.8.1", ">=2.9", False),
        ("3.0.0", ">=2.9,<3", False),
        ("2.9.1", ">=2.9,!=2.9.1", False),
        ("2.13.0a0+git1", "==2.13.0", True),
        ("2.9.0a0+145a3a7bda.nv25.10", ">=2.9.0a0", True),
        ("2.8.1", ">=2.9.0a0", False),
    ],
)
def test_version_ranges(version: str, specifiers: str, fits: bool) -> None:
    assert bootstrap.in_range(version, specifiers) is fits


def test_the_range_is_that_of_pyproject() -> None:
    assert bootstrap.torch_range((ROOT / "pyproject.toml").read_text(encoding="utf-8")) == ">=2.9.0a0"
    assert bootstrap.torch_range('a = ["torchvision>=1", "torch>=2.1,<4", "x"]') == ">=2.1,<4"


def fake_python(folder: Path, version: str) -> str:
    """An interpreter that can import a torch of this version."""
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text(f"__version__ = {version!r}\n", encoding="utf-8")
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{folder}" exec {sys.executable} "$@"\n', encoding="utf-8")
    script.chmod(0o755)
    return str(script)


def test_an_existing_torch_is_used_if_it_fits(tmp_path: Path) -> None:
    assert bootstrap.existing_torch(fake_python(tmp_path / "new", "2.11.0+cu130")) == "2.11.0+cu130"
    assert bootstrap.existing_torch(fake_python(tmp_path / "old", "2.1.0")) is None
    assert bootstrap.existing_torch(str(tmp_path / "none")) is None


@pytest.mark.parametrize(
    ("shared", "offered", "first"), [(None, True, "+cpu"), (None, False, ""), ("2.11.0+cu130", False, None)]
)
def test_which_torch_is_installed(
    shared: str | None, offered: bool, first: str | None, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / ".venv").mkdir()
    monkeypatch.setattr(bootstrap, "offers_cpu_build", lambda version: offered)
    monkeypatch.setattr(bootstrap, "LOCKED_PYTHON", sys.version_info[:2])
    monkeypatch.setenv("TORCH_INDEX_URL", "https://example.org/torch")
    arguments = bootstrap.pip_arguments(shared)
    assert arguments[:2] == ["--extra-index-url", "https://example.org/torch"]
    assert ("--no-deps" in arguments) is bool(shared)  # its own requirements must not fight the lock
    lines = Path(arguments[-1]).read_text(encoding="utf-8").splitlines()
    locked = bootstrap.locked_torch(bootstrap.LOCK.read_text(encoding="utf-8"))
    assert lines[0] == (f"torch=={shared}" if shared else f"torch=={locked}{first}")
    assert [line for line in lines if line.startswith("torch==")] == lines[:1]
    assert "numpy==1.26.4" in lines


def test_another_python_resolves_from_ranges(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / ".venv").mkdir()
    monkeypatch.setattr(bootstrap, "offers_cpu_build", lambda version: True)
    monkeypatch.setattr(bootstrap, "LOCKED_PYTHON", (3, 1))
    lines = Path(bootstrap.pip_arguments(None)[-1]).read_text(encoding="utf-8").splitlines()
    assert lines[1] == f"puzzle-trtllm[{bootstrap.EXTRAS}] @ file://{project}"
    assert lines[2] == f"-c {project}/requirements/numpy1.txt"


def test_a_torch_that_fights_the_lock_is_left_aside(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str | None] = []

    def set_up(shared_torch: str | None) -> None:
        tried.append(shared_torch)
        if shared_torch:
            raise bootstrap.SetupError("ResolutionImpossible")

    monkeypatch.setattr(bootstrap, "set_up", set_up)
    monkeypatch.setattr(bootstrap, "existing_torch", lambda python: "2.11.0+cu130")
    bootstrap.set_up_with_the_best_torch()
    assert tried == ["2.11.0+cu130", None]


CONFLICT = "ERROR: Cannot install a and torch because these package versions have conflicting dependencies."
ANOTHER = (
    "ERROR: Could not find a version that satisfies the requirement torch==2.11.0+cu130 (from versions: 2.9.0, 2.9.1)"
)
OUTAGE = "ERROR: Could not find a version that satisfies the requirement torch==2.11.0+cu130 (from versions: none)"


@pytest.mark.parametrize(
    ("error", "conflict"),
    [
        (CONFLICT, True),
        ("ERROR: ResolutionImpossible: for help visit https://pip.pypa.io", True),
        (ANOTHER, True),
        (OUTAGE, False),
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", False),
    ],
)
def test_what_tells_of_a_conflict(error: str, conflict: bool) -> None:
    assert bootstrap.tells_of_conflict(f"packages failed (the whole log: /tmp/conflict/setup.log)\n{error}") is conflict


def test_an_outage_is_no_conflict_and_keeps_what_was_made(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str | None] = []

    def set_up(shared_torch: str | None) -> None:
        tried.append(shared_torch)
        raise bootstrap.SetupError(OUTAGE)

    monkeypatch.setattr(bootstrap, "set_up", set_up)
    monkeypatch.setattr(bootstrap, "existing_torch", lambda python: "2.11.0+cu130")
    assert bootstrap.main([]) == 1
    assert tried == ["2.11.0+cu130"]


def test_pip_settings_that_install_elsewhere_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIP_TARGET", "PYTHONPATH", "PIP_PREFIX"):
        monkeypatch.setenv(name, "/elsewhere")
    monkeypatch.setenv("PIP_INDEX_URL", "https://example.org/simple")
    environment = bootstrap.pip_environment()
    assert "/elsewhere" not in environment.values()
    assert environment["PIP_INDEX_URL"] == "https://example.org/simple"
    assert environment["PIP_USER"] == "0"
