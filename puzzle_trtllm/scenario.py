"""A scenario: what a load looks like (lengths, and how requests arrive), so that two runs can be compared.

Two kinds of load, told apart by one key that excludes the other:

    concurrency     closed loop (`Scenario`): so many requests in flight; how much can a server do?
    request_rate    open loop (`OpenScenario`): so many arrivals a second, whatever the server does; how long do users
                    wait at this traffic?

A third kind comes from a recorded trace alone (trace.py): `ReplayScenario`, an open loop at the trace's own moments.
Lengths are the same for all requests, scattered around a mean (`Spread`), or a trace's.

Scenarios are YAML files, the shipped ones in `puzzle_trtllm/scenarios/`; a bare name is looked up there. `long` and
`short` are the paper's 64K/64K and 4K/4K, `isl*-osl*` NVIDIA's grid of input and output lengths; the `cpu-*` ones are
scaled-down twins for machines without a GPU.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, field_validator, model_validator
from typing_extensions import Self

from puzzle_trtllm.errors import ConfigError
from puzzle_trtllm.yaml_files import load_model, resolve_name

SCENARIO_FOLDER = Path(__file__).parent / "scenarios"

Arrival = Literal["poisson", "constant"]

MAX_COUNT = 2**31 - 1
"""Requests say their lengths in 32 bits."""
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]


NORMAL_CUT = 3
"""A normal spread ends so many standard deviations above the mean: sequences need a longest one to be sized for."""


class Spread(BaseModel):
    """How lengths scatter around a mean; exactly one of the two."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    uniform: float | None = Field(default=None, gt=0, le=1)
    """Evenly from (1 - uniform) to (1 + uniform) times the mean."""
    normal: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Normally, with this standard deviation in tokens; drawn anew outside of mean +- 3 of them, and below 1."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.uniform is None) == (self.normal is None):
            raise ValueError("a spread is either uniform or normal")
        return self

    def bounds(self, mean: int) -> tuple[int, int]:
        """Shortest and longest length, tokens."""
        if self.uniform is not None:
            return max(1, round(mean * (1 - self.uniform))), round(mean * (1 + self.uniform))
        assert self.normal is not None
        return max(1, math.ceil(mean - NORMAL_CUT * self.normal)), math.floor(mean + NORMAL_CUT * self.normal)

    def draw(self, mean: int, source: random.Random) -> int:
        """One length, tokens."""
        low, high = self.bounds(mean)
        if self.normal is None:
            return source.randint(low, high)
        while not low <= (length := round(source.gauss(mean, self.normal))) <= high:
            pass
        return length


class TraceFacts(BaseModel):
    """Which trace a load was taken from. Two loads are the same only if this is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str
    """Its name without folders."""
    sha256: str
    longest_sequence: int
    """Most tokens in and out of one of the requests used."""
    shared_blocks: bool
    """True when equal hash_ids gave equal prompt blocks, which a prefix cache can reuse."""
    ignored_keys: tuple[str, ...] = ()
    """What the trace says beyond what is replayed."""


class Load(BaseModel):
    """What all kinds of load have."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    description: str = ""
    input_tokens: Count
    """Prompt length, tokens; the mean where lengths scatter or come from a trace."""
    output_tokens: Count
    """Generated tokens a request, likewise; the end-of-sequence token is ignored so that the length is exact."""
    input_spread: Spread | None = None
    output_spread: Spread | None = None
    num_requests: Count
    warmup_requests: int = Field(default=0, ge=0, le=MAX_COUNT)
    max_ttft_ms: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Goodput counts requests whose first token comes within this; None sets no limit."""
    max_tpot_ms: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, validation_alias=AliasChoices("max_tpot_ms", "max_itl_ms")
    )
    """Goodput counts requests whose mean gap between tokens (TPOT) is within this; None sets no limit.

    `max_itl_ms` in older files, which never was a limit on a single gap (ITL).
    """

    @field_validator("name")
    @classmethod
    def _one_line(cls, name: str) -> str:
        """It stands in comments of shell scripts."""
        if not name.isprintable():
            raise ValueError("must be one line of printable text")
        return name

    trace: TraceFacts | None = None
    """Set by `bench --trace`, never in a file."""

    @property
    def sequence_tokens(self) -> int:
        """Length of the longest finished sequence: what one request may need of the KV cache at its end."""
        return self.trace.longest_sequence if self.trace is not None else sum(self._longest)

    @property
    def longest_input(self) -> int:
        """Tokens of the longest prompt that a file's scenario has."""
        return self._longest[0]

    @property
    def longest_sequence(self) -> str:
        """What `sequence_tokens` is made of, in words."""
        return "the trace's longest request" if self.trace is not None else "{} in + {} out".format(*self._longest)

    @property
    def _longest(self) -> tuple[int, int]:
        """Tokens in and out, each at most."""
        ways = ((self.input_tokens, self.input_spread), (self.output_tokens, self.output_spread))
        longest_input, longest_output = (spread.bounds(mean)[1] if spread else mean for mean, spread in ways)
        return longest_input, longest_output


class Scenario(Load):
    """A closed-loop load: `concurrency` requests in flight until `num_requests` have ended."""

    concurrency: Count


class OpenScenario(Load):
    """An open-loop load: `num_requests` arrivals at `request_rate`, sent whether or not earlier ones have ended."""

    request_rate: float = Field(gt=0, allow_inf_nan=False)
    """Mean arrivals per second."""
    arrival: Arrival = "poisson"
    """poisson: exponential gaps, as from many independent users; constant: equal gaps."""


class ReplayScenario(Load):
    """An open-loop load at the moments that a trace recorded."""

    speed: float = Field(gt=0, allow_inf_nan=False)
    """2 replays two seconds of the trace in one."""


class _Peek(BaseModel):
    """The keys that say which kind of load a file describes."""

    model_config = ConfigDict(extra="ignore")

    concurrency: Any = None
    request_rate: Any = None
    trace: Any = None


def load_any_scenario(name_or_path: str | Path) -> Scenario | OpenScenario:
    """Load a shipped scenario by name or any YAML file by path, of either kind. Raises ConfigError."""
    file = resolve_name(name_or_path, SCENARIO_FOLDER, "scenario")
    keys = load_model(file, _Peek)
    if keys.trace is not None:
        raise ConfigError("is no key of a file", file=file, key="trace", expected="bench --trace FILE")
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
