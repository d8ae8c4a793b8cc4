"""Everything a report needs to know of one engine: what it is, what it was given, and what it did.

One such file per engine is what `report --baseline NAME=FILE --child FILE` reads; the engines need not have been
measured by one process, but by one scenario, which is part of the file so that it can be checked.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import Self

from puzzle_trtllm.architecture import KvDtype
from puzzle_trtllm.scenario import Scenario
from puzzle_trtllm.serve.bench.result import Lengths, TokenCounts, Turn
from puzzle_trtllm.serve.evaluate.result import GREEDY, Decoding
from puzzle_trtllm.serve.metrics.provenance import Provenance
from puzzle_trtllm.serve.metrics.records import RequestCounts
from puzzle_trtllm.serve.metrics.result_file import ResultFile
from puzzle_trtllm.serve.metrics.statistics import Distribution, Spread


class LayerBlock(BaseModel):
    """One layer, as in block_configs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_local_experts: int = Field(ge=1)
    sliding_window: int | None = Field(ge=1)


class EffortMeasurement(BaseModel):
    """One reasoning effort, as evaluated."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    accuracy: float = Field(ge=0, le=1)
    accuracy_low: float
    accuracy_high: float
    """Wilson's 95% interval."""
    mean_output_tokens: float = Field(gt=0)
    measured_requests_per_s: float
    requests: RequestCounts
    outcomes: dict[str, tuple[bool, int]] = Field(default_factory=dict)
    """Id of every answered problem -> (right, generated tokens): what intervals are resampled from."""


class EvaluationFacts(BaseModel):
    """What must be equal for two accuracies to be comparable."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    problems_file: str
    problems_fingerprint: str
    grader: str
    max_tokens: int
    decoding: Decoding = GREEDY


class EngineMeasurement(ResultFile):
    """One engine, measured under one scenario and, if an evaluation was made, at several reasoning efforts."""

    kind: Literal["engine_measurement"] = "engine_measurement"
    name: str = Field(min_length=1)
    runtime: str
    kv_dtype: KvDtype
    kv_fold: str
    """How calibrated KV scales reached the engine: tensor, channel or none."""
    blocks: list[LayerBlock]
    weight_bytes: int = Field(ge=1)
    memory_bytes: int | None
    """What the engine was given for weights and KV cache, on each of its GPUs; None without a cap."""
    num_ranks: int = Field(default=1, ge=1)
    """GPUs that share the engine, or processes of the reference runtime."""
    num_instances: int = Field(default=1, ge=1)
    """Such engines in the server that was measured."""
    kv_bytes_per_sequence: int = Field(ge=1)
    """KV bytes of a sequence of `kv_sequence_tokens`, windows honoured, no block rounding."""
    kv_sequence_tokens: int = Field(ge=1)
    scenario: Scenario
    output_tokens_per_s: Spread
    turns: list[Turn] | None = None
    """Whose turn each of these rounds was; None when they were not measured in turn with other engines'."""
    repeats_prompts: bool = False
    """Rounds had the same prompts, and the engine reuses prefixes: its cache may have answered the later ones."""
    mixed_rounds: list[str] = Field(default_factory=list)
    """Machines, and packages with their versions, of which its rounds had several."""
    uncapped_output_tokens_per_s: Spread | None = None
    """The same engine without the memory cap, if it was measured."""
    latencies: dict[str, Distribution] = Field(default_factory=dict)
    """Tag -> distribution of the median round."""
    requests: RequestCounts
    """Of all rounds together."""
    busiest_client_cpu: float | None = None
    """Share of a core that the busiest process of the load generator used, in any round; None in older files."""
    lengths: Lengths
    token_counts: TokenCounts
    evaluation: EvaluationFacts | None = None
    efforts: dict[str, EffortMeasurement] = Field(default_factory=dict)
    provenance: Provenance

    @model_validator(mode="after")
    def _one_turn_a_round(self) -> Self:
        if self.turns is not None and len(self.turns) != len(self.output_tokens_per_s.rounds):
            raise ValueError(f"{len(self.turns)} turns of {len(self.output_tokens_per_s.rounds)} rounds")
        return self

    def was_measured_in_turn_with(self, other: EngineMeasurement) -> bool:
        """Whether round i of both saw the same machine, for every i."""
        return self.turns is not None and self.turns == other.turns

    def requests_per_s(self, effort: str) -> float:
        """Request-level efficiency: the median throughput / the mean tokens a request takes at this effort."""
        return self.output_tokens_per_s.median / self.efforts[effort].mean_output_tokens

    @property
    def total_ranks(self) -> int:
        """GPUs (or processes of the reference runtime) behind the throughput."""
        return self.num_ranks * self.num_instances

    @property
    def sequences_held(self) -> int | None:
        """Finished-length sequences that the memory holds beside the weights, packed ideally.

        None without a cap, and where several ranks hold parts of the weights and of a sequence.
        """
        if self.memory_bytes is None or self.num_ranks > 1:
            return None
        return max(0, self.memory_bytes - self.weight_bytes) // self.kv_bytes_per_sequence
