"""What an evaluation leaves behind, per reasoning effort, down to each answer.

Accuracy is right answers / answered problems. An answer that ran out of tokens is graded like any other, and wrong
if it never came to its final channel; a request that failed says nothing about the model: it is left out of the
accuracy and counted apart.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from rich.table import Table

from puzzle_trtllm.chat import REASONING_EFFORTS
from puzzle_trtllm.serve.bench.result import TokenCounts
from puzzle_trtllm.serve.metrics.provenance import Provenance
from puzzle_trtllm.serve.metrics.records import RequestCounts, RequestStatus
from puzzle_trtllm.serve.metrics.result_file import ResultFile


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


class EvaluationResult(ResultFile):
    """One server on one problem set."""

    kind: Literal["evaluation"] = "evaluation"
    name: str
    url: str
    problems_file: str
    problems_fingerprint: str
    grader: str
    max_tokens: int
    concurrency: int
    token_counts: TokenCounts | None = None
    """tokenizer: a stock server tells no counts, so its text is encoded again; None in older files."""
    efforts: dict[str, EffortResult]
    provenance: Provenance

    def with_effort(self, effort: str, measured: EffortResult, token_counts: TokenCounts) -> EvaluationResult:
        """This evaluation and one more effort, all in the order from low to high."""
        efforts = {**self.efforts, effort: measured}
        ordered = {name: efforts[name] for name in REASONING_EFFORTS if name in efforts}
        return self.model_copy(update={"efforts": ordered, "token_counts": token_counts})

    def __rich__(self) -> Table:
        counted = "tokens counted by the tokenizer: this server tells no counts"
        table = Table(
            title=f"{self.name}: accuracy by reasoning effort",
            caption=counted if self.token_counts == "tokenizer" else None,
            title_justify="left",
            caption_justify="left",
        )
        for column in ("effort", "accuracy", "95% interval", "mean tokens", "done/s", "requests"):
            table.add_column(column, justify="left" if column in ("effort", "requests") else "right")
        for effort, result in self.efforts.items():
            table.add_row(
                effort,
                f"{result.accuracy:.1%}",
                f"{result.accuracy_low:.0%} to {result.accuracy_high:.0%}",
                f"{result.mean_output_tokens:.1f}",
                f"{result.measured_requests_per_s:.2f}",
                str(result.requests),
            )
        return table
