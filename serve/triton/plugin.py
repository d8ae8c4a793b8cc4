"""Importing an engine's plugin package, which registers the child's class with TensorRT-LLM."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from puzzle_trtllm.errors import EngineError


def import_plugin(folder: Path) -> None:
    """Import the package in `folder` by its own name, as `trtllm-serve --custom_module_dirs` does.

    Its parent goes on sys.path (and stays: workers inherit it), so the folder must not be named like a real module.
    """
    if not (folder / "__init__.py").is_file():
        raise EngineError("missing", file=folder / "__init__.py", expected="the engine's plugin package")
    sys.path.insert(0, str(folder.parent))
    importlib.import_module(folder.name)
