"""A trace is read as it is written, and the first thing wrong in it is named with its line."""

from __future__ import annotations

import hashlib
import json
import os
import threading

import pytest

from puzzle_trtllm.errors import ConfigError
from puzzle_trtllm.trace import read_trace

MOONCAKE = [
    {"timestamp": 27482, "input_length": 1200, "output_length": 52, "hash_ids": [46, 47, 48]},
    {"timestamp": 27982, "input_length": 600, "output_length": 7, "hash_ids": [46, 90]},
    {"timestamp": 30482, "input_length": 1, "output_length": 9, "hash_ids": [91]},
]


def written(tmp_path, lines):
    file = tmp_path / "trace.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return file


def test_the_mooncake_form_starts_at_its_first_arrival(tmp_path):
    trace = read_trace(written(tmp_path, MOONCAKE))
    assert [request.time_ns for request in trace.requests] == [0, 500_000_000, 3_000_000_000]
    assert [(r.input_length, r.output_length, r.hash_ids) for r in trace.requests][1] == (600, 7, (46, 90))
    assert (trace.has_times, len(trace.sha256), trace.ignored_keys) == (True, 64, ())


def test_a_pipe_is_read_once_and_its_whole_content_hashed(tmp_path):
    """`bench --trace <(zcat trace.gz)` had the hash of nothing."""
    content = b'{"input_length": 3, "output_length": 1}\n' * 3
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(content), daemon=True)
    writer.start()
    trace = read_trace(pipe, max_requests=1)
    writer.join()
    assert trace.sha256 == hashlib.sha256(content).hexdigest()


def test_other_units_other_blocks_and_keys_that_are_not_replayed(tmp_path):
    line = {"timestamp": 1.5, "input_length": 33, "output_length": 2, "hash_ids": [1, 2, 3], "type": "chat", "turn": 1}
    trace = read_trace(written(tmp_path, [line, line | {"timestamp": 2}]), time_unit="s", block_tokens=16)
    assert [request.time_ns for request in trace.requests] == [0, 500_000_000]
    assert trace.ignored_keys == ("turn", "type")


def test_prompts_as_ids_or_text_and_no_moments(tmp_path):
    lines = [{"input_ids": [5, 6], "output_length": 2}, "", {"text_input": "12+30=", "output_length": 3}]
    first, second = read_trace(written(tmp_path, lines)).requests
    assert (list(first.input_ids), second.text_input, first.time_ns) == ([5, 6], "12+30=", None)


def test_limits_take_the_first_requests_or_seconds(tmp_path):
    file = written(tmp_path, MOONCAKE)
    assert len(read_trace(file, max_requests=2).requests) == 2
    assert len(read_trace(file, max_seconds=0.5).requests) == 2
    assert len(read_trace(file, max_seconds=0.4).requests) == 1


def test_a_byte_order_mark_is_no_part_of_it(tmp_path):
    file = written(tmp_path, MOONCAKE)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert read_trace(file).requests == read_trace(written(tmp_path, MOONCAKE)).requests


GOOD = {"timestamp": 5, "input_length": 3, "output_length": 2}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["nonsense"], r"trace\.jsonl:1: not JSON"),
        (["[1]"], r"trace\.jsonl:1: .*dictionary"),
        ([GOOD, {"timestamp": 6, "input_length": 3}], r"trace\.jsonl:2: output_length: Field required"),
        ([GOOD | {"output_length": 0}], r"output_length: .*greater than or equal to 1 \(found 0"),
        ([GOOD | {"input_length": "3"}], r"input_length: .*valid integer"),
        ([{"output_length": 2}], r"needs one prompt \(found none, expected input_length, input_ids, text_input"),
        ([GOOD | {"text_input": "x"}], r"needs one prompt \(found input_length and text_input"),
        ([GOOD, GOOD | {"timestamp": 4}], r"trace\.jsonl:2: timestamp: falls back"),
        ([GOOD, {"input_length": 3, "output_length": 2}], r"trace\.jsonl:2: timestamp: must stand in every line"),
        ([GOOD | {"hash_ids": [1, 2]}], r"hash_ids: do not fit blocks of 512 tokens \(found 2 ids for input_length 3"),
        ([{"input_ids": [2**40], "output_length": 1}], r"input_ids: not 32-bit"),
        ([{"input_ids": [3, -5], "output_length": 1}], r"input_ids: no token id \(found -5, expected 0 or more"),
        ([GOOD | {"timestamp": 1e308}], r"trace\.jsonl:1: timestamp: .*less than or equal to 10{20} \(found 1e\+308"),
        ([GOOD, '{"output_length": ' + "9" * 5000 + "}"], r"trace\.jsonl:2: not readable: .*\(4300"),
        ([GOOD, '{"input_length": 3, "input_length": 4}'], r'trace\.jsonl:2: .*key "input_length" occurs twice'),
        ([GOOD | {"output_length": 2**31}], r"output_length: .*less than or equal to 2147483647"),
        ([GOOD, "[" * 100_000], r"trace\.jsonl:2: not readable: .*recursion"),
        ([{"input_ids": [1], "hash_ids": [1], "output_length": 1}], r"hash_ids: belongs to input_length"),
        ([], r"trace\.jsonl: holds no request"),
    ],
)
def test_the_first_thing_wrong_is_one_line(tmp_path, lines, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read_trace(written(tmp_path, lines))
    assert "\n" not in str(caught.value)


def test_a_span_of_time_needs_moments_and_a_file_must_be_there(tmp_path):
    with pytest.raises(ConfigError, match="timestamp: missing"):
        read_trace(written(tmp_path, [{"input_length": 3, "output_length": 2}]), max_seconds=1)
    with pytest.raises(ConfigError, match=r"nowhere\.jsonl: cannot be read"):
        read_trace(tmp_path / "nowhere.jsonl")
