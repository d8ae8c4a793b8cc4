"""What `COPY .` of the Dockerfile takes: all that the package is made of, and nothing that was made from it."""

from __future__ import annotations

import os
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATTERNS = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]


def is_left_out(file: str) -> bool:
    """Docker's rule for patterns of one part: at the root, or with `**/` at any depth; with a folder goes all in it.
    The last that fits counts, and `!` takes what it names."""
    first, *_ = parts = file.split("/")
    left_out = False
    for line in PATTERNS:
        pattern = line.removeprefix("!")
        names = parts if pattern.startswith("**/") else [first]
        if any(fnmatch(name, pattern.removeprefix("**/")) for name in names):
            left_out = not line.startswith("!")
    return left_out


def test_every_pattern_is_of_one_part():
    assert [pattern for pattern in PATTERNS if "/" in pattern.removeprefix("!").removeprefix("**/")] == []


@pytest.mark.parametrize(
    "file",
    [
        *(".venv/bin/python", ".git/HEAD", "runs/demo/report.json", "dist/puzzle_trtllm-0.1.0.tar.gz"),
        *("engines/child/model/model-00001-of-00013.safetensors", "models/child/config.json"),
        *("secret", "server.key", "key", ".env", "h100x1-long-bf16.yaml", "child.json"),
        *("puzzle_trtllm/__pycache__/cli.cpython-311.pyc", ".mypy_cache/3.10/cache.db", ".hypothesis/unicode_data"),
    ],
)
def test_what_was_made_or_is_nobodys_business_stays_out(file):
    assert is_left_out(file)


def test_what_the_package_is_built_from_is_there():
    sources = ["pyproject.toml", "README.md", "LICENSE"]
    for folder, folders, names in os.walk(ROOT / "puzzle_trtllm", followlinks=True):
        folders[:] = [name for name in folders if name != "__pycache__"]  # others write there at this moment
        # A stage is a link to a folder at the root: both the link and what it leads to must be there.
        files = [Path(folder) / name for name in names]
        sources += [str(place.relative_to(ROOT)) for file in files for place in (file, file.resolve())]
    assert len(sources) > 300
    assert [file for file in sources if is_left_out(file)] == []
