"""From the LLM API's outputs to tensors: what a stream adds up to, in both forms."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from puzzle_trtllm.serve.runtimes.api import CompletionOutput, RequestPerfMetrics
from puzzle_trtllm.serve.triton.contract import OUTPUTS
from puzzle_trtllm.serve.triton.request import ReplyFormat
from puzzle_trtllm.serve.triton.response import Sent, hold_back, perf_tensors, render, take_snapshot

NUMPY = {"STRING": np.object_, "INT32": np.int32, "INT64": np.int64, "FP32": np.float32}


@dataclass
class Output:
    outputs: list[CompletionOutput] = field(default_factory=lambda: [CompletionOutput()])
    finished: bool = False
    metrics: RequestPerfMetrics | None = None


def output(text: str, ids: list[int], *, finish: str | None = None, **fields) -> Output:
    return Output([CompletionOutput(text=text, token_ids=ids, finish_reason=finish, **fields)], finish is not None)


def tensors(form: ReplyFormat, now: Output, sent: Sent | None = None) -> dict[str, object]:
    rendered = render(form, take_snapshot(now), sent or Sent())
    for name, array in rendered:
        spec = next(spec for spec in OUTPUTS if spec.name == name)
        assert array.dtype == NUMPY[spec.dtype] and array.ndim == 1 and (spec.dims != (1,) or array.size == 1), name
    return {name: array.tolist() for name, array in rendered}


def test_plain_responses_repeat_everything_that_was_asked_for() -> None:
    form = ReplyFormat(streaming=True, output_ids=True, finish_reason=True, stop_reason=True, cumulative_logprob=True)
    found = tensors(form, output("ab", [7, 8], cumulative_logprob=-1.5), Sent(1, 1))
    assert found == {
        "text_output": [b"ab"], "output_ids": [7, 8], "num_output_tokens": [2], "finish_reason": [b"None"],
        "stop_reason": [b"None"], "cumulative_logprob": [-1.5],
    }  # fmt: skip


def test_a_stock_client_gets_text_and_nothing_else() -> None:
    assert tensors(ReplyFormat(streaming=True), output("ab", [7, 8])) == {"text_output": [b"ab"]}


def test_delta_responses_hold_what_is_new_and_the_end_comes_with_the_end() -> None:
    form = ReplyFormat(streaming=True, delta=True, output_ids=True, finish_reason=True, stop_reason=True)
    assert tensors(form, output("ab", [7, 8]), Sent(1, 1)) == {"text_output": [b"b"], "output_ids": [8]}
    last = output("ab.", [7, 8, 9], finish="stop", stop_reason=".")
    assert tensors(form, last, Sent(2, 2)) == {
        "text_output": [b"."], "output_ids": [9], "num_output_tokens": [3], "finish_reason": [b"stop"],
        "stop_reason": [b"."],
    }  # fmt: skip


def test_a_snapshot_ignores_tokens_that_came_later() -> None:
    live = output("ab", [7, 8])
    snapshot = take_snapshot(live)
    live.outputs[0].token_ids.append(9)
    assert dict(render(ReplyFormat(output_ids=True), snapshot, Sent()))["output_ids"].tolist() == [7, 8]


def test_text_that_a_stop_string_took_back_is_not_repeated() -> None:
    form = ReplyFormat(streaming=True, delta=True, output_ids=True)
    found = tensors(form, output("a", [7], finish="stop"), Sent(text_length=3, num_tokens=3))
    assert found["text_output"] == [b""] and found["output_ids"] == []


@given(st.lists(st.tuples(st.text(max_size=3), st.booleans()), min_size=1, max_size=20))
def test_deltas_add_up_to_the_whole_however_steps_are_merged(steps: list[tuple[str, bool]]) -> None:
    """Each step adds text and one token; a step marked False is not sent on its own."""
    form = ReplyFormat(streaming=True, delta=True, output_ids=True)
    text, ids, sent, got_text, got_ids = "", [], Sent(), b"", []
    for index, (piece, is_sent) in enumerate(steps):
        text, ids = text + piece, [*ids, index]
        if is_sent or index == len(steps) - 1:
            found = tensors(form, output(text, ids), sent)
            got_text += found["text_output"][0]
            got_ids += found["output_ids"]
            sent = Sent(len(text), len(ids))
    assert got_text == text.encode() and got_ids == ids


@pytest.mark.parametrize(
    ("text", "stops", "visible"),
    [
        ("abc", (), "abc"),
        ("abc", ("cd",), "ab"),
        ("abc", ("bcd", "cx"), "a"),
        ("abc", ("c",), "abc"),  # a whole stop string is the runtime's to cut
        ("xaaa", ("aab",), "xa"),
        ("", ("ab",), ""),
        ("a", ("abc",), ""),
    ],
)
def test_what_may_become_a_stop_string_is_held_back(text: str, stops: tuple[str, ...], visible: str) -> None:
    assert hold_back(text, stops) == visible


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_a_stream_with_stop_strings_never_says_more_than_its_end(text: str, stops: list[str]) -> None:
    """Character by character until a stop string is complete, as a runtime would; the end is what lies before it."""
    ends = [index for stop in stops if (index := text.find(stop)) >= 0]
    cut_at = min(text.find(stop) + len(stop) for stop in stops if stop in text) if ends else len(text)
    final = text[: min(text[:cut_at].find(stop) for stop in stops if stop in text[:cut_at])] if ends else text
    shown = ""
    for length in range(1, cut_at):
        visible = hold_back(text[:length], tuple(stops))
        assert visible.startswith(shown), "what was shown stays"
        shown = visible
        assert final.startswith(shown)


def test_a_finished_text_is_shown_whole() -> None:
    assert take_snapshot(output("abc", [1], finish="length"), ("cd",)).text == "abc"
    assert take_snapshot(output("abc", [1]), ("cd",)).text == "ab"


METRICS = {
    "kv_cache_reused_block": [1], "kv_cache_missed_block": [3], "kv_cache_alloc_new_blocks": [4],
    "kv_cache_alloc_total_blocks": [5], "kv_cache_hit_rate": [0.25], "arrival_time_ns": [1_000],
    "first_scheduled_time_ns": [86_400_000_002_000], "first_token_time_ns": [3_000], "last_token_time_ns": [4_000],
    "acceptance_rate": [0.0], "total_accepted_draft_tokens": [0], "total_draft_tokens": [0],
}  # fmt: skip


def test_perf_metrics_of_the_reference_runtime() -> None:
    finished = output("a", [1], finish="stop")
    finished.metrics = RequestPerfMetrics(
        arrival_time_ns=1_000, first_scheduled_time_ns=86_400_000_002_000, first_token_time_ns=3_000,
        last_token_time_ns=4_000, num_total_allocated_blocks=5, num_new_allocated_blocks=4, num_reused_blocks=1,
        num_missed_blocks=3,
    )  # fmt: skip
    assert {name: array.tolist() for name, array in perf_tensors(finished)} == METRICS


def test_perf_metrics_of_tensorrt_llm() -> None:
    """Three groups on the completion, times as durations."""
    finished = output("a", [1], finish="stop")
    finished.outputs[0] = SimpleNamespace(
        request_perf_metrics=SimpleNamespace(
            kv_cache_metrics=SimpleNamespace(
                num_reused_blocks=1, num_missed_blocks=3, num_new_allocated_blocks=4, num_total_allocated_blocks=5
            ),
            timing_metrics=SimpleNamespace(
                arrival_time=timedelta(microseconds=1), first_scheduled_time=timedelta(days=1, microseconds=2),
                first_token_time=timedelta(microseconds=3), last_token_time=timedelta(microseconds=4),
            ),
            speculative_decoding=SimpleNamespace(
                acceptance_rate=0.0, total_accepted_draft_tokens=0, total_draft_tokens=0
            ),
        )
    )  # fmt: skip
    assert {name: array.tolist() for name, array in perf_tensors(finished)} == METRICS


def test_no_metrics_unless_the_runtime_gives_them() -> None:
    assert perf_tensors(output("a", [1], finish="stop")) == []


@pytest.mark.parametrize("logprob", [None, -2.0])
def test_a_missing_logprob_is_not_a_number(logprob: float | None) -> None:
    form = ReplyFormat(cumulative_logprob=True)
    found = tensors(form, output("a", [1], finish="stop", cumulative_logprob=logprob))["cumulative_logprob"]
    assert np.array_equal(found, [np.nan if logprob is None else logprob], equal_nan=True)
