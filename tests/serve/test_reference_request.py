"""One request as its callers see it, whoever they are and however many; the engine's side is played by hand."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel

from puzzle_trtllm.serve.runtimes.api import EngineDeadError, GenerationError, RequestPerfMetrics, SamplingParams
from puzzle_trtllm.serve.runtimes.reference.messages import TokenUpdate
from puzzle_trtllm.serve.runtimes.reference.request import ReferenceRequestOutput
from tests.serve.scripted import HANG_S

METRICS = RequestPerfMetrics(
    arrival_time_ns=1, first_scheduled_time_ns=2, first_token_time_ns=3, last_token_time_ns=4, num_reused_blocks=5
)


def letters() -> Tokenizer:
    """Token 0 is "a", 1 is "b", ..."""
    tokenizer = Tokenizer(WordLevel({chr(97 + i): i for i in range(26)}, unk_token="a"))
    tokenizer.decoder = Fuse()
    return tokenizer


def request_of(abort: Callable[[int], None] = lambda _: None, **params: object) -> ReferenceRequestOutput:
    return ReferenceRequestOutput(
        request_id=1,
        prompt=None,
        prompt_token_ids=[1],
        sampling_params=SamplingParams(**params),
        tokenizer=letters(),
        abort=abort,
    )


def put(request: ReferenceRequestOutput, text: str, finish: str | None = None, **fields: object) -> None:
    """What the engine reports, as the reader thread hands it over."""
    tokens = [ord(letter) - 97 for letter in text]
    update = TokenUpdate(request_id=1, token_ids=tokens, finish_reason=finish, **fields)
    for loop, event in request.put(update):
        with suppress(RuntimeError):  # as the reader thread: nobody waits in a loop that was closed
            loop.call_soon_threadsafe(event.set)


def test_all_who_wait_for_one_request_get_its_end():
    request = request_of()

    async def wait_twice() -> list[ReferenceRequestOutput]:
        tasks = [asyncio.create_task(request.aresult()) for _ in range(2)]
        await asyncio.sleep(0.01)
        put(request, "ab")
        await asyncio.sleep(0.01)
        put(request, "c", "length")
        return await asyncio.wait_for(asyncio.gather(*tasks), HANG_S)

    assert [r.outputs[0].text for r in asyncio.run(wait_twice())] == ["abc", "abc"]

    other, found = request_of(), []

    def wait() -> None:
        found.append(other.result(HANG_S).outputs[0].text)

    def wait_in_a_loop() -> None:
        found.append(asyncio.run(asyncio.wait_for(other.aresult(), HANG_S)).outputs[0].text)

    threads = [threading.Thread(target=target) for target in (wait, wait, wait_in_a_loop, wait_in_a_loop)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)  # all wait now
    put(other, "abc", "length")
    for thread in threads:
        thread.join(HANG_S)
    assert found == ["abc"] * 4


def test_updates_are_applied_in_order_however_many_wait(monkeypatch):
    extend = ReferenceRequestOutput._extend

    def slow_at_first(self, output, update) -> None:
        if update.finish_reason is None:
            time.sleep(0.05)
        extend(self, output, update)

    monkeypatch.setattr(ReferenceRequestOutput, "_extend", slow_at_first)
    request = request_of()
    threads = [threading.Thread(target=request.result, args=(HANG_S,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    put(request, "a")
    time.sleep(0.01)
    put(request, "b", "length")
    for thread in threads:
        thread.join(HANG_S)
    assert request.outputs[0].text == "ab"


def test_a_failure_is_told_to_everyone_who_asks():
    request = request_of()
    request.put(GenerationError("no more memory"))
    for _ in range(2):
        with pytest.raises(GenerationError, match="no more memory"):
            request.result()
        with pytest.raises(GenerationError, match="no more memory"):
            asyncio.run(request.aresult())
    gone = request_of()
    gone.put(EngineDeadError("killed"))
    for _ in range(2):
        with pytest.raises(EngineDeadError, match="killed"):
            gone.result()


def test_a_timeout_counts_from_the_call_however_many_tokens_arrive_meanwhile():
    request = request_of()
    stop = threading.Event()

    def generate() -> None:
        while not stop.wait(0.005):
            put(request, "a")

    thread = threading.Thread(target=generate)
    thread.start()
    try:  # one that began to count anew at each token would never end
        with pytest.raises(TimeoutError, match="has not ended within"):
            request.result(timeout=0.1)
    finally:
        stop.set()
        thread.join()


def test_a_request_begun_in_one_event_loop_goes_on_in_the_next():
    request = request_of()

    async def take_one() -> str:
        threading.Timer(0.02, put, (request, "a")).start()  # after it has begun to wait
        return (await anext(request)).outputs[0].text

    assert [asyncio.run(take_one()) for _ in range(2)] == ["a", "aa"]


@pytest.mark.parametrize("stops", [["ab"], ["ab", "zzzzzzzzzzzz"], ["ab", "bax", "q"]])
def test_a_stop_string_that_ended_before_min_tokens_is_no_stop(stops):
    request = request_of(stop=stops, min_tokens=4)
    put(request, "xabcd")
    put(request, "eabf", "length")
    output = request.result().outputs[0]
    assert (output.text, output.finish_reason, output.stop_reason) == ("xabcde", "stop", "ab")


def test_a_stop_string_ends_the_request_and_its_metrics_come_with_the_engines_answer():
    aborted: list[int] = []
    plain = request_of(aborted.append, stop="bc")
    put(plain, "abcd")
    assert plain.result().outputs[0].text == "a" and aborted == [1]

    measured = request_of(aborted.append, stop="bc", return_perf_metrics=True)
    put(measured, "abcd")
    put(measured, "ef")  # what the engine did before it heard of the end
    put(measured, "g", "cancelled", metrics=METRICS)
    output = measured.result().outputs[0]
    assert (output.text, output.finish_reason, output.stop_reason) == ("a", "stop", "bc")
    assert output.token_ids == [0, 1, 2] and measured.metrics == METRICS


@pytest.mark.parametrize(("kept", "text"), [(False, "ab"), (True, "abc")])
def test_a_stop_token_is_part_of_the_output_only_where_that_is_asked_for(kept, text):
    """As in TensorRT-LLM (executor/result.py, `_handle_sequence`)."""
    request = request_of(stop_token_ids=[2], include_stop_str_in_output=kept)
    put(request, "abc", "stop", stop_reason=2)
    output = request.result().outputs[0]
    assert (output.text, len(output.token_ids), output.stop_reason) == (text, len(text), 2)
