"""One row a request, for whoever would compute metrics in another way.

TTFT, TPOT, end-to-end latency and the whole run's throughput can be had from it. ITL and the steady window's tokens
cannot: they need the time of every token.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from puzzle_trtllm.folders import write_atomically
from puzzle_trtllm.serve.bench.load import Answer
from puzzle_trtllm.serve.metrics.window import NANOSECONDS_PER_SECOND

COLUMNS = (
    "request",
    "status",
    "input_tokens",
    "output_tokens",
    "sent_s",
    "first_token_s",
    "last_token_s",
    "end_s",
    "error",
)
"""Times are seconds after the first request was sent; the tokens of a failed request are those that had come."""


def save_requests_csv(answers: Sequence[Answer], path: str | Path) -> Path:
    """Write a row for each of `answers`, in the order of the load. Raises PuzzleError when it cannot be written."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    began_ns = min(answer.record.sent_ns for answer in answers)
    writer.writerows(_row(index, answer, began_ns) for index, answer in enumerate(answers))
    write_atomically(Path(path), text.getvalue())
    return Path(path)


def _row(index: int, answer: Answer, began_ns: int) -> dict[str, object]:
    request, record = answer.request, answer.record
    times = {"sent_s": record.sent_ns, "end_s": record.end_ns}
    if record.token_times_ns:
        times |= {"first_token_s": record.token_times_ns[0], "last_token_s": record.token_times_ns[-1]}
    return {
        "request": index,
        "status": record.status,
        "input_tokens": None if request.input_ids is None else len(request.input_ids),
        "output_tokens": record.num_output_tokens,
        "error": record.error,
        **{column: f"{(time_ns - began_ns) / NANOSECONDS_PER_SECOND:.6f}" for column, time_ns in times.items()},
    }
