"""Who imports whom: stages import the core and never each other, the core imports no stage (docs/design.md)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAGES = {"build", "calibration", "serve"}
MAY_IMPORT_ALL = {"cli", "commands", "demo", "doctor", "__main__"}


def imported(file: Path) -> set[str]:
    """The parts of puzzle_trtllm that a module imports, anywhere in it: `serve` for puzzle_trtllm.serve.client."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "puzzle_trtllm":
            names |= {f"puzzle_trtllm.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("puzzle_trtllm.")}


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_stages_import_the_core_and_never_each_other(stage: str) -> None:
    forbidden = (STAGES | MAY_IMPORT_ALL) - {stage}
    found = {str(file): imported(file) & forbidden for file in (ROOT / stage).rglob("*.py")}
    assert len(found) > 10 and {file: names for file, names in found.items() if names} == {}


def test_the_core_imports_no_stage() -> None:
    core = ROOT / "puzzle_trtllm"
    files = [*core.glob("*.py"), *(core / "models").rglob("*.py")]
    found = {str(file): imported(file) & (STAGES | MAY_IMPORT_ALL) for file in files if file.stem not in MAY_IMPORT_ALL}
    assert len(found) > 30 and {file: names for file, names in found.items() if names} == {}
