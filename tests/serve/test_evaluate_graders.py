"""Final answers and graders, case by case."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzle_trtllm.errors import ConfigError
from puzzle_trtllm.serve.evaluate.answers import final_answer
from puzzle_trtllm.serve.evaluate.graders import find_grader, last_number

ANALYSIS = "<|channel|>analysis<|message|>3+7=10, carry 1<|end|><|start|>assistant"


@pytest.mark.parametrize(
    ("text", "final"),
    [
        # harmony with special tokens
        ("<|channel|>final<|message|>42<|return|>", "42"),
        (ANALYSIS + "<|channel|>final<|message|>42<|return|>", "42"),
        (ANALYSIS + "<|channel|>final<|message|>4\n2", "4\n2"),  # cut, or the end token dropped
        (ANALYSIS + "<|channel|>final <|constrain|>json<|message|>{}<|return|>", "{}"),
        (ANALYSIS, None),  # never got to the answer: the 10 in its reasoning is not one
        ("<|channel|>analysis<|message|>the final", None),
        ("<|channel|>final<|message|>1<|end|><|start|>assistant<|channel|>final<|message|>2<|return|>", "2"),
        # special tokens dropped by the server
        ("analysis3+7=10assistantfinal10", "10"),
        ("final10", "10"),
        ("analysis3+7=10", None),
        # no channels at all
        ("The answer is 42.", "The answer is 42."),
        ("42<|return|>", "42"),
    ],
)
def test_the_final_answer_is_what_the_final_channel_says(text, final):
    assert final_answer(text) == final


@pytest.mark.parametrize(
    ("grader", "answer", "expected", "right"),
    [
        ("exact", " forty  two\n", "forty two", True),
        ("exact", "Forty two", "forty two", False),
        ("numeric", "so it is 1,234.50", "1234.5", True),
        ("numeric", "5 + 7 = 12", "12", True),
        ("numeric", "12 (not 13)", "12", False),  # the last number counts
        ("numeric", "-3", "3", False),
        ("numeric", "12-5", "5", True),  # a minus between numbers is no sign
        ("numeric", "none", "3", False),
        ("numeric", "0012", "12", True),
        ("regex", "the capital is Paris.", r"\bParis\b", True),
        ("regex", "Parish", r"\bParis\b", False),
        ("regex", "B", r"^(B|b)$", True),
    ],
)
def test_graders(grader, answer, expected, right):
    assert find_grader(grader)(answer, expected) is right


@settings(deadline=None)
@given(st.integers(-(10**12), 10**12), st.text(alphabet="abc =.,:\n", max_size=20))
def test_the_last_number_is_found_behind_any_words(number, words):
    assert last_number(f"17 {words} {number}") == number
    assert last_number(f"17 {words} {number:,}") == number


def test_what_a_grader_cannot_grade_is_an_error():
    with pytest.raises(ConfigError, match="the numeric grader needs a number"):
        find_grader("numeric")("12", "twelve")
    with pytest.raises(ConfigError, match="the regex grader needs a pattern"):
        find_grader("regex")("12", "(")
    with pytest.raises(ConfigError, match=r"unknown grader \(found 'llm', expected exact, numeric, regex\)"):
        find_grader("llm")
