"""A session's promises, with fakes for Triton and the runtime: every request ends exactly once, with its last flag.

The live server is driven in test_triton_server.py; here are the orders of events that a live server cannot be made to
show at will.
"""

from __future__ import annotations

import shutil
import threading
from types import SimpleNamespace

import pytest

from puzzle_trtllm.serve.runtimes.api import EngineDeadError, RequestError, SamplingParams
from puzzle_trtllm.serve.triton.outbox import Outbox, free_shared_memory
from puzzle_trtllm.serve.triton.request import ReplyFormat, RequestLimits
from puzzle_trtllm.serve.triton.response import Snapshot
from puzzle_trtllm.serve.triton.session import Session, pause_after_sweep
from tests.serve.fake_session import Encoder, Llm, Sender, accept, begin, open_service
from tests.serve.scripted import HANG_S, wait_until

LARGE = 1 << 20
"""Characters of an answer that shared memory may have no room for."""


@pytest.fixture
def service():
    with open_service() as opened:
        yield opened


def test_a_stream_ends_with_its_last_output(service) -> None:
    sender, result = begin(service, streaming=True, stream_delta=True, return_finish_reason=True)
    result.push("a")
    wait_until(lambda: len(sender.responses) == 1, what="the first response")
    result.push("b", None)
    wait_until(lambda: sender.final, what="the end")
    assert b"".join(r["text_output"][0] for r, _ in sender.responses) == b"ab"
    assert sender.responses[-1][0]["finish_reason"] == [b"stop"]
    assert [flag for _, flag in sender.responses[:-1]] == [0] * (len(sender.responses) - 1)


def test_without_streaming_there_is_one_response(service) -> None:
    sender, result = begin(service)
    result.push("a", "b", None)
    wait_until(lambda: sender.final, what="the end")
    assert sender.responses == [({"text_output": [b"ab"]}, 1)]
    wait_until(lambda: service.outbox.answers_sent == 1, what="counted as answered")


@pytest.mark.parametrize(("streaming", "stops"), [(True, ("ab",)), (False, ())])
def test_only_a_stream_holds_back_what_may_become_a_stop_string(service, streaming: bool, stops: tuple) -> None:
    form = ReplyFormat(streaming=streaming, stop=("ab",))
    assert service.outbox.open_reply(Sender(), form).stops == stops


def test_a_reader_that_does_not_keep_up_gets_larger_responses(service) -> None:
    """While one response is stuck, later steps wait as one; nothing is lost and nothing piles up."""
    sender, result = begin(service, streaming=True, stream_delta=True)
    sender.gate.clear()
    result.push("a")
    wait_until(lambda: result.queue.empty() and result.outputs[0].text == "a", what="the first step")
    result.push(*"bcdefgh", None)
    wait_until(lambda: service.session.queue_lengths() == (0, 0), what="the last step")
    sender.gate.set()
    wait_until(lambda: sender.final, what="the end")
    assert b"".join(r["text_output"][0] for r, _ in sender.responses) == b"abcdefgh"
    assert len(sender.responses) <= 2


def test_a_long_text_becomes_tokens_while_other_streams_go_on(service) -> None:
    read = threading.Event()

    def encode(text: str) -> list[int]:
        assert read.wait(HANG_S)
        return [ord(character) for character in text]

    service.llm.tokenizer = SimpleNamespace(encode=encode)
    text = "ab" * 10_000
    sender, result = begin(service, streaming=True)
    accept(service, Sender(), text=text)
    result.push("a", None)
    wait_until(lambda: sender.final, what="the end of the other stream")
    assert len(service.llm.results) == 1
    read.set()
    wait_until(lambda: len(service.llm.results) == 2, what="submission")
    assert [each.prompt for each in service.llm.results] == ["hi", [ord(character) for character in text]]


def test_a_text_on_which_the_tokenizer_panics_is_answered(service) -> None:
    """A panic in Rust is no Exception; gpt-oss's tokenizer has one on ten million times the same letter."""

    class PanicException(BaseException):
        pass

    def encode(text: str) -> list[int]:
        raise PanicException("retry-limit-in-match over")

    service.llm.tokenizer = SimpleNamespace(encode=encode)
    sender = Sender()
    accept(service, sender, text="a" * 10_000)
    assert sender.error == ("INTERNAL", "generation failed: PanicException: retry-limit-in-match over")


