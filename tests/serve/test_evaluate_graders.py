"""Final answers and graders, case by case."""

from __future__ import annotations

from decimal import Decimal

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


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (".5", "0.5"),
        ("so it is -.5", "-0.5"),
        ("1.5e3", "1500"),
        ("2E-3 m", "0.002"),
        ("1e22", "10000000000000000000000"),
        ("\u22127", "-7"),  # a typographic minus
        ("-$5", "-5"),
        ("$-5$", "-5"),
        (r"-\$5", "-5"),
        ("12\u202f345", "12345"),
        ("1\u00a0234\u00a0567.5", "1234567.5"),
        ("12\u2009345", "12345"),
        (r"\boxed{1{,}234}", "1234"),
        (r"-3\,500", "-3500"),
        ("12\u00a05", "5"),  # five is no group of thousands
        ("1 234", "234"),  # an ordinary space may stand between two numbers
        # ordinary sentences
        ("it is 5.", "5"),
        ("page 3e", "3"),
        ("exercise no.5", "5"),
        ("version 1.2.3", "3"),
        ("1e99999999999999999999", "99999999999999999999"),  # beyond any exponent
    ],
)
def test_numbers_as_people_and_latex_write_them(text, number):
    assert last_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", ".", "-$", "-.e", "e.", "no number"])
def test_a_number_has_a_digit(text):
    assert last_number(text) is None


SEPARATORS = ["", ",", "\u00a0", "\u2009", "\u202f", "{,}", r"\,"]


@settings(deadline=None)
@given(
    st.integers(0, 10**12),
    st.sampled_from(["", ".5", ".125", "e3", "e-2", ".25E+4"]),
    st.sampled_from(["", "-", "+", "\u2212"]),
    st.sampled_from(["", "$", r"\$"]),
    st.sampled_from(SEPARATORS),
)
def test_every_way_to_write_a_number_gives_its_value(whole, rest, sign, currency, separator):
    written = f"{sign}{currency}{whole:,}".replace(",", separator) + rest
    assert last_number(f"17 or {written}.") == Decimal(sign.replace("\u2212", "-") + str(whole) + rest)


@settings(deadline=None)
@given(st.text(alphabet="0123456789.,-+eE$\\{} \u2212\u202f"))
def test_no_text_breaks_the_numeric_grader(text):
    last_number(text)


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
    with pytest.raises(ConfigError, match="the regex grader needs a pattern"):
        find_grader("regex")("12", "a{99999999999999}")
    with pytest.raises(ConfigError, match="the exact grader needs a text"):
        find_grader("exact")("", " ")
    with pytest.raises(ConfigError, match=r"--grader: unknown grader \(found 'llm', expected exact, numeric, regex\)"):
        find_grader("llm")
