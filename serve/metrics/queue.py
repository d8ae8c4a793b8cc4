"""What an open loop offered, what the server achieved, and whether its queue grew without bound.

Above a server's capacity an open loop measures nothing but its own length: the queue grows for as long as requests
arrive, and every latency with it. So its result must say so. Over the steady window (start, end]:

    offered  = requests that arrived in the window / its seconds
    achieved = requests that were answered in the window / its seconds
    grew     = the mean number in flight rises from each third of the window to the next, and over the last third it
               exceeds the first third's by more than 3 x sqrt(smaller of the first third's and the window's arrivals)

In a stable queue the number in flight wanders by about its square root (exactly so for Poisson arrivals and as many
servers as needed), and in a short window by no more than the root of what arrived, hence the second condition: a flood
that had piled up before its first answer must not hide behind its own size. The trap: a short run cannot tell a slight
overload from chance. Simulated (8 servers, constant service, Poisson arrivals, 200 runs): at 110% of capacity it shows
in 28%, 75% and 97% of runs of 100, 300 and 1,000 requests; at 80% of capacity 2% of runs or fewer are told so falsely,
at 95% about a tenth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from puzzle_trtllm.serve.metrics.records import RequestRecord
from puzzle_trtllm.serve.metrics.window import SteadyWindow

GROWTH_SIGMAS = 3.0


@dataclass(frozen=True, kw_only=True)
class OfferedLoad:
    """Arrivals against answers of one open-loop run."""

    offered_requests_per_s: float
    achieved_requests_per_s: float
    mean_in_flight_by_third: tuple[float, float, float]
    """Requests in flight from the client's side, averaged over time, in each third of the window."""
    queue_grew: bool
    max_send_delay_ms: float
    """How late the client itself ever was; latencies count from the scheduled arrival, so this is part of them."""

    @classmethod
    def of(cls, records: Sequence[RequestRecord], window: SteadyWindow, *, max_send_delay_ms: float) -> OfferedLoad:
        arrived = sum(window.holds(record.sent_ns) for record in records)
        answered = sum(record.is_answered and window.holds(record.end_ns) for record in records)
        cuts = [window.start_ns + (window.end_ns - window.start_ns) * part // 3 for part in range(4)]
        first, second, third = (mean_in_flight(records, *cuts[part : part + 2]) for part in range(3))
        return cls(
            offered_requests_per_s=arrived / window.seconds,
            achieved_requests_per_s=answered / window.seconds,
            mean_in_flight_by_third=(first, second, third),
            queue_grew=first < second < third and third - first > GROWTH_SIGMAS * math.sqrt(min(first, arrived)),
            max_send_delay_ms=max_send_delay_ms,
        )


def mean_in_flight(records: Sequence[RequestRecord], start_ns: int, end_ns: int) -> float:
    """Requests in flight, averaged over [start_ns, end_ns] by time; 0 for an interval of no length."""
    inside = sum(max(0, min(record.end_ns, end_ns) - max(record.sent_ns, start_ns)) for record in records)
    return inside / (end_ns - start_ns) if end_ns > start_ns else 0.0