def test_few_long_texts_become_tokens_at_once(service) -> None:
    """Of clients that send one and leave, too: the thread goes on, and holds the memory, when nobody waits for it."""
    gate, begun = threading.Event(), []

    def encode(text: str) -> list[int]:
        begun.append(text)
        assert gate.wait(HANG_S)
        return [1, 2]

    service.llm.tokenizer = SimpleNamespace(encode=encode)
    for _ in range(3):
        senders = [Sender(), Sender()]
        for sender in senders:
            accept(service, sender, text="ab" * 10_000)
        wait_until(lambda: service.session.queue_lengths() == (2, 0), what="both are open")
        wait_until(lambda: len(begun) == 2, what="as many as may have begun")
        for sender in senders:
            sender.cancelled = True
            wait_until(lambda sender=sender: sender.final, what="the cancel")
        wait_until(lambda: service.session.queue_lengths() == (0, 0), what="both are forgotten")
    accept(service, Sender(), text="stays" * 1_000)
    wait_until(lambda: service.session.queue_lengths() == (1, 0), what="the last is open")
    assert len(begun) == 2
    gate.set()
    wait_until(lambda: len(service.llm.results) == 1, what="submission of the one that stayed")
    assert len(begun) == 3 and begun[-1].startswith("stays")


def test_two_streams_keep_their_own_order(service) -> None:
    streams = [begin(service, streaming=True, stream_delta=True) for _ in range(2)]
    for index in range(100):
        for _, result in streams:
            result.push(chr(ord("A") + index % 26))
    for sender, result in streams:
        result.push(None)
        wait_until(lambda sender=sender: sender.final, what="the end")
        text = b"".join(r["text_output"][0] for r, _ in sender.responses)
        assert text == bytes(ord("A") + index % 26 for index in range(100))
    wait_until(
        lambda: service.outbox.responses_sent == sum(len(sender.responses) for sender, _ in streams),
        what="both senders' responses are counted",
    )


def test_a_part_of_a_stream_that_cannot_be_sent_ends_it_and_the_generation(service) -> None:
    """A client that got the rest would take a text with a hole for the whole."""
    sender, result = begin(service, streaming=True, stream_delta=True, sender=Sender(room=1))
    result.push("a")
    wait_until(lambda: len(sender.responses) == 1, what="the first response")
    result.push("b")
    reason = "a response could not be sent: RuntimeError: Failed to increase the shared memory pool size"
    assert sender.error == ("INTERNAL", reason)
    wait_until(lambda: service.session.queue_lengths() == (0, 0), what="the request is forgotten")
    assert result.aborted and service.session.totals.ends == {"internal": 1}


@pytest.mark.parametrize("streaming", [False, True])
def test_a_large_answer_that_cannot_be_sent_is_an_error_not_silence(service, streaming: bool) -> None:
    sender, result = begin(service, streaming=streaming, sender=Sender(room=0))
    result.push("x" * LARGE, None)
    assert sender.error[0] == "INTERNAL" and "shared memory" in sender.error[1]
    wait_until(lambda: service.session.totals.ends == {"internal": 1}, what="it counts as failed")
    assert service.outbox.answers_sent == 0


def test_an_answer_that_is_lost_without_a_word_is_not_counted_as_one(service) -> None:
    """Shared memory can fill up between the look at it and the send, which has then closed the sender."""
    sender, result = begin(service, sender=Sender(room=0, room_for_errors=0))
    result.push("ab", None)
    wait_until(lambda: service.session.totals.ends == {"internal": 1}, what="it counts as failed")
    assert sender.responses == [] and (service.outbox.answers_sent, service.outbox.responses_sent) == (0, 0)


def test_a_large_answer_that_cannot_be_sent_ends_without_words_where_only_one_response_may_be_sent(service) -> None:
    sender, result = begin(service, sender=Sender(room=0, decoupled=False))
    result.push("x" * LARGE, None)
    wait_until(lambda: sender.final, what="the end")
    assert sender.responses == [(None, 1)]


def test_a_large_answer_is_followed_by_the_final_flag_alone(service) -> None:
    sender, result = begin(service)
    result.push("x" * LARGE, None)
    wait_until(lambda: sender.final, what="the end")
    assert sender.responses == [({"text_output": [b"x" * LARGE]}, 0), (None, 1)]
    wait_until(lambda: service.outbox.responses_sent == 1, what="counted as one response")


def test_a_small_answer_goes_without_the_final_flag_too_where_shared_memory_is_short() -> None:
    """A send that fails has closed the sender if it carried the flag: the client would wait for ever."""
    with open_service(shared_memory=8 << 20) as service:
        sender, result = begin(service, sender=Sender(room=0))
        result.push("ab", None)
        assert sender.error[0] == "INTERNAL" and "shared memory" in sender.error[1]
        sender, result = begin(service)
        result.push("ab", None)
        wait_until(lambda: sender.final, what="the end")
        assert sender.responses == [({"text_output": [b"ab"]}, 0), (None, 1)]


