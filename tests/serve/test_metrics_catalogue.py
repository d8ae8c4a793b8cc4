"""Every metric against a run small enough to compute by hand."""

from __future__ import annotations

import pytest

from puzzle_trtllm.errors import BenchError
from puzzle_trtllm.serve.metrics import catalogue
from puzzle_trtllm.serve.metrics.catalogue import LatencyLimits, MeasuredLoad, compute_metrics
from puzzle_trtllm.serve.metrics.records import RequestCounts, RequestRecord

MS = 1_000_000


def request(sent, end, tokens=(), status="completed", error=None):
    """A request with its times in milliseconds."""
    times = tuple(int(t * MS) for t in tokens)
    return RequestRecord(sent_ns=sent * MS, end_ns=end * MS, status=status, token_times_ns=times, error=error)


# Concurrency 2. Window: both in flight at 0; the last request is sent at 400; the next end is B's at 500: (0, 500] ms.
A = request(0, 400, [100, 200, 400])  # TTFT 100, gaps 100 and 200, TPOT 150, E2E 400
B = request(0, 500, [100, 300, 300, 500])  # TTFT 100, gaps 200/2 twice and 200, TPOT 400/3, E2E 500
C = request(400, 1000, [600, 1000], status="truncated")  # TTFT 200, gap 400, TPOT 400, E2E 600
LOAD = MeasuredLoad.of([A, B, C], concurrency=2, num_gpus=2)


def test_scalars():
    values = compute_metrics(LOAD).scalars
    # All 7 tokens of A and B arrive by 500 ms, none of C's: 7 tokens / 0.5 s. Mean tokens (3 + 4 + 2) / 3 = 3.
    assert values["output_tokens_per_s"] == pytest.approx(14.0)
    assert values["output_tokens_per_s_per_gpu"] == pytest.approx(7.0)
    # The whole run, as other tools count: all 9 tokens, from 0 to C's end at 1 s, though C was alone for half of it.
    assert values["run_output_tokens_per_s"] == pytest.approx(9.0)
    assert values["mean_output_tokens"] == pytest.approx(3.0)
    assert values["requests_per_s"] == pytest.approx(14 / 3)


def test_latencies():
    values = compute_metrics(LOAD).distributions
    assert (values["ttft_ms"].count, values["ttft_ms"].mean, values["ttft_ms"].p50) == (3, pytest.approx(400 / 3), 100)
    # Sorted gaps: 100 100 100 200 200 400. Median (100 + 200) / 2; p90 at rank 4.5: 200 + 0.5 * 200.
    itl = values["itl_ms"]
    assert (itl.count, itl.p50, itl.p90, itl.max) == (6, pytest.approx(150), pytest.approx(300), 400)
    assert values["tpot_ms"].mean == pytest.approx((150 + 400 / 3 + 400) / 3)
    # 1000 / 150, 3000 / 400 and 1000 / 400 tokens a second.
    per_user = values["tokens_per_s_per_user"]
    assert (per_user.min, per_user.p50, per_user.max) == pytest.approx((2.5, 1000 / 150, 7.5))
    assert (values["e2e_ms"].min, values["e2e_ms"].p50, values["e2e_ms"].max) == (400, 500, 600)


def test_tokens_of_one_response_share_its_gap():
    # Responses of 2, 3 and 1 tokens at 100, 400 and 600: no gap inside the first, then 300/3 three times, then 200.
    run = MeasuredLoad.of([request(0, 600, [100, 100, 400, 400, 400, 600])], concurrency=1)
    gaps = list(catalogue._itl_ms(run.records[0]))
    assert gaps == pytest.approx([100, 100, 100, 200])


@pytest.mark.parametrize(
    ("ttft", "itl", "good"),
    [
        (None, 150, 2),  # A's TPOT is 150, B's 133.3; C is truncated
        (None, 140, 1),
        (100, None, 2),  # at the limit is within it
        (99, None, 0),
        (100, 140, 1),
        (1000, 1000, 2),  # C would be within, but was cut
    ],
)
def test_goodput_is_the_share_of_requests_within_all_limits(ttft, itl, good):
    limits = LatencyLimits(max_ttft_ms=ttft, max_tpot_ms=itl)
    values = compute_metrics(MeasuredLoad.of([A, B, C], concurrency=2, limits=limits)).scalars
    assert values["goodput_fraction"] == pytest.approx(good / 3)
    assert values["goodput_requests_per_s"] == pytest.approx(14 / 3 * good / 3)


