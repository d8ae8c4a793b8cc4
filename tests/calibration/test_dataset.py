"""Calibration data: what each kind of record becomes, what is sampled, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzle_trtllm.calibration.dataset import BUNDLED, CalibrationDataset, load_dataset
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
    paragraphs.write_text("one", encoding="utf-8-sig")  # as Windows does; the mark is no text
    assert ids_of(load_dataset(paragraphs, checkpoint)) == [encode("one")]


def test_padding_that_a_mask_tells_of_is_left_out(checkpoint, tmp_path):
    padded = {"input_ids": [0, 0, 5, 6, 7, 0], "attention_mask": [0, 0, 1, 1, 1, 0]}
    assert ids_of(load_dataset(write_jsonl(tmp_path / "d.jsonl", padded), checkpoint)) == [[5, 6, 7]]
    unmasked = {"input_ids": [5, 6], "attention_mask": None}  # Arrow's way to say that there is none
    assert ids_of(load_dataset(write_jsonl(tmp_path / "n.jsonl", unmasked), checkpoint)) == [[5, 6]]


@pytest.mark.parametrize("mask", [[1], [1, 1, 1], [1, 2], [[1, 1]], [1, True], [1, 0.5], 1, "11"])
def test_a_mask_that_does_not_fit_is_refused(checkpoint, tmp_path, mask):
    file = write_jsonl(tmp_path / "d.jsonl", {"input_ids": [5, 6], "attention_mask": mask})
    with pytest.raises(CalibrationError, match=r"d\.jsonl:1: attention_mask: .*expected a list of 2 zeros and ones"):
        load_dataset(file, checkpoint)


def test_text_parts_are_one_text(checkpoint, tmp_path):
    parts = [{"type": "text", "text": "1+"}, {"type": "text", "text": "1=", "image": None}]
    found = [
        load_dataset(write_jsonl(tmp_path / name, {"messages": [{"role": "user", "content": content}]}), checkpoint)
        for name, content in (("parts.jsonl", parts), ("text.jsonl", "1+1="))
    ]
    assert found[0].fingerprint == found[1].fingerprint


@pytest.mark.parametrize(
    ("message", "key", "found"),
    [
        ({"role": "user", "content": 12}, "content", "int"),
        ({"role": "user", "content": {"text": "a"}}, "content", "dict"),
        ({"role": "user", "content": [{"type": "image", "url": "a"}]}, "content", "list"),
        ({"role": "user", "content": ["a"]}, "content", "list"),
        ({"from": "human", "value": 12}, "content", "int"),
        ({"role": 5, "content": "a"}, "role", "int"),
    ],
)
def test_what_is_no_text_is_refused_rather_than_printed(checkpoint, tmp_path, message, key, found):
    file = write_jsonl(tmp_path / "d.jsonl", {"messages": [{"role": "user", "content": "a"}, message]})
    with pytest.raises(
        CalibrationError, match=rf"d\.jsonl:1: messages\[1\]\.{key}: not text \(found {found}, expected a"
    ):
        load_dataset(file, checkpoint)


@pytest.mark.parametrize("effort", ["ultra", 5, ["high"]])
def test_an_unknown_effort_of_a_record_is_refused_whatever_the_template_takes(make_checkpoint, tmp_path, effort):
    folder = make_checkpoint([(4, 8)])
    (folder / "chat_template.jinja").write_text("{{ reasoning_effort }}{{ messages[0].content }}")
    file = write_jsonl(
        tmp_path / "d.jsonl", {"messages": [{"role": "user", "content": "1"}], "reasoning_effort": effort}
    )
    with pytest.raises(CalibrationError, match=r"d\.jsonl:1: reasoning_effort: unknown .*expected low, medium, high"):
        load_dataset(file, Checkpoint.open(folder))


def test_the_checkpoint_may_bring_its_own(checkpoint, make_checkpoint):
    folder = make_checkpoint([(4, 8)])
    write_jsonl(folder / "calibration.jsonl", {"input_ids": [1, 2]})
    assert ids_of(load_dataset(None, Checkpoint.open(folder))) == [[1, 2]]


def test_the_bundled_conversations_work_with_any_tokenizer(checkpoint, make_checkpoint):
    bundled = load_dataset(None, checkpoint)
    assert bundled.is_bundled
    assert len(bundled.sequences) == len(BUNDLED.read_text(encoding="utf-8").splitlines())
    rendered = [ChatTokenizer.from_folder(checkpoint.path).decode(ids) for ids in ids_of(bundled)]
    assert all(text.startswith("<|start|>system<|message|>effort: ") for text in rendered)
    assert {text[34:37] for text in rendered} == {"low", "med", "hig"}
    assert max(map(len, bundled.sequences)) <= 512  # cut at the model's limit, unasked
    plain = Checkpoint.open(make_checkpoint([(4, 8)]))
    (plain.path / "chat_template.jinja").unlink()
    texts = [ChatTokenizer.from_folder(plain.path).decode(ids) for ids in ids_of(load_dataset(None, plain))]
    assert not any("<|start|>" in text for text in texts)


def test_conversations_take_the_given_efforts_in_turn(checkpoint, tmp_path):
    messages = [{"role": "user", "content": "1"}]
    records = [{"messages": messages} for _ in range(4)] + [{"messages": messages, "reasoning_effort": "medium"}]
    file = write_jsonl(tmp_path / "d.jsonl", *records)
    decode = ChatTokenizer.from_folder(checkpoint.path).decode

    def efforts(dataset: CalibrationDataset) -> list[str]:
        return sorted(decode(ids).split("effort: ")[1].split("<")[0] for ids in ids_of(dataset))

    assert efforts(load_dataset(file, checkpoint)) == ["medium"] * 5
    assert efforts(load_dataset(file, checkpoint, efforts=["low", "high"])) == ["high"] * 2 + ["low"] * 2 + ["medium"]
    with pytest.raises(CalibrationError, match=r"efforts: unknown reasoning effort \(found max, expected low, medium"):
        load_dataset(file, checkpoint, efforts=["max"])


def test_a_template_that_prints_the_date_gives_the_same_tokens_every_day(make_checkpoint, tmp_path):
    folder = make_checkpoint([(4, 8)])
    template = folder / "chat_template.jinja"
    template.write_text('{{ strftime_now("%Y-%m-%d") }}' + template.read_text())
    file = write_jsonl(tmp_path / "d.jsonl", {"messages": [{"role": "user", "content": "1"}]})
    (ids,) = ids_of(load_dataset(file, Checkpoint.open(folder)))
    assert ChatTokenizer.from_folder(folder).decode(ids).startswith("2025-08-05<|start|>")


# -- sources -----------------------------------------------------------------------------------------------------------


RECORDS = [{"text": f"text {i}", "id": i} for i in range(30)]


def write_parquet(file: Path, records: list[dict[str, object]], **options: object) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), file, **options)
    return file


def test_parquet_gives_what_jsonl_gives(checkpoint, tmp_path):
    lines = write_jsonl(tmp_path / "d.jsonl", *RECORDS)
    rows = write_parquet(tmp_path / "d.parquet", RECORDS, row_group_size=7)
    for options in ({}, {"max_samples": 9, "seed": 3}):
        expected = load_dataset(lines, checkpoint, **options)
        assert load_dataset(rows, checkpoint, **options).fingerprint == expected.fingerprint
    question = [{"role": "user", "content": "1", "thinking": None}]  # Arrow fills absent keys with null
    chats = [{"messages": question, "input_ids": None}, {"messages": None, "input_ids": [5, 6]}]
    found = load_dataset(write_parquet(tmp_path / "c.parquet", chats), checkpoint)
    assert sorted(map(len, found.sequences))[0] == 2
    with pytest.raises(CalibrationError, match=r"e\.parquet: cannot be read as Parquet"):
        load_dataset(write_jsonl(tmp_path / "e.parquet", *RECORDS), checkpoint)


def test_of_parquet_only_the_columns_in_question_are_read(checkpoint, tmp_path):
    """So that what another column holds, text that is not UTF-8 say, does not matter."""
    damaged = pyarrow.array([b"\xff\xfe"]).view(pyarrow.string())
    columns = {"messages": [[{"role": "user", "content": "1"}]], "reasoning_effort": ["high"], "note": damaged}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "d.parquet")
    (ids,) = ids_of(load_dataset(tmp_path / "d.parquet", checkpoint))
    assert "effort: high" in ChatTokenizer.from_folder(checkpoint.path).decode(ids)
    with pytest.raises(CalibrationError, match=r"d\.parquet: cannot be read as Parquet: 'utf-8' codec"):
        load_dataset(tmp_path / "d.parquet", checkpoint, column="note")
    with pytest.raises(CalibrationError, match=r"d\.parquet: row 0: unknown record \(found \['messages', 'note'\]"):
        load_dataset(write_parquet(tmp_path / "d.parquet", [{"messages": "a", "note": "b"}]), checkpoint, column="q")
    masked = write_parquet(tmp_path / "m.parquet", [{"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0]}])
    assert ids_of(load_dataset(masked, checkpoint)) == [[5, 6]]


def test_a_folder_goes_through_the_datasets_library(checkpoint, tmp_path):
    folder = tmp_path / "chats"
    folder.mkdir()
    write_jsonl(folder / "train-0.jsonl", *RECORDS[:20])
    write_jsonl(folder / "train-1.jsonl", *RECORDS[20:])
    write_jsonl(folder / "validation-0.jsonl", {"text": "other", "id": 1})
    whole = load_dataset(folder, checkpoint)
    encode = ChatTokenizer.from_folder(checkpoint.path).encode
    assert sorted(ids_of(whole)) == sorted(encode(str(record["text"])) for record in RECORDS)
    few = load_dataset(folder, checkpoint, max_samples=5, seed=1)
    assert ids_of(few) == ids_of(load_dataset(folder, checkpoint, max_samples=5, seed=1))
    assert ids_of(few) != ids_of(load_dataset(folder, checkpoint, max_samples=5, seed=2))
    assert ids_of(load_dataset(folder, checkpoint, split="validation")) == [encode("other")]
    with pytest.raises(CalibrationError, match=r"chats \(test\): the dataset cannot be loaded: .*test"):
        load_dataset(folder, checkpoint, split="test")


def test_a_folder_of_parquet_files(checkpoint, tmp_path):
    write_parquet(tmp_path / "train-0.parquet", RECORDS)
    assert len(load_dataset(tmp_path, checkpoint).sequences) == 30


def test_a_name_goes_to_the_hub_with_its_config_and_split(checkpoint, monkeypatch):
    asked = []

    def deliver(name, config, *, split, streaming):
        asked.append((name, config, split, streaming))
        return datasets.IterableDataset.from_generator(lambda: iter(RECORDS))

    monkeypatch.setattr(datasets, "load_dataset", deliver)
    found = load_dataset("abisee/cnn_dailymail", checkpoint, dataset_config="3.0.0", split="test", max_samples=4)
    assert asked == [("abisee/cnn_dailymail", "3.0.0", "test", True)]
    assert len(found.sequences) == 4
    assert found.source == "abisee/cnn_dailymail"


def test_a_stream_that_breaks_off_is_one_line(checkpoint, monkeypatch):
    def break_off():
        yield from RECORDS
        raise ConnectionError("the hub went away\nat line 2")

    monkeypatch.setattr("puzzle_trtllm.calibration.records.SHUFFLE_BUFFER", 2)  # so that records come before it does
    stream = datasets.IterableDataset.from_generator(break_off)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: stream)
    message = r"^a/b \(train\): the dataset cannot be loaded: ConnectionError: the hub went away \(expected"
    with pytest.raises(CalibrationError, match=message):
        load_dataset("a/b", checkpoint)


def test_a_hub_that_cannot_be_reached_is_one_line(make_checkpoint, tmp_path):
    """The library's own failure, not an imitation: offline it refuses before it looks for a network."""
    command = [sys.executable, "-m", "puzzle_trtllm", "calibrate", "experts", str(make_checkpoint([(4, 8)]))]
    command += [str(tmp_path / "out.safetensors"), "--dataset", "nobody/nothing-of-this-name"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: nobody/nothing-of-this-name (train): the dataset cannot be loaded: ")
    assert not (tmp_path / "out.safetensors").exists()


def test_another_column(checkpoint, tmp_path):
    records = [{"article": "abc"}, {"article": [{"from": "human", "value": "1+1="}, {"from": "gpt", "value": "2"}]}]
    found = ids_of(load_dataset(write_jsonl(tmp_path / "d.jsonl", *records), checkpoint, column="article"))
    tokenizer = ChatTokenizer.from_folder(checkpoint.path)
    chat = "<|start|>system<|message|>effort: medium<|end|><|start|>user<|message|>1+1=<|end|>"
    assert sorted(found) == sorted(
        [tokenizer.encode("abc"), tokenizer.encode(f"{chat}<|start|>assistant<|message|>2<|end|>")]
    )
    both = write_jsonl(tmp_path / "b.jsonl", {"text": "a", "messages": [{"role": "user", "content": "b"}]})
    with pytest.raises(CalibrationError, match=r"unknown record .*--column names another"):
        load_dataset(both, checkpoint)
    assert ids_of(load_dataset(both, checkpoint, column="text")) == [tokenizer.encode("a")]


def test_another_models_tokenizer_is_refused_before_any_text(make_checkpoint, tmp_path):
    folder = make_checkpoint([(4, 8)], vocab_size=40)
    file = write_jsonl(tmp_path / "d.jsonl", {"text": ""}, {"text": "a"})
    with pytest.raises(
        CalibrationError, match=r"tokenizer\.json: has tokens outside .* \(found token id \d+, expected below 40\)"
    ):
        load_dataset(file, Checkpoint.open(folder))


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
        ('{"text": "\\ud800"}\n', "d.jsonl:1: not text that UTF-8 can hold"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}\n', "d.jsonl:1: not text that UTF-8 can hold"),
        ('{"text": "a", "text": "b"}\n', 'd.jsonl:1: not valid JSON: the key "text" occurs twice'),
        ("[" * 100_000 + "\n", "d.jsonl:1: not valid JSON: maximum recursion depth"),
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
    with pytest.raises(CalibrationError, match=r"found \.csv, expected \.jsonl, \.txt or \.parquet"):
        load_dataset(tmp_path / "d.csv", checkpoint)
    with pytest.raises(CalibrationError, match=r"none\.jsonl: missing"):
        load_dataset(tmp_path / "none.jsonl", checkpoint)
