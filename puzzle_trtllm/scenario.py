"""A scenario: what a load looks like (lengths, and how requests arrive), so that two runs can be compared.

Two kinds of load, told apart by one key that excludes the other:

    concurrency     closed loop (`Scenario`): so many requests in flight; how much can a server do?
    request_rate    open loop (`OpenScenario`): so many arrivals a second, whatever the server does; how long do users
                    wait at this traffic?

Scenarios are YAML files, the shipped ones in `puzzle_trtllm/scenarios/`; a bare name is looked up there. `long` and
`short` are the paper's 64K/64K and 4K/4K, `isl*-osl*` NVIDIA's grid of input and output lengths; the `cpu-*` ones are
scaled-down twins for machines without a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from puzzle_trtllm.errors import ConfigError
from puzzle_trtllm.yaml_files import load_model, resolve_name

SCENARIO_FOLDER = Path(__file__).parent / "scenarios"

Arrival = Literal["poisson", "constant"]


class Load(BaseModel):
    """What both kinds of load have."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    description: str = ""
    input_tokens: int = Field(ge=1)
    """Prompt length, tokens."""
    output_tokens: int = Field(ge=1)
    """Generated tokens a request; the end-of-sequence token is ignored so that the length is exact."""
    num_requests: int = Field(ge=1)
    warmup_requests: int = Field(default=0, ge=0)
    max_ttft_ms: float | None = Field(default=None, gt=0)
    """Goodput counts requests whose first token comes within this; None sets no limit."""
    max_itl_ms: float | None = Field(default=None, gt=0)
    """Goodput counts requests whose mean gap between tokens (TPOT) is within this; None sets no limit."""

    @property
    def sequence_tokens(self) -> int:
        """Length of a finished sequence: what one request needs of the KV cache at its end."""
        return self.input_tokens + self.output_tokens


class Scenario(Load):
    """A closed-loop load: `concurrency` requests in flight until `num_requests` have ended."""

    concurrency: int = Field(ge=1)


class OpenScenario(Load):
    """An open-loop load: `num_requests` arrivals at `request_rate`, sent whether or not earlier ones have ended."""

    request_rate: float = Field(gt=0, allow_inf_nan=False)
    """Mean arrivals per second."""
    arrival: Arrival = "poisson"
    """poisson: exponential gaps, as from many independent users; constant: equal gaps."""


class _Peek(BaseModel):
    """The two keys that say which kind of load a file describes."""

    model_config = ConfigDict(extra="ignore")

    concurrency: Any = None
    request_rate: Any = None


def load_any_scenario(name_or_path: str | Path) -> Scenario | OpenScenario:
    """Load a shipped scenario by name or any YAML file by path, of either kind. Raises ConfigError."""
    file = resolve_name(name_or_path, SCENARIO_FOLDER, "scenario")
    keys = load_model(file, _Peek)
    if keys.request_rate is None:
        return load_model(file, Scenario)
    if keys.concurrency is not None:
        raise ConfigError("excludes concurrency: a loop is either open or closed", file=file, key="request_rate")
    return load_model(file, OpenScenario)


def load_scenario(name_or_path: str | Path) -> Scenario:
    """Load a closed-loop scenario. Raises ConfigError, also for an open loop: there is no concurrency to size for."""
    scenario = load_any_scenario(name_or_path)
    if isinstance(scenario, OpenScenario):
        raise ConfigError(
            "is an open loop, and a closed one is needed here",
            file=name_or_path,
            key="request_rate",
            found=scenario.request_rate,
            expected="concurrency",
        )
    return scenario
