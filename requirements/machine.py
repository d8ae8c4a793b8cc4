"""Whether this machine can run the project: one `Check` a requirement, each with what mends it.

Everything is looked at before the first download. The requirements that surprise people: Triton's Python stub loads the
interpreter's own shared library (libpython3.x.so), the Triton wheel needs a recent glibc and numpy 1 (so Python 3.12 at
most), and Triton talks to its Python models through /dev/shm, which containers keep small.

Standard library only, and Python 3.8's syntax, as bootstrap.py says.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

LOCKED_PYTHON = (3, 11)
OLDEST_PYTHON, NEWEST_PYTHON = (3, 10), (3, 12)
"""The newest is the last one that numpy 1, which the Triton wheel needs, has builds for."""
OLDEST_GLIBC = (2, 35)
"""What the Triton wheel was built against."""
SETUP_BYTES = 3 * 10**9
"""About 2.1 GB installed, and the downloads while they are unpacked."""
RESUME_BYTES = 10**9
SHM_BYTES = 32 * 2**20
"""Triton's Python backend takes a few MB a model; containers usually give 64 MiB in all."""


class Check(NamedTuple):
    """One thing looked at: what was found, and, if it will not do, the command or package that mends it."""

    found: str
    mend: str | None = None

    @property
    def passed(self) -> bool:
        return self.mend is None


def check_platform(system: str, machine: str) -> Check:
    """The wheels with native code exist for Linux on two kinds of processor."""
    found = f"{system} on {machine}"
    if system == "Linux" and machine in ("x86_64", "aarch64"):
        return Check(found)
    return Check(f"{found}: not supported", "use Linux on x86_64 or aarch64, for example in a debian:12 container")


def check_python(version: tuple[int, ...]) -> Check:
    """The lock is for 3.11; its neighbours work from pyproject's ranges."""
    found = "Python " + ".".join(map(str, version[:3]))
    install = "sudo apt-get install python3.11 python3.11-venv libpython3.11, then make PYTHON=python3.11"
    if version[:2] < OLDEST_PYTHON:
        return Check(f"{found} is too old (3.10 to 3.12 will do, 3.11 is what the lock is for)", install)
    if version[:2] > NEWEST_PYTHON:
        return Check(f"{found} is too new: the Triton wheel needs numpy 1, which ends with Python 3.12", install)
    return Check(found if version[:2] == LOCKED_PYTHON else f"{found} (the lock is for 3.11: resolving from ranges)")


def check_venv(version: tuple[int, ...], find_spec: Callable[[str], Any] = importlib.util.find_spec) -> Check:
    """Debian ships Python without the modules that make environments."""
    missing = [name for name in ("venv", "ensurepip") if find_spec(name) is None]
    if not missing:
        return Check("venv and ensurepip")
    return Check(
        f"this Python lacks the module {missing[0]}", f"sudo apt-get install python{version[0]}.{version[1]}-venv"
    )


def check_libpython(version: tuple[int, ...], config: Mapping[str, Any], base_prefix: str) -> Check:
    """Triton's Python stub is linked against the interpreter's shared library, which must be the interpreter's own."""
    short = f"{version[0]}.{version[1]}"
    name = f"libpython{short}.so.1.0"
    libdir, multiarch = Path(config.get("LIBDIR") or base_prefix), config.get("MULTIARCH") or ""
    places = [libdir, libdir / multiarch, Path(base_prefix) / "lib", Path(base_prefix) / "lib" / multiarch]
    for folder in places:
        if (folder / name).exists():
            return Check(str(folder / name))
    if base_prefix == "/usr":
        mend = f"sudo apt-get install libpython{short}"
    else:
        mend = (
            "rebuild this Python with --enable-shared (pyenv: PYTHON_CONFIGURE_OPTS=--enable-shared), or: "
            f"sudo apt-get install python{short} python{short}-venv libpython{short} "
            f"and make PYTHON=/usr/bin/python{short}"
        )
    return Check(f"no {name} in {libdir} (Triton's Python stub loads it)", mend)


def check_glibc(version: str) -> Check:
    """`version` is what confstr says, "glibc 2.36"; empty on other C libraries."""
    match = re.match(r"glibc (\d+)\.(\d+)", version)
    if match is None:
        return Check(
            f"the C library is not glibc ({version or 'musl?'})", "use a glibc system: Debian 12, Ubuntu 22.04"
        )
    if (int(match[1]), int(match[2])) < OLDEST_GLIBC:
        return Check(f"{version} is too old for the Triton wheel", "glibc 2.35 comes with Debian 12, Ubuntu 22.04")
    return Check(version)


def check_path(folder: Path) -> Check:
    """Triton's Python stub knows only ASCII, the scripts that pip makes take $ for a variable, PATH ends at a colon."""
    if re.fullmatch(r"[^$`\":\\\x00-\x1f\x7f-\U0010ffff]+", str(folder)):
        return Check(f"set up in {folder}")
    return Check(f"set up in {folder}: not with these characters", 'clone to a path of ASCII without $ ` " : and \\')


def check_disk(folder: Path, needed: int, mend: str) -> Check:
    """Room for what will be written into `folder`, bytes."""
    free = shutil.disk_usage(str(folder)).free
    found = f"{free / 1e9:.1f} GB free in {folder}"
    return Check(found) if free >= needed else Check(f"{found}, {needed / 1e9:.0f} GB needed", mend)


def check_shm(folder: Path) -> Check:
    """Triton and its Python models exchange tensors through POSIX shared memory."""
    if not folder.is_dir():
        return Check(
            f"{folder} does not exist", f"sudo mkdir {folder} && sudo mount -t tmpfs -o size=64m tmpfs {folder}"
        )
    if not os.access(str(folder), os.W_OK):
        return Check(f"{folder} is not writable", f"sudo chmod 1777 {folder}")
    free = shutil.disk_usage(str(folder)).free
    if free < SHM_BYTES:
        return Check(
            f"{free // 2**20} MiB free in {folder}, {SHM_BYTES // 2**20} MiB needed",
            f"sudo mount -o remount,size=64m {folder} (docker run --shm-size=256m)",
        )
    return Check(f"{free // 2**20} MiB free in {folder}")


def all_checks(root: Path, *, resuming: bool) -> list[Check]:
    """Every check, on this machine, for a set-up in `root`; what an unfit Python lacks besides is not looked at."""
    version = sys.version_info[:3]
    checks = [check_platform(platform.system(), platform.machine()), check_python(version)]
    if checks[-1].passed:
        checks.append(check_venv(version))
        checks.append(check_libpython(version, sysconfig.get_config_vars(), sys.base_prefix))
    needed = RESUME_BYTES if resuming else SETUP_BYTES
    return [
        *checks,
        check_glibc(_glibc_version()),
        check_path(root),
        check_disk(root, needed, "free some space, or clone onto a larger disk"),
        check_disk(Path(tempfile.gettempdir()), RESUME_BYTES, "set TMPDIR to a folder with more room"),
        check_shm(Path("/dev/shm")),
    ]


def _glibc_version() -> str:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (ValueError, OSError):
        return ""
