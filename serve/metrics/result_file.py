"""Result files: JSON written whole, read back strictly.

Every result says in `kind` what it is and in `schema_version` how it is laid out, so that a file given in the wrong
place is an error that names both. Unknown keys are errors: a result is evidence, and a field that a reader silently
drops may be the one that made two results incomparable.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from typing_extensions import Self

from puzzle_trtllm.errors import ConfigError
from puzzle_trtllm.folders import write_atomically
from puzzle_trtllm.json_files import read_json_object
from puzzle_trtllm.yaml_files import first_problem


class ResultFile(BaseModel):
    """A result that is saved as one JSON object; subclasses narrow `kind` to their own name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    schema_version: Literal[1] = 1

    def save(self, path: str | Path) -> Path:
        """Write the result to `path`, whole or not at all. Raises PuzzleError when it cannot be written."""
        write_atomically(Path(path), self.model_dump_json(indent=2) + "\n")
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a result. Raises ConfigError in one line for a file that is none, or one of another kind."""
        file = Path(path)
        content = read_json_object(file, ConfigError)
        expected = cls.model_fields["kind"].default
        if content.get("kind") != expected:
            raise ConfigError(
                "another kind of file", file=file, key="kind", found=content.get("kind"), expected=expected
            )
        try:
            # Strictly, as JSON: text that looks like a number ("NaN") is none.
            return cls.model_validate_json(json.dumps(content), strict=True)
        except ValidationError as error:
            raise first_problem(error, file, ConfigError) from None
