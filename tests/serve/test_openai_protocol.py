"""Requests of OpenAI's API as they are read, and where a text is cut at its stop strings; no server."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puzzle_trtllm.serve.openai.answers import StopWatch
from puzzle_trtllm.serve.openai.errors import ApiError
from puzzle_trtllm.serve.openai.protocol import ChatRequest, CompletionRequest

USER = [{"role": "user", "content": "12+30="}]


@given(st.text(alphabet="ab\n", max_size=30), st.lists(st.text(alphabet="ab\n", min_size=1, max_size=3), max_size=3),
       st.lists(st.integers(0, 30), max_size=5))  # fmt: skip
def test_a_stop_watch_cuts_at_the_first_stop_string_wherever_the_text_is_cut(text, stops, cuts):
    """Text after the part in which the stop string ends never counts, so the first to END decides."""
    watch, shown = StopWatch(tuple(stops)), ""
    for a, b in pairwise([0, *sorted(cuts), 30]):
        shown += watch.feed(text[a:b])
    shown += watch.rest()
    if watch.has_stopped:
        assert any(text.startswith(shown + stop) for stop in stops)
        assert not any(stop in shown for stop in stops)
    else:
        assert shown == text
        assert not any(stop in text for stop in stops)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (ChatRequest, {"messages": [1] * 1000}),
        (ChatRequest, {"messages": [{"role": "user", "content": [1] * 1000}]}),
        (ChatRequest, {"messages": USER, "stop": [1] * 1000}),
        (ChatRequest, {"messages": USER, **{f"misspelt{index}": 1 for index in range(1000)}}),
        (CompletionRequest, {"prompt": [1.5, "a"] * 500}),
        (CompletionRequest, {"prompt": [[1.5] * 1000]}),
    ],
)
def test_of_what_is_wrong_a_thousand_times_the_first_is_told(kind, wrong):
    """Not all collected: for a body of 1 MB that took a gigabyte, and seconds in which no stream went on."""
    with pytest.raises(ApiError) as caught:
        kind.parse({"model": "m", **wrong})
    collected = caught.value.__context__
    assert collected is None or collected.error_count() <= 4


def test_prompts_of_completions():
    parse = CompletionRequest.parse
    assert parse({"model": "m", "prompt": [1, 2]}).prompts() == [[1, 2]]
    assert parse({"model": "m", "prompt": [[1], [2]]}).prompts() == [[1], [2]]
    with pytest.raises(ApiError, match="only one prompt with stream"):
        parse({"model": "m", "prompt": ["a", "b"], "stream": True}).prompts()


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
def test_no_alternatives_to_log_probabilities_are_still_log_probabilities(name):
    """OpenAI and vLLM answer 0 with those of the tokens themselves; an answer without would pass for one with."""
    with pytest.raises(ApiError, match="no log-probabilities"):
        CompletionRequest.parse({"model": "m", "prompt": "1", name: 0})
    for none in (None, False):
        CompletionRequest.parse({"model": "m", "prompt": "1", name: none})
    ChatRequest.parse({"model": "m", "messages": USER, "logprobs": False, "top_logprobs": 0})
