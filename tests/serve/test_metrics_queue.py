"""Open loops drawn by hand: their window, their rates, and whether the queue grew (times in seconds)."""

from __future__ import annotations

import pytest

from puzzle_trtllm.errors import BenchError
from puzzle_trtllm.serve.metrics.catalogue import MeasuredLoad, compute_metrics
from puzzle_trtllm.serve.metrics.queue import OfferedLoad, mean_in_flight
from puzzle_trtllm.serve.metrics.records import RequestRecord
from puzzle_trtllm.serve.metrics.window import open_window

S = 1_000_000_000


def request(sent, end, status="completed"):
    """One token, at the end."""
    tokens = (int(end * S),) if status == "completed" else ()
    return RequestRecord(sent_ns=int(sent * S), end_ns=int(end * S), status=status, token_times_ns=tokens)


def offered(records):
    return OfferedLoad.of(records, open_window(records), max_send_delay_ms=0.0)


# One arrival a second, 2 s each: ends at 2, 3, ..., 12. Window: (2, 10].
STEADY = [request(i, i + 2) for i in range(11)]


def test_the_window_lasts_from_the_first_end_to_the_last_arrival():
    window = open_window(STEADY)
    assert (window.start_ns, window.end_ns) == (2 * S, 10 * S)


def test_a_request_that_is_refused_at_once_does_not_open_the_window():
    # Otherwise it would be (0.1, 10], and hold the time in which the server was still filling up.
    assert open_window([request(0, 0.1, "failed"), *STEADY]) == open_window(STEADY)


def test_rates_are_counted_in_the_window():
    # Arrivals 3..10 and ends 3..10 lie inside, 8 each in 8 s.
    load = offered(STEADY)
    assert (load.offered_requests_per_s, load.achieved_requests_per_s) == (1.0, 1.0)
    assert load.mean_in_flight_by_third == pytest.approx((2, 2, 2))
    assert not load.queue_grew


def test_in_flight_is_averaged_by_time():
    # [0, 4]: one for 4 s and one for 1 s.
    assert mean_in_flight([request(0, 9), request(3, 9)], 0, 4 * S) == pytest.approx(5 / 4)
    assert mean_in_flight([request(0, 9)], 4 * S, 4 * S) == 0.0


def test_a_server_half_as_fast_as_the_arrivals_is_told():
    # 10 arrivals a second, 5 answers a second, first come first served.
    load = offered([request(i / 10, (i + 1) / 5) for i in range(100)])
    assert load.queue_grew
    assert load.achieved_requests_per_s == pytest.approx(load.offered_requests_per_s / 2, rel=0.05)


def test_a_flood_that_piled_up_before_the_first_answer_is_told():
    # 2,000 arrivals a second for 0.15 s; 300 answers a second from 0.12 s on. Over 200 wait when the window begins, so
    # 3 x sqrt of those, 43, would hide a rise of some 33; 59 arrive in the window, and 3 x sqrt(59) is 23.
    load = offered([request(i / 2000, 0.12 + i / 300) for i in range(300)])
    assert load.mean_in_flight_by_third[0] > 200
    assert load.queue_grew


def test_a_burst_that_drains_is_no_growing_queue():
    burst = [request(5, 6 + i / 10) for i in range(8)]
    assert not offered([*(request(i, i + 0.5) for i in range(30)), *burst]).queue_grew


def in_flight_by_thirds(*levels):
    """9 s: a window (0, 9] that so many long requests are in flight in over each third, and an arrival at its end."""
    stays = [request(3 * third, 3 * third + 3) for third, level in enumerate(levels) for _ in range(level)]
    return [request(-1, 0), *stays, request(9, 10)]


@pytest.mark.parametrize(
    ("levels", "grew"),
    [
        ((4, 8, 12), True),
        ((4, 5, 6), False),  # chance: not by 3 x sqrt(4)
        ((4, 2, 12), False),  # a burst at the end, and no growth from each third to the next
        ((4, 14, 12), False),
        ((12, 8, 4), False),
    ],
)
def test_a_queue_grows_from_each_third_to_the_next_and_by_more_than_chance(levels, grew):
    load = offered(in_flight_by_thirds(*levels))
    assert load.mean_in_flight_by_third == pytest.approx(levels)
    assert load.queue_grew is grew


def test_failed_requests_are_offered_but_not_achieved():
    failed = [request(i, i + 2, "failed") if i % 2 else request(i, i + 2) for i in range(11)]
    load = offered(failed)
    # Of the ends at 3..10, those of the even arrivals 2, 4, 6, 8 are answers.
    assert (load.offered_requests_per_s, load.achieved_requests_per_s) == (1.0, 0.5)


def test_latencies_come_from_the_arrivals_in_the_window():
    slow_start = [request(0, 2), request(0.5, 9.5), *STEADY[3:]]
    values = compute_metrics(MeasuredLoad.of_open_loop(slow_start))
    # 0 and 0.5 arrived before the first end at 2, 3..10 after it: all of those took 2 s.
    assert (values.distributions["e2e_ms"].count, values.distributions["e2e_ms"].max) == (8, 2000)


def test_an_open_loop_on_unknown_gpus_has_no_figure_per_gpu():
    values = compute_metrics(MeasuredLoad.of_open_loop(STEADY))
    assert "output_tokens_per_s_per_gpu" in values.absent
    assert compute_metrics(MeasuredLoad.of_open_loop(STEADY, num_gpus=2)).scalars[
        "output_tokens_per_s_per_gpu"
    ] == pytest.approx(values.scalars["output_tokens_per_s"] / 2)


def test_an_open_loop_without_an_answer_to_an_arrival_in_the_window_is_an_error():
    failed = [request(i, i + 2, "failed") for i in range(3, 11)]
    with pytest.raises(BenchError, match="no request that arrived in the steady window was answered"):
        MeasuredLoad.of_open_loop([request(0, 2), request(1, 3), *failed])


def test_a_run_that_is_over_before_anything_ended_has_no_window():
    with pytest.raises(BenchError, match=r"num_requests: too few for a steady window.*found 3"):
        open_window([request(i, 10) for i in range(3)])
    with pytest.raises(BenchError, match="too few for a steady window"):
        open_window([request(0, 5), request(5, 9)])  # a window of no length
