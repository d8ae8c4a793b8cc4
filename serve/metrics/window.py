"""The steady window: the stretch of a run in which the load was really held.

A closed loop keeps `concurrency` requests in flight by sending the next one as soon as one ends. At its edges it does
not: at the start the requests go out one after another, and once nothing is left to send, every end leaves one fewer in
flight. Dividing all tokens by the whole run's time would mix that idle tail into the throughput, the more the fewer
requests there are. So

    start = the moment when `concurrency` requests are first in flight (the warm-up before it is a run of its own)
    end   = the first end of a request after the last one was sent: from there on the load cannot be held
    throughput = tokens that arrived in (start, end] / (end - start)

Tokens are counted by their own arrival, not by the request they belong to, so a request that straddles an edge counts
for the part inside. In flight means from the client's side: a request that waits in the server's queue is in flight.

An open loop has edges too: it begins with an idle server, and ends when nothing arrives any more. There

    start = the first end of a request that was answered (one that is refused at once tells nothing): until then the
            server is filling up
    end   = the last arrival

and latencies come from the requests that arrived in the window; those before it met a server that was filling up.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from puzzle_trtllm.errors import BenchError
from puzzle_trtllm.serve.metrics.records import RequestRecord

NANOSECONDS_PER_SECOND = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class SteadyWindow:
    """A half-open interval (start_ns, end_ns] of the client's monotonic clock."""

    start_ns: int
    end_ns: int

    @property
    def seconds(self) -> float:
        return (self.end_ns - self.start_ns) / NANOSECONDS_PER_SECOND

    def holds(self, time_ns: int) -> bool:
        """True when the moment lies inside."""
        return self.start_ns < time_ns <= self.end_ns

    def count_tokens(self, records: Sequence[RequestRecord]) -> int:
        """Tokens of answered requests that arrived inside."""
        return sum(
            bisect_right(record.token_times_ns, self.end_ns) - bisect_right(record.token_times_ns, self.start_ns)
            for record in records
            if record.is_answered
        )


def steady_window(records: Sequence[RequestRecord], *, concurrency: int) -> SteadyWindow:
    """Find the steady window of a run. Raises BenchError when the load was never held for any time."""
    start_ns = _concurrency_reached_ns(records, concurrency)
    last_sent_ns = max(record.sent_ns for record in records)
    # Strictly after: an end in the same instant is the one that let the last request in.
    ends_after_ns = [record.end_ns for record in records if record.end_ns > last_sent_ns]
    if not ends_after_ns:
        raise BenchError("the load was never held: requests end in the instant they are sent", key="concurrency")
    return SteadyWindow(start_ns=start_ns, end_ns=min(ends_after_ns))


def open_window(records: Sequence[RequestRecord]) -> SteadyWindow:
    """The window of an open-loop run, of which some request was answered.

    Raises BenchError when none was answered before the last one arrived.
    """
    start_ns = min(record.end_ns for record in records if record.is_answered)
    end_ns = max(record.sent_ns for record in records)
    if end_ns <= start_ns:
        raise BenchError(
            "too few for a steady window: the last one arrived before the first one was answered",
            key="num_requests",
            found=len(records),
            expected="more requests, or a lower request rate",
        )
    return SteadyWindow(start_ns=start_ns, end_ns=end_ns)


def _concurrency_reached_ns(records: Sequence[RequestRecord], concurrency: int) -> int:
    """When `concurrency` requests were first in flight; at equal times an end comes before the request it lets in."""
    events = sorted([(record.end_ns, -1) for record in records] + [(record.sent_ns, +1) for record in records])
    in_flight = most = 0
    for time_ns, change in events:
        in_flight += change
        most = max(most, in_flight)
        if in_flight >= concurrency:
            return time_ns
    raise BenchError(
        "never reached, so there is no steady window to measure in",
        key="concurrency",
        found=f"{most} requests in flight of {len(records)} sent",
        expected=concurrency,
    )