def test_an_error_for_which_there_is_no_room_ends_without_words() -> None:
    with open_service(shared_memory=0) as service:
        sender = accept(service, Sender(room=0, room_for_errors=0), text="")
        wait_until(lambda: sender.final, what="the end")
        assert sender.responses == [(None, 1)]


def test_the_room_in_shared_memory_is_that_of_its_file_system() -> None:
    assert 0 < free_shared_memory() <= shutil.disk_usage("/dev/shm").total


@pytest.mark.parametrize("last", [False, True])
def test_tensors_that_cannot_be_made_are_an_error_not_silence(service, last: bool) -> None:
    service.encoder.error_of_tensors = RuntimeError("no room for a tensor")
    sender, result = begin(service, streaming=True)
    result.push(None if last else "a")
    assert sender.error == ("INTERNAL", "a response could not be sent: RuntimeError: no room for a tensor")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RequestError("too long"), "INVALID_ARGUMENT"),
        (ValueError("bad value"), "INVALID_ARGUMENT"),
        (RuntimeError("odd"), "INTERNAL"),
        (EngineDeadError("gone"), "UNAVAILABLE"),
    ],
)
@pytest.mark.parametrize("when", ["submission", "first step"])
def test_an_error_before_the_first_token(service, error: Exception, status: str, when: str) -> None:
    if when == "submission":
        service.llm.submit_error = error
        sender = accept(service, Sender(), streaming=True)
    else:
        sender, result = begin(service, streaming=True)
        result.push(error)
    found, message = sender.error
    assert (found, len(sender.responses)) == (status, 1) and str(error) in message


def test_an_error_in_mid_stream_is_ours_not_the_clients(service) -> None:
    sender, result = begin(service, streaming=True)
    result.push("a")
    wait_until(lambda: len(sender.responses) == 1, what="the first response")
    result.push(RequestError("lost"))
    assert sender.error == ("INTERNAL", "generation failed: RequestError: lost")


@pytest.mark.parametrize("begun", [False, True])
def test_a_request_that_fails_on_our_side_is_not_generated_on(service, begun: bool) -> None:
    sender, result = begin(service, streaming=True)
    if begun:
        result.push("a")
        wait_until(lambda: len(sender.responses) == 1, what="the first response")
    result.push(RuntimeError("the detokenizer gave up"))
    assert sender.error[0] == "INTERNAL" and result.aborted


def test_a_runtime_that_just_stops_is_an_error_not_silence(service) -> None:
    sender, result = begin(service, streaming=True)
    result.push(StopAsyncIteration)
    assert sender.error[0] == "INTERNAL"


def test_a_bad_sampling_value_that_only_the_runtime_knows(service) -> None:
    service.session._sampling_params = lambda **_: (_ for _ in ()).throw(ValueError("no such thing"))
    assert accept(service, Sender()).error == ("INVALID_ARGUMENT", "no such thing")


def test_a_client_that_goes_away_is_noticed_and_its_generation_aborted(service) -> None:
    sender, result = begin(service, streaming=True)
    sender.cancelled = True
    assert sender.error == ("CANCELLED", "the client closed the request") and result.aborted
    wait_until(lambda: service.session.queue_lengths() == (0, 0), what="the request is forgotten")


def test_a_client_that_cannot_be_asked_for_keeps_nobody_else_from_being_noticed(service) -> None:
    (one, first), (other, second) = begin(service), begin(service)
    one.query_error = RuntimeError("no such request")
    wait_until(lambda: one.failed_queries > 1, what="a sweep that goes on after it")
    other.cancelled = True
    assert other.error[0] == "CANCELLED" and second.aborted
    first.push("a", None)
    wait_until(lambda: one.final, what="the end of the one that cannot be asked for")


def test_stop_cancels_all_requests_of_its_id_and_no_other(service) -> None:
    (one, first), (other, second) = begin(service, request_id="one"), begin(service, request_id="other")
    stop = accept(service, Sender(), request_id="one", text="", stop=True)
    assert one.error == ("CANCELLED", "request 'one' was stopped") and first.aborted
    assert stop.error == ("CANCELLED", "stopped 1 running request(s) with id 'one'")
    second.push("a", None)
    wait_until(lambda: other.final, what="the other's end")
    assert other.responses[-1][0] == {"text_output": [b"a"]} and not second.aborted


def test_stop_needs_an_id(service) -> None:
    assert accept(service, Sender(), text="", stop=True).error[0] == "INVALID_ARGUMENT"


def test_a_cancel_that_the_runtime_reports_by_itself(service) -> None:
    sender, result = begin(service)
    result.push("cancelled")
    assert sender.error[0] == "CANCELLED"


