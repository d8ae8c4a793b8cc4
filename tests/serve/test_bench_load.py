"""The closed loop against a scripted client: how many are in flight, and how every ending is recorded."""

from __future__ import annotations

import asyncio

import pytest

from puzzle_trtllm.errors import BenchError, ServeError
from puzzle_trtllm.serve.bench.load import hold_concurrency
from puzzle_trtllm.serve.bench.progress import LoadProgress
from puzzle_trtllm.serve.client.request import GenerationRequest
from tests.serve.fake_client import FakeClient, one_token_a_response

pytestmark = pytest.mark.usefixtures("virtual_time")


class Listener:
    def __init__(self):
        self.tokens, self.statuses = 0, []

    def on_tokens(self, count):
        self.tokens += count

    def on_end(self, record):
        self.statuses.append(record.status)


def requests(count):
    return [GenerationRequest(input_ids=[index], max_tokens=3) for index in range(count)]


def run(client, sent, *, concurrency=2, listener=None):
    return asyncio.run(
        hold_concurrency(
            client.stream,
            sent,
            concurrency=concurrency,
            is_truncated=lambda request, num_tokens, _: num_tokens < request.max_tokens,
            observer=listener or Listener(),
        )
    )


def test_exactly_the_concurrency_is_in_flight_from_the_first_wave_on():
    client = FakeClient(one_token_a_response)
    run(client, requests(12), concurrency=4)
    # Four go out at once, and each later one starts when one of the four has ended.
    assert client.in_flight == [1, 2, 3, 4] + [4] * 8


def test_answers_keep_the_order_of_the_requests_whatever_ends_first():
    client = FakeClient(lambda index, _: [[index]] * (9 - index))
    answers = run(client, requests(9), concurrency=3)
    assert [answer.request.input_ids for answer in answers] == [[index] for index in range(9)]


def test_tokens_and_times_come_from_the_responses():
    listener = Listener()
    (answer,) = run(FakeClient(lambda *_: [[5, 6], [], [7]]), requests(1), listener=listener)
    assert answer.token_ids == (5, 6, 7)
    assert (answer.record.status, answer.record.num_output_tokens, answer.finish_reason) == ("completed", 3, "length")
    first, second, third = answer.record.token_times_ns
    assert answer.record.sent_ns < first == second < third <= answer.record.end_ns
    assert (listener.tokens, listener.statuses) == (3, ["completed"])


def test_a_stock_server_tells_no_counts_so_responses_count_until_the_tokenizer_does():
    (answer,) = run(FakeClient(lambda *_: [[5, 6], [], [7]], gives_token_ids=False), requests(1))
    assert answer.record.num_output_tokens == 2  # the empty response carries no text
    assert [characters for _, characters in answer.pieces] == [2, 3]


@pytest.mark.parametrize(
    ("response", "status", "error"),
    [
        ([[1], [2]], "truncated", None),
        ([], "failed", "the answer holds no token"),
        (ServeError("queue is full", status="UNAVAILABLE"), "failed", "queue is full"),
        (ServeError("gone", status="CANCELLED"), "cancelled", "gone"),
    ],
)
def test_every_way_of_ending_is_recorded_and_the_load_goes_on(response, status, error):
    client = FakeClient(lambda index, request: response if index == 1 else [[1], [2], [3]])
    answers = run(client, requests(4))
    assert [answer.record.status for answer in answers] == ["completed", status, "completed", "completed"]
    assert answers[1].record.error == error


def test_a_server_that_answers_nothing_is_given_up_on_after_one_wave():
    client = FakeClient(lambda *_: ServeError("connection refused", status="UNAVAILABLE"))
    with pytest.raises(BenchError, match=r"zero successful requests: the first 3 failed.*connection refused"):
        run(client, requests(100), concurrency=3)
    assert len(client.requests) == 5  # the first wave, and one after each of its first two


def test_a_bug_is_not_a_failed_request():
    def broken(*_):
        raise KeyError("bug")

    with pytest.raises(KeyError, match="bug"):
        run(FakeClient(broken), requests(4))


def test_progress_shows_the_name_of_a_server_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with LoadProgress("bench a[/b]", num_requests=1, quiet=False):
        pass
    assert "bench a[/b]" in capsys.readouterr().err
