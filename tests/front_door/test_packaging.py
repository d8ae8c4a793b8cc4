"""What is installed is what is in the tree: the file lists of wheel and sdist, and that an sdist builds the same."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import puzzle_trtllm
from tests.front_door.cli import ROOT

PACKAGE = ROOT / "puzzle_trtllm"
STAGES = ("build", "calibration", "serve", "engine_configs")
NOT_SHIPPED = ("__pycache__", ".pyc")


def files_of(folder: Path) -> set[str]:
    """Every file below `folder`, through symbolic links, relative to its parent."""
    found = set()
    for where, _, names in os.walk(folder, followlinks=True):
        found |= {str((Path(where) / name).relative_to(folder.parent)) for name in names}
    return {file for file in found if not any(part in file for part in NOT_SHIPPED)}


def build(kind: str, source: Path, out: Path) -> Path:
    """Build a wheel or an sdist of `source` with the installed hatchling; nothing is downloaded or installed."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(out)],
        cwd=source,
        check=True,
        capture_output=True,
    )
    (made,) = out.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return made


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build("sdist", ROOT, folder)) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"puzzle_trtllm-{puzzle_trtllm.__version__}"


def in_wheel(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def test_the_wheel_holds_exactly_the_tree(wheel: Path) -> None:
    tree = files_of(PACKAGE)
    assert in_wheel(wheel) == tree
    for needed in (
        "py.typed",
        "build/derive.py",
        "serve/__init__.py",
        "scenarios/long.yaml",
        "demo/abacus/config.json",
    ):
        assert f"puzzle_trtllm/{needed}" in tree
    assert any(name.startswith("puzzle_trtllm/engine_configs/") and name.endswith(".yaml") for name in tree)
    assert any(name.endswith(".safetensors") for name in tree)


def test_the_stages_are_links_so_that_there_is_one_copy() -> None:
    for stage in STAGES:
        assert (PACKAGE / stage).readlink() == Path("..") / stage


def test_an_sdist_builds_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    assert in_wheel(build("wheel", sdist, tmp_path)) == in_wheel(wheel)


def test_the_sdist_holds_what_a_developer_needs(sdist: Path) -> None:
    for needed in ("Makefile", "bootstrap.py", "README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml"):
        assert (sdist / needed).is_file(), needed
    for folder in (*STAGES, "tests", "requirements"):
        assert files_of(sdist / folder) == files_of(ROOT / folder), folder


def test_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (folder,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
    metadata = Parser().parsestr(archive.read(f"{folder}/METADATA").decode())
    assert metadata["Name"] == "puzzle-trtllm"
    assert metadata["Version"] == puzzle_trtllm.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert f"{folder}/licenses/LICENSE" in archive.namelist()
    assert archive.read(f"{folder}/entry_points.txt").decode().split() == [
        "[console_scripts]",
        "puzzle-trtllm",
        "=",
        "puzzle_trtllm.__main__:main",
    ]


def test_the_core_installs_without_torch(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
    required = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist")
    always = {requirement for requirement in required or [] if "extra ==" not in requirement}
    assert any(requirement.startswith("numpy") for requirement in always)
    for heavy in ("torch", "transformers", "nvidia-modelopt", "tritonclient", "nvidia-pytriton"):
        assert not any(requirement.startswith(heavy) for requirement in always)
        assert any(requirement.startswith(heavy) for requirement in required or [])
