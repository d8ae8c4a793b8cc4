"""A scenario: what a load looks like (input length, output length, concurrency), so that two runs can be compared.

Scenarios are YAML files, the shipped ones in `puzzle_trtllm/scenarios/`; a bare name is looked up there. `long` and
`short` are the paper's 64K/64K and 4K/4K; the `cpu-*` ones are scaled-down twins for machines without a GPU.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from puzzle_trtllm.yaml_files import load_model, resolve_name

SCENARIO_FOLDER = Path(__file__).parent / "scenarios"


class Scenario(BaseModel):
    """A closed-loop load: `concurrency` requests in flight until `num_requests` have ended."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    description: str = ""
    input_tokens: int = Field(ge=1)
    """Prompt length, tokens."""
    output_tokens: int = Field(ge=1)
    """Generated tokens a request; the end-of-sequence token is ignored so that the length is exact."""
    concurrency: int = Field(ge=1)
    num_requests: int = Field(ge=1)
    warmup_requests: int = Field(default=0, ge=0)

    @property
    def sequence_tokens(self) -> int:
        """Length of a finished sequence: what one request needs of the KV cache at its end."""
        return self.input_tokens + self.output_tokens


def load_scenario(name_or_path: str | Path) -> Scenario:
    """Load a shipped scenario by name or any YAML file by path. Raises ConfigError."""
    return load_model(resolve_name(name_or_path, SCENARIO_FOLDER, "scenario"), Scenario)
