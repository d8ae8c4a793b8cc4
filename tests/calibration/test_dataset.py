"""Calibration data: what each kind of record becomes, what is sampled, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzle_trtllm.calibration.dataset import CalibrationDataset, load_dataset
from puzzle_trtllm.chat import ChatTokenizer
from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.errors import CalibrationError


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint) -> Checkpoint:
    return Checkpoint.open(make_checkpoint([(4, 8), (4, None)]))


def write_jsonl(file: Path, *records: object) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def ids_of(dataset: CalibrationDataset) -> list[list[int]]:
    return [sequence.tolist() for sequence in dataset.sequences]


def test_conversations_go_through_the_chat_template(checkpoint, tmp_path):
    question = {"role": "user", "content": "1+1="}
    answer = {"role": "assistant", "content": "2"}
    open_ended = write_jsonl(tmp_path / "open.jsonl", {"messages": [question], "reasoning_effort": "low"})
    answered = write_jsonl(tmp_path / "answered.jsonl", {"messages": [question, answer], "reasoning_effort": "high"})
    tokenizer = ChatTokenizer.from_folder(checkpoint.path)
    # a conversation that ends with the user is one the model would go on with; a finished one is not
    assert ids_of(load_dataset(open_ended, checkpoint)) == [
        tokenizer.encode(
            "<|start|>system<|message|>effort: low<|end|><|start|>user<|message|>1+1=<|end|><|start|>assistant"
        )
    ]
    assert ids_of(load_dataset(answered, checkpoint)) == [
        tokenizer.encode(
            "<|start|>system<|message|>effort: high<|end|><|start|>user<|message|>1+1=<|end|>"
            "<|start|>assistant<|message|>2<|end|>"
        )
    ]


def test_texts_and_token_ids(checkpoint, tmp_path):
    encode = ChatTokenizer.from_folder(checkpoint.path).encode
    records = write_jsonl(tmp_path / "d.jsonl", {"text": "abc"}, {"input_ids": [9, 8, 7]})
    assert sorted(ids_of(load_dataset(records, checkpoint))) == sorted([encode("abc"), [9, 8, 7]])
    paragraphs = tmp_path / "d.txt"
    paragraphs.write_text("one\ntwo\n\n\n\nthree\n")
    assert sorted(ids_of(load_dataset(paragraphs, checkpoint))) == sorted([encode("one\ntwo"), encode("three")])


def test_the_checkpoint_may_bring_its_own(checkpoint, make_checkpoint):
    folder = make_checkpoint([(4, 8)])
    write_jsonl(folder / "calibration.jsonl", {"input_ids": [1, 2]})
    assert ids_of(load_dataset(None, Checkpoint.open(folder))) == [[1, 2]]
    with pytest.raises(CalibrationError, match=r"calibration\.jsonl: missing .*--dataset"):
        load_dataset(None, checkpoint)


def test_sampling_is_decided_by_the_seed(checkpoint, tmp_path):
    file = write_jsonl(tmp_path / "d.jsonl", *({"input_ids": [i]} for i in range(50)))
    first = ids_of(load_dataset(file, checkpoint, max_samples=10, seed=1))
    assert first == ids_of(load_dataset(file, checkpoint, max_samples=10, seed=1))
    assert first != ids_of(load_dataset(file, checkpoint, max_samples=10, seed=2))
    assert len({ids[0] for ids in first}) == 10
    assert sorted(ids_of(load_dataset(file, checkpoint))) == [[i] for i in range(50)]


def test_a_token_budget_ends_the_sample(checkpoint, tmp_path):
    file = write_jsonl(tmp_path / "d.jsonl", *({"input_ids": [i] * 10} for i in range(20)))
    assert load_dataset(file, checkpoint, max_tokens=35).num_tokens == 40


def test_long_sequences_are_cut_or_packed_on_request(checkpoint, tmp_path):
    file = write_jsonl(tmp_path / "d.jsonl", {"input_ids": list(range(90)) * 6}, {"input_ids": [5] * 4})
    with pytest.raises(
        CalibrationError, match=r"d\.jsonl:1: longer than the model's limit \(found 540, expected .* 512"
    ):
        load_dataset(file, checkpoint)
    assert sorted(map(len, load_dataset(file, checkpoint, sequence_length=16).sequences)) == [4, 16]
    packed = load_dataset(file, checkpoint, sequence_length=16, pack=True)
    assert [len(row) for row in packed.sequences] == [16] * 34
    assert packed.num_tokens == 544
    with pytest.raises(CalibrationError, match="sequence_length: packing needs a row length"):
        load_dataset(file, checkpoint, pack=True)
    with pytest.raises(CalibrationError, match=r"sequence_length: impossible \(found 513, expected 1 to 512"):
        load_dataset(file, checkpoint, sequence_length=513)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=40), max_tokens=st.integers(1, 60))
def test_batches_hold_every_sequence_once_unpadded(lengths, max_tokens):
    sequences = tuple(np.full(length, i) for i, length in enumerate(lengths))
    dataset = CalibrationDataset(source=Path("d"), sequences=sequences)
    batches = list(dataset.batches(max_tokens))
    rows = [row for batch in batches for row in batch]
    assert sorted(row.tolist() for row in rows) == sorted(sequence.tolist() for sequence in sequences)
    assert all(batch.shape[0] == 1 or batch.size <= max_tokens for batch in batches)


def test_the_fingerprint_names_the_tokens_not_the_file(checkpoint, tmp_path):
    def fingerprint(name: str, *records: object) -> str:
        return load_dataset(write_jsonl(tmp_path / name, *records), checkpoint).fingerprint

    text = fingerprint("a.jsonl", {"text": "abc"})
    assert text.startswith("sha256:")
    assert text == fingerprint("b.jsonl", {"input_ids": ChatTokenizer.from_folder(checkpoint.path).encode("abc")})
    assert text != fingerprint("c.jsonl", {"text": "abd"})
    assert fingerprint("d.jsonl", {"input_ids": [1, 2, 3]}) != fingerprint(
        "e.jsonl", {"input_ids": [1]}, {"input_ids": [2, 3]}
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "d.jsonl: empty"),
        ("\n\n", "d.jsonl: empty"),
        ('{"text": "a"}\n{"text": \n', "d.jsonl:2: not valid JSON"),
        (
            '{"prompt": "a"}\n',
            r"d.jsonl:1: unknown record \(found \['prompt'\], expected one of messages, text, input_ids",
        ),
        ("[1, 2]\n", r"d.jsonl:1: unknown record \(found list"),
        ('{"text": ""}\n', "d.jsonl: no tokens"),
        ('{"text": 5}\n', "d.jsonl:1: text: must be a string"),
        ('{"messages": "hello"}\n', "d.jsonl:1: messages: must be a list of messages"),
        ('{"input_ids": [1, -2]}\n', "d.jsonl:1: input_ids: must be a list of token ids"),
        ('{"input_ids": [1, true]}\n', "d.jsonl:1: input_ids: must be a list of token ids"),
        ('{"input_ids": [1, 100000]}\n', r"d.jsonl:1: a token id outside the model's vocabulary .*found 100000"),
    ],
)
def test_bad_data_is_one_line_that_says_where(checkpoint, tmp_path, content, message):
    file = tmp_path / "d.jsonl"
    file.write_text(content)
    with pytest.raises(CalibrationError, match=message) as caught:
        load_dataset(file, checkpoint)
    assert "\n" not in str(caught.value)


def test_unknown_kinds_and_missing_files(checkpoint, tmp_path):
    (tmp_path / "d.csv").write_text("a,b")
    with pytest.raises(CalibrationError, match=r"found \.csv, expected \.jsonl or \.txt"):
        load_dataset(tmp_path / "d.csv", checkpoint)
    with pytest.raises(CalibrationError, match=r"none\.jsonl: missing"):
        load_dataset(tmp_path / "none.jsonl", checkpoint)
