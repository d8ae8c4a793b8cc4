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
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import puzzle_trtllm
from tests.front_door.cli import ROOT

PACKAGE = ROOT / "puzzle_trtllm"

# TensorRT-LLM's requirements.txt (commit 000867d9, and a 1.3 release candidate of spring 2026), what pip made of it,
# and torch as tensorrtllm_backend's Dockerfile takes it from NVIDIA's PyTorch image.
ALIKE = {
    "transformers": "4.57.3",
    "datasets": "3.1.0",
    "fastapi": "0.121.3",
    "huggingface-hub": "0.36.2",
    "tokenizers": "0.22.2",
    "nvidia-modelopt": "0.37.0",
    "PyYAML": "6.0.3",
    "jinja2": "3.1.6",
}
IN_NVIDIAS_IMAGES = {
    "1.2": ALIKE | {"torch": "2.9.0a0+145a3a7bda.nv25.10", "numpy": "1.26.4", "pydantic": "2.12.5", "rich": "14.3.3",
                    "uvicorn": "0.42.0", "protobuf": "7.34.1", "safetensors": "0.7.0", "pyarrow": "23.0.1"},
    "1.3": ALIKE | {"torch": "2.11.0a0+eb65b36914.nv26.2", "numpy": "2.3.5", "pydantic": "2.13.4", "rich": "15.0.0",
                    "uvicorn": "0.48.0", "protobuf": "7.35.0", "safetensors": "0.8.0rc0", "pyarrow": "24.0.0"},
}  # fmt: skip
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


@pytest.mark.parametrize("line", IN_NVIDIAS_IMAGES)
def test_what_tensorrt_llm_brings_fits_but_for_modelopt(wheel: Path, line: str) -> None:
    """pip would replace what does not fit; `calibrate` goes into an environment of its own (docs/calibration.md)."""
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
    metadata = Parser().parsestr(archive.read(name).decode())
    asked = [Requirement(text) for text in metadata.get_all("Requires-Dist") or []]
    there = {canonicalize_name(name): version for name, version in IN_NVIDIAS_IMAGES[line].items()}
    wheel_only = [one for one in asked if one.marker and "triton-wheel" in str(one.marker)]
    compared = [one for one in asked if canonicalize_name(one.name) in there and one not in wheel_only]
    assert {canonicalize_name(one.name) for one in compared} == set(there)
    refused = {one.name for one in compared if not one.specifier.contains(there[canonicalize_name(one.name)], True)}
    assert refused == {"nvidia-modelopt"}


def test_the_core_installs_without_torch(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
    required = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist")
    always = {requirement for requirement in required or [] if "extra ==" not in requirement}
    assert any(requirement.startswith("numpy") for requirement in always)
    for heavy in ("torch", "transformers", "nvidia-modelopt", "tritonclient", "nvidia-pytriton"):
        assert not any(requirement.startswith(heavy) for requirement in always)
        assert any(requirement.startswith(heavy) for requirement in required or [])