def test_a_request_that_failed_is_one_whose_user_was_not_served():
    # Of A, B, C and a refusal A and B are good: half of the requests, and of the answered ones' rate two thirds.
    refused = request(0, 1, status="failed", error="UNAVAILABLE: the queue is full")
    limits = LatencyLimits(max_ttft_ms=1000)
    values = compute_metrics(MeasuredLoad.of([A, B, C, refused], concurrency=2, limits=limits)).scalars
    assert values["goodput_fraction"] == 0.5
    assert values["goodput_requests_per_s"] == pytest.approx(values["requests_per_s"] * 2 / 3)


def test_one_token_has_no_gap_to_be_too_long():
    one = MeasuredLoad.of([request(0, 400, [300])], concurrency=1, limits=LatencyLimits(max_tpot_ms=1))
    assert catalogue.GOODPUT_FRACTION.of(one) == 1.0


def test_tokens_that_all_came_at_once_tell_no_gap():
    # Behind a client or server that lagged a whole answer is one response: its TPOT is unknown, not 0.
    at_once = request(0, 400, [300, 300, 300])
    run = MeasuredLoad.of([at_once, A], concurrency=2, limits=LatencyLimits(max_tpot_ms=1))
    tpot = catalogue.TPOT_MS.of(run)
    assert (tpot.count, tpot.min) == (1, 150)
    assert catalogue.GOODPUT_FRACTION.of(run) == 0.5  # no gap to be too long, as with one token; A's are


def test_the_counts_tell_the_ways_of_ending_apart():
    broken = request(0, 500, [100], status="failed", error="UNAVAILABLE")
    gone = request(0, 500, status="cancelled", error="CANCELLED")
    counts = RequestCounts.of([A, B, C, broken, gone])
    assert (counts.completed, counts.truncated, counts.failed, counts.cancelled) == (2, 1, 1, 1)
    assert (counts.answered, counts.total) == (3, 5)
    assert str(counts) == "2 completed, 1 truncated, 1 failed, 1 cancelled"
    assert (RequestCounts().total, str(RequestCounts()), str(RequestCounts(failed=2))) == (0, "none", "2 failed")


def test_failed_requests_give_no_latency():
    broken = request(0, 500, [1], status="failed", error="UNAVAILABLE")
    assert compute_metrics(MeasuredLoad.of([A, broken, C], concurrency=2)).distributions["ttft_ms"].count == 2


def test_what_cannot_be_computed_is_absent_with_its_reason_and_never_zero():
    # One token a request on a CPU: no gap, no decode time, no GPU to divide by.
    values = compute_metrics(MeasuredLoad.of([request(0, 400, [300]), request(0, 400, [300])], concurrency=2))
    assert values.absent == {
        "output_tokens_per_s_per_gpu": "the server's number of GPUs is 0 or unknown",
        "goodput_fraction": "the load sets no latency limit",
        "goodput_requests_per_s": "the load sets no latency limit",
        "itl_ms": "no request streamed two responses",
        "tpot_ms": "no request streamed two responses",
        "tokens_per_s_per_user": "no request streamed two responses",
    }
    assert not set(values.absent) & (set(values.scalars) | set(values.distributions))
    with pytest.raises(BenchError, match="itl_ms: cannot be computed: no request streamed two responses"):
        catalogue.ITL_MS.of(MeasuredLoad.of([request(0, 400, [300])], concurrency=1))


def test_a_window_in_which_no_token_arrived_is_an_error_and_no_rate_of_zero():
    # Both in flight at 100; the first end after the last was sent is a failure's at 200, before any token.
    run = [request(0, 900, [800, 900]), request(100, 200, status="failed"), request(100, 950, [950])]
    with pytest.raises(BenchError, match="output_tokens_per_s: cannot be computed: no token arrived in the steady"):
        compute_metrics(MeasuredLoad.of(run, concurrency=2))


def test_zero_successful_requests_are_an_error_with_the_first_reason():
    broken = [request(0, 1, status="failed", error="UNAVAILABLE: queue is full") for _ in range(3)]
    with pytest.raises(BenchError, match=r"zero successful requests \(3 failed\); the first says: UNAVAILABLE: queue"):
        MeasuredLoad.of(broken, concurrency=2)


def test_every_metric_names_itself_once():
    assert all(tag == metric.tag and metric.unit and metric.formula for tag, metric in catalogue.METRICS.items())
    assert len(catalogue.METRICS) == len(catalogue.SCALARS) + len(catalogue.DISTRIBUTIONS)


def test_a_record_that_cannot_be_is_refused():
    for times in ((5, 1), (0, 9, [7, 6]), (5, 9, [4]), (0, 5, [6])):
        with pytest.raises(ValueError, match="must ascend"):
            request(*times)
    with pytest.raises(ValueError, match="must have tokens"):
        request(0, 1)
