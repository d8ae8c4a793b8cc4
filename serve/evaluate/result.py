"""What an evaluation leaves behind, per reasoning effort, down to each answer.

Accuracy is right answers / answered problems. An answer that ran out of tokens is graded like any other, and wrong
if it never came to its final channel; a request that failed says nothing about the model: it is left out of the
accuracy and counted apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from rich.table import Table
from typing_extensions import Self

from puzzle_trtllm.chat import REASONING_EFFORTS
from puzzle_trtllm.serve.bench.result import TokenCounts
from puzzle_trtllm.serve.metrics.provenance import Provenance
from puzzle_trtllm.serve.metrics.records import RequestCounts, RequestStatus
from puzzle_trtllm.serve.metrics.result_file import ResultFile
from puzzle_trtllm.serve.metrics.units import show_percent, show_percents


class GradedAnswer(BaseModel):
    """One problem's outcome."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    correct: bool
    final: str | None
    """The final answer; None when there was none."""
    num_output_tokens: int
    status: RequestStatus


class EffortResult(BaseModel):
    """All problems at one reasoning effort."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    accuracy: float = Field(ge=0, le=1)
    """Right answers / answered problems."""
    accuracy_low: float
    accuracy_high: float
    """Wilson's 95% interval of the accuracy."""
    num_problems: int
    num_correct: int
    requests: RequestCounts
    errors: dict[str, int]
    mean_output_tokens: float
    """Generated tokens / answered problems, truncated ones included."""
    measured_requests_per_s: float
    """Answered problems / wall time of this effort's run, edges included: depends on how many problems there are."""
    wall_s: float
    answers: list[GradedAnswer]


class Decoding(BaseModel):
    """How the next token was chosen; older files, which do not say, are greedy."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """0 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the first problem; each has the next."""

    @model_validator(mode="after")
    def _greedy_is_one_thing(self) -> Self:
        if self.temperature == 0 and (self.top_p, self.seed) != (1, 0):
            raise ValueError("temperature 0 is greedy: top_p and seed would change nothing")
        return self

    def __str__(self) -> str:
        if self.temperature == 0:
            return "greedy"
        return f"temperature {self.temperature:g}, top_p {self.top_p:g}, seed {self.seed}"

    def of_problem(self, index: int) -> dict[str, Any]:
        """A request's fields. Without `top_p` servers before TensorRT-LLM 1.2 take a temperature for greedy."""
        if self.temperature == 0:
            return {}
        return {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed + index}


GREEDY = Decoding()


class EvaluationResult(ResultFile):
    """One server on one problem set."""

    kind: Literal["evaluation"] = "evaluation"
    name: str
    url: str
    problems_file: str
    problems_fingerprint: str
    grader: str
    max_tokens: int
    decoding: Decoding = GREEDY
    concurrency: int
    token_counts: TokenCounts | None = None
    """tokenizer: a stock server tells no counts, so its text is encoded again; None in older files."""
    efforts: dict[str, EffortResult]
    provenance: Provenance
    """Of the run that wrote the file last."""
    earlier_provenance: dict[str, Provenance] = Field(default_factory=dict)
    """Effort -> the run that measured it, where that was an earlier one."""

    def going_on_from(self, earlier: EvaluationResult) -> EvaluationResult:
        """This evaluation with the efforts of an earlier run of it, and where those were measured."""
        runs = {effort: earlier.earlier_provenance.get(effort, earlier.provenance) for effort in earlier.efforts}
        facts = {"efforts": earlier.efforts, "token_counts": earlier.token_counts, "earlier_provenance": runs}
        return self.model_copy(update=facts)

    def with_effort(self, effort: str, measured: EffortResult, token_counts: TokenCounts) -> EvaluationResult:
        """This evaluation and one more effort."""
        return self.with_efforts({effort: measured}).model_copy(update={"token_counts": token_counts})

    def with_efforts(self, more: Mapping[str, EffortResult]) -> EvaluationResult:
        """This evaluation and more efforts, all in the order from low to high."""
        efforts = {**self.efforts, **more}
        ordered = {name: efforts[name] for name in REASONING_EFFORTS if name in efforts}
        return self.model_copy(update={"efforts": ordered})

    def __rich__(self) -> Table:
        caption = f"decoding: {self.decoding}"
        if self.token_counts == "tokenizer":
            caption += "\ntokens counted by the tokenizer: this server tells no counts"
        table = Table(
            title=f"{self.name}: accuracy by reasoning effort",
            caption=caption,
            title_justify="left",
            caption_justify="left",
        )
        for column in ("effort", "accuracy", "95% interval", "mean tokens", "done/s", "requests"):
            table.add_column(column, justify="left" if column in ("effort", "requests") else "right")
        for effort, result in self.efforts.items():
            table.add_row(
                effort,
                show_percent(result.accuracy),
                show_percents(result.accuracy_low, result.accuracy_high),
                f"{result.mean_output_tokens:.1f}",
                f"{result.measured_requests_per_s:.2f}",
                str(result.requests),
            )
        return table
