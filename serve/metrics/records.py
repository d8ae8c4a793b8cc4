"""One request as its client saw it: the only input of every metric.

All times are nanoseconds of one monotonic clock, the client's. A request ends in one of four ways, and they are counted
apart because each means something else:

    completed    answered as asked
    truncated    answered, but cut: fewer tokens than the load asked for (bench), or out of tokens before the model had
                 finished (evaluation)
    failed       the server refused it or broke off
    cancelled    ended early on somebody's request

Tokens and latencies come from answered requests (completed and truncated); what a failed request had streamed until it
broke counts for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Literal

RequestStatus = Literal["completed", "truncated", "failed", "cancelled"]


@dataclass(frozen=True, kw_only=True)
class RequestRecord:
    """One request. Raises ValueError when an answered one lacks its tokens' times."""

    sent_ns: int
    end_ns: int
    status: RequestStatus
    token_times_ns: tuple[int, ...] = ()
    """Arrival of each generated token, ascending; tokens that came in one response share its time."""
    error: str | None = None
    """Why it failed or was cancelled."""

    def __post_init__(self) -> None:
        times = (self.sent_ns, *self.token_times_ns, self.end_ns)
        if any(later < earlier for earlier, later in pairwise(times)):
            raise ValueError("a request's times must ascend: sent, tokens, end")
        if self.is_answered and not self.token_times_ns:
            raise ValueError(f"a {self.status} request must have tokens")

    @property
    def is_answered(self) -> bool:
        """True when its tokens and latencies count."""
        return self.status in ("completed", "truncated")

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_times_ns)

    @property
    def first_token_ns(self) -> int:
        """Arrival of the first token; answered requests only."""
        return self.token_times_ns[0]


@dataclass(frozen=True, kw_only=True)
class RequestCounts:
    """How many requests ended in which way."""

    completed: int = 0
    truncated: int = 0
    failed: int = 0
    cancelled: int = 0

    @classmethod
    def of(cls, records: Iterable[RequestRecord]) -> RequestCounts:
        statuses = [record.status for record in records]
        return cls(**{status: statuses.count(status) for status in ("completed", "truncated", "failed", "cancelled")})

    @property
    def answered(self) -> int:
        return self.completed + self.truncated

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def __str__(self) -> str:
        """`60 completed, 4 failed`: what happened, without what did not."""
        return ", ".join(f"{count} {status}" for status, count in asdict(self).items() if count) or "none"
