"""derivation.json: how a child came from its parent, enough to repeat it and to prove it.

It records the kept expert indices of every layer. Without them the only way back is to match every child expert
against all parent experts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from puzzle_trtllm.architecture import ExpertsFormat
from puzzle_trtllm.errors import CheckpointError
from puzzle_trtllm.json_files import read_json_object
from puzzle_trtllm.yaml_files import as_model

DERIVATION_NAME = "derivation.json"


class ImportanceSource(BaseModel):
    """Where the scores came from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str
    metadata: dict[str, str]
    """The file's own: method, dataset fingerprint, parent fingerprint."""


class DerivationRecord(BaseModel):
    """derivation.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    tool_version: str
    parent_path: str
    parent_fingerprint: str
    child_fingerprint: str
    architecture_file: str
    block_configs: list[dict[str, int | None]]
    importance: ImportanceSource
    kept_experts: list[list[int]]
    """Per layer, indices in the parent, ascending; the child's expert j is the parent's `kept_experts[layer][j]`."""
    experts_format: ExpertsFormat | None = None
    """How the child stores its experts; None (records of older versions): as the parent does."""
    dropped_tensors: dict[str, str]
    """Whole tensors of the parent that the child lacks: name and reason."""
    warnings: list[str]

    def write(self, folder: Path) -> None:
        text = json.dumps(self.model_dump(mode="json"), indent=1)
        (folder / DERIVATION_NAME).write_text(text + "\n", encoding="utf-8")


def read_derivation(folder: Path) -> DerivationRecord:
    """Read a child's derivation.json. Raises CheckpointError when it is missing or damaged."""
    file = folder / DERIVATION_NAME
    if not file.is_file():
        raise CheckpointError("missing", file=file, expected="a child made by `puzzle-trtllm derive`")
    return as_model(read_json_object(file, CheckpointError), DerivationRecord, file, CheckpointError)
