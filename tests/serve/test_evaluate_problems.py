"""Problem sets: read whole or refused with file and line."""

from __future__ import annotations

import json

import pytest

from puzzle_trtllm.errors import ConfigError
from puzzle_trtllm.serve.evaluate.problems import load_problems


def write(folder, *records):
    file = folder / "problems.jsonl"
    file.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n")
    return file


def problem(number, **changes):
    return {"id": f"p{number}", "prompt": f"{number}+1=", "answer": str(number + 1)} | changes


def test_problems_in_order_and_the_first_few(tmp_path):
    file = write(tmp_path, problem(1), "", problem(2), problem(3))
    assert [p.answer for p in load_problems(file).problems] == ["2", "3", "4"]
    assert [p.id for p in load_problems(file, limit=2).problems] == ["p1", "p2"]


def test_the_fingerprint_tells_problem_sets_apart(tmp_path):
    file = write(tmp_path, problem(1), problem(2))
    whole, part = load_problems(file).fingerprint, load_problems(file, limit=1).fingerprint
    assert load_problems(write(tmp_path, problem(1), problem(2))).fingerprint == whole != part
    assert load_problems(write(tmp_path, problem(1), problem(2, answer="4"))).fingerprint != whole


def test_any_data_set_of_prompts_and_answers_will_do(tmp_path):
    file = write(
        tmp_path,
        {"question": "6*7?", "solution": "so it is #### 42", "level": 3},
        {"question": "half of 1\u2028?", "solution": 0.5},
    )
    found = load_problems(file, prompt_key="question", answer_key="solution").problems
    assert [(p.id, p.prompt, p.answer) for p in found] == [
        ("line 1", "6*7?", "so it is #### 42"),
        ("line 2", "half of 1\u2028?", "0.5"),
    ]


@pytest.mark.parametrize(
    ("number", "text"),
    [
        ("0.00001", "0.00001"),
        ("1e22", "10000000000000000000000"),
        ("-2.5e-7", "-0.00000025"),
        ("5.0", "5.0"),
        ("123456789012345678901234567890", "123456789012345678901234567890"),
    ],
)
def test_a_number_is_written_out(tmp_path, number, text):
    file = write(tmp_path, f'{{"prompt": "a", "answer": {number}}}')
    assert load_problems(file).problems[0].answer == text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"problems\.jsonl:2: not JSON"),
        ("[1]", r"problems\.jsonl:2: not a JSON object \(expected the keys prompt, answer\)"),
        ({"id": "a", "prompt": "b"}, r"problems\.jsonl:2: answer: missing \(found keys id, prompt\)"),
        (problem(2, answer=["3"]), r'problems\.jsonl:2: answer: not a text \(found \["3"\], expected text or a number'),
        (problem(2, answer=True), r"problems\.jsonl:2: answer: not a text \(found true"),
        (problem(2, prompt=""), r"problems\.jsonl:2: prompt: not a text"),
        (
            '{"prompt": "a", "answer": 1e999}',
            r"problems\.jsonl:2: answer: not a text \(found Infinity, .*number that is finite",
        ),
        ('{"prompt": "a", "answer": NaN}', r"problems\.jsonl:2: answer: not a text \(found NaN"),
        ('{"prompt": "a", "answer": 1, "answer": 2}', r'problems\.jsonl:2: not JSON: the key "answer" occurs twice'),
        ("[" * 200_000, r"problems\.jsonl:2: nested too deeply"),
        ('{"prompt": "\\ud800", "answer": "1"}', r"problems\.jsonl:2: not text: half of a surrogate pair"),
        ('{"p\\ud800": "a", "answer": "1"}', r"problems\.jsonl:2: not text: half of a surrogate pair"),
        (problem(1), r"two problems with one id \(found p1\)"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    with pytest.raises(ConfigError, match=message):
        load_problems(write(tmp_path, problem(1), line))


def test_a_byte_order_mark_is_no_part_of_it(tmp_path):
    file = write(tmp_path, problem(1))
    plain = load_problems(file)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load_problems(file) == plain


def test_no_file_and_no_problems(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_problems(tmp_path / "absent.jsonl")
    with pytest.raises(ConfigError, match="holds no problem"):
        load_problems(write(tmp_path, ""))