def test_a_full_table_is_unavailable_at_once_and_has_room_again_later(service) -> None:
    (one, first), (two, second) = begin(service), begin(service)
    assert accept(service, Sender()).error == ("UNAVAILABLE", "the queue is full: 2 requests are open")
    first.push("a", None)
    wait_until(lambda: sum(service.session.queue_lengths()) == 1, what="room")
    begin(service)
    second.push("a", None)
    wait_until(lambda: one.final and two.final, what="the ends")


def test_a_dead_engine_ends_everything_open_and_everything_after(service) -> None:
    (one, first), (two, _) = begin(service, streaming=True), begin(service)
    first.push(EngineDeadError("killed"))
    for sender in (one, two):
        assert sender.error == ("UNAVAILABLE", "the engine is dead: killed")
    assert accept(service, Sender()).error == ("UNAVAILABLE", "the engine is dead: killed")
    assert service.session.death == "killed"


def test_an_unhealthy_runtime_is_a_dead_engine_whatever_it_raises(service) -> None:
    sender, result = begin(service)
    service.llm.healthy = False
    result.push(RuntimeError("MPI worker lost"))
    assert sender.error == ("UNAVAILABLE", "the engine is dead: MPI worker lost")


def test_stopping_leaves_nobody_waiting() -> None:
    llm, outbox = Llm(), Outbox(Encoder(), log=lambda message: None)
    session = Session(llm=llm, sampling_params=SamplingParams, outbox=outbox, limits=RequestLimits())
    sender, _ = begin(SimpleNamespace(llm=llm, session=session))
    session.stop()
    outbox.close()
    assert sender.error == ("UNAVAILABLE", "the server is stopping")


def test_a_server_that_is_about_to_stop_lets_requests_end_and_takes_no_more(service) -> None:
    sender, result = begin(service)
    draining = threading.Thread(target=service.session.drain, args=[10 * HANG_S], daemon=True)
    draining.start()
    wait_until(service.session._draining.is_set, what="the beginning of the end")
    assert accept(service, Sender()).error == ("UNAVAILABLE", "the server is stopping")
    assert len(service.llm.results) == 1 and draining.is_alive()
    result.push("ab", None)
    draining.join(HANG_S)
    assert not draining.is_alive() and sender.responses == [({"text_output": [b"ab"]}, 1)]


def test_a_request_that_outlasts_its_time_is_told_that_the_server_stops(service) -> None:
    sender, result = begin(service)
    service.session.drain(0.1)
    assert sender.error == ("UNAVAILABLE", "the server is stopping")
    wait_until(lambda: result.aborted, what="its generation is aborted too")


def test_a_refused_request_never_reaches_the_runtime(service) -> None:
    sender = accept(service, Sender(), text="")
    assert sender.error[0] == "INVALID_ARGUMENT" and service.llm.results == []
    assert service.session.totals.ends == {"invalid_argument": 1}


def close(outbox: Outbox) -> None:
    """And wait until all has been sent, for which `close` itself allows some seconds."""
    outbox.close()
    outbox._thread.join(HANG_S)
    assert not outbox._thread.is_alive()


def test_a_reply_says_nothing_after_its_end() -> None:
    outbox = Outbox(Encoder(), log=lambda message: None)
    sender = Sender()
    reply = outbox.open_reply(sender, ReplyFormat())
    reply.fail("CANCELLED", "first")
    reply.fail("INTERNAL", "second")
    reply.update(Snapshot("a", [1], 1, True, "stop", None, None, []))
    close(outbox)
    assert sender.responses == [(("CANCELLED", "first"), 1)]
    assert not reply.is_cancelled()


@pytest.mark.parametrize(
    ("spent_ms", "pause_ms"),
    [
        (0.5, 25),  # few requests: the period
        (2, 40),  # a twentieth of the time
        (4, 46),  # the next one begins 50 ms after this one did
        (20, 30),
        (80, 80),  # more requests than that can be asked for: half of the time
    ],
)
def test_a_client_that_has_gone_is_looked_for_every_fifty_ms_while_that_is_possible(spent_ms, pause_ms) -> None:
    assert pause_after_sweep(spent_ms / 1e3, period_s=0.025) == pytest.approx(pause_ms / 1e3)


def test_a_request_that_the_server_has_closed_is_logged_and_the_others_are_answered() -> None:
    lines: list[str] = []
    outbox = Outbox(Encoder(), room=lambda: 1 << 30, log=lines.append)
    closed, other = Sender(), Sender()
    closed.closed = True
    for sender in (closed, other):
        outbox.open_reply(sender, ReplyFormat()).update(Snapshot("a", [1], 1, True, "stop", None, None, []))
    close(outbox)
    assert (closed.responses, other.responses) == ([], [({"text_output": [b"a"]}, 1)])
    assert (outbox.responses_sent, outbox.answers_sent) == (1, 1)
    assert lines == ["a last response could not be sent: RuntimeError: Response sender has been closed."]
