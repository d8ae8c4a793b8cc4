"""The steady window against runs drawn by hand (times in seconds, one character a token)."""

from __future__ import annotations

import pytest

from puzzle_trtllm.errors import BenchError
from puzzle_trtllm.serve.metrics.records import RequestRecord
from puzzle_trtllm.serve.metrics.window import steady_window

S = 1_000_000_000


def request(sent, end, tokens=(), status="completed"):
    return RequestRecord(
        sent_ns=int(sent * S), end_ns=int(end * S), status=status, token_times_ns=tuple(int(t * S) for t in tokens)
    )


# Concurrency 2, three requests. A: 0..4, B: 1..6, C: 4..9 (sent when A ended).
# Two are in flight from t=1; C, the last, is sent at 4; the first end after that is B's at 6. Window: (1, 6].
A = request(0, 4, [1, 2, 4])
B = request(1, 6, [3, 5, 6])
C = request(4, 9, [6, 7, 9])


def test_the_window_lasts_from_full_load_to_the_first_end_after_the_last_request_was_sent():
    window = steady_window([A, B, C], concurrency=2)
    assert (window.start_ns, window.end_ns) == (1 * S, 6 * S)
    assert window.seconds == 5.0


def test_the_order_of_the_records_does_not_matter():
    assert steady_window([C, B, A], concurrency=2) == steady_window([A, B, C], concurrency=2)


def test_tokens_count_by_their_own_arrival_start_excluded_and_end_included():
    # A: 2, 4 (1 is the start itself); B: 3, 5, 6; C: 6 (7 and 9 come in the idle tail).
    assert steady_window([A, B, C], concurrency=2).count_tokens([A, B, C]) == 6


def test_tokens_of_failed_requests_do_not_count():
    broken = request(1, 6, [3, 5, 6], status="failed")
    assert steady_window([A, broken, C], concurrency=2).count_tokens([A, broken, C]) == 3


def test_whole_waves_count_whole():
    # Two waves of two equal requests: the tail is empty, so all 8 tokens in 8 s count, both waves.
    waves = [request(0, 4, [3, 4]), request(0, 4, [3, 4]), request(4, 8, [7, 8]), request(4, 8, [7, 8])]
    window = steady_window(waves, concurrency=2)
    assert (window.seconds, window.count_tokens(waves)) == (8.0, 8)


def test_a_gap_between_an_end_and_the_next_request_does_not_count_as_reaching_more():
    # One after another: never two in flight, also where one ends in the instant the next is sent.
    with pytest.raises(BenchError, match=r"never reached.*found 1 requests in flight of 2 sent, expected 2"):
        steady_window([request(0, 4, [4]), request(4, 8, [8])], concurrency=2)


def test_the_load_may_be_reached_after_requests_have_ended():
    # One at a time until two are sent together: two are in flight from t=5, and the last one ends first.
    sent_and_ended = [(0, 1), (1, 2), (2, 3), (4, 9), (5, 8)]
    window = steady_window([request(sent, end, [end]) for sent, end in sent_and_ended], concurrency=2)
    assert (window.start_ns, window.end_ns) == (5 * S, 8 * S)


def test_a_load_that_was_never_held_is_an_error():
    # The last request ends in the very nanosecond it was sent in: there is no time to divide by.
    with pytest.raises(BenchError, match="never held"):
        steady_window([request(0, 1, [1]), request(1, 1, [1])], concurrency=1)
