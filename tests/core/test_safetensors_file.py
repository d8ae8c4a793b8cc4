"""safetensors headers: ours and the safetensors library's are one format, and nothing in a header is trusted."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzle_trtllm.checkpoint_writer import tensor_of, write_shards
from puzzle_trtllm.errors import CheckpointError
from puzzle_trtllm.safetensors_file import encode_header, read_header

NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
DTYPES = st.sampled_from([("U8", np.uint8), ("F32", np.float32), ("I64", np.int64), ("F16", np.float16)])


def write(file: Path, header: object, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return file


def tensor(start: int, end: int, shape: list[int] | None = None, dtype: str = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


@settings(max_examples=60)
@given(st.dictionaries(NAMES, st.tuples(SHAPES, DTYPES), min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_what_we_write_the_library_reads(tmp_path_factory, tensors, random):
    load_file = pytest.importorskip("safetensors.numpy").load_file
    rng = np.random.default_rng(random.randrange(2**32))
    arrays = {
        name: rng.integers(0, 100, shape).astype(numpy_dtype) for name, (shape, (_, numpy_dtype)) in tensors.items()
    }
    folder = tmp_path_factory.mktemp("written")
    write_shards(folder, [tensor_of(name, tensors[name][1][0], array) for name, array in arrays.items()])
    loaded = load_file(folder / "model-00001-of-00001.safetensors")
    assert set(loaded) == set(arrays)
    for name, array in arrays.items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[name], array)


@settings(max_examples=60)
@given(st.dictionaries(NAMES, st.tuples(SHAPES, DTYPES), max_size=5), st.dictionaries(NAMES, st.text(max_size=5)))
def test_what_the_library_writes_we_read(tmp_path_factory, tensors, metadata):
    save_file = pytest.importorskip("safetensors.numpy").save_file
    arrays = {
        name: np.arange(np.prod(shape), dtype=numpy_dtype).reshape(shape)
        for name, (shape, (_, numpy_dtype)) in tensors.items()
    }
    file = tmp_path_factory.mktemp("library") / "model.safetensors"
    save_file(arrays, file, metadata=metadata or None)
    entries, found_metadata = read_header(file)
    assert found_metadata == metadata
    data = file.read_bytes()
    for name, array in arrays.items():
        entry = entries[name]
        assert (entry.dtype, entry.shape) == (tensors[name][1][0], array.shape)
        assert data[entry.offset : entry.offset + entry.num_bytes] == array.tobytes()


def test_header_is_aligned_for_memory_mapping():
    for length in range(1, 20):
        assert len(encode_header({"n" * length: ("F32", (2,))})) % 8 == 0


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"{not json", b"", "corrupt header"),
        (b"[]", b"", "not an object"),
        (b"[" * 200_000, b"", "corrupt header: .*recursion"),
        ({"__metadata__": ["format"]}, b"", "__metadata__: must be a mapping .found list"),
        ({"__metadata__": {"format": "pt", "step": 3}}, b"", r"__metadata__\.step: must be text .found int"),
        ({"a": {"dtype": ["U8"], "shape": [2], "data_offsets": [0, 2]}}, b"xx", r"a: unknown dtype .found \['U8'\]"),
        (b"\xff\xfe", b"", "corrupt header"),
        (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
         b"xx", "a: occurs twice"),
        ({"a": {"dtype": "U8", "shape": [2]}}, b"xx", "a: corrupt header entry"),
        ({"a": {"dtype": "U8", "shape": [-2], "data_offsets": [0, 2]}}, b"xx", "a: corrupt header entry"),
        ({"a": {"dtype": "U8", "shape": ["2"], "data_offsets": [0, 2]}}, b"xx", "a: corrupt header entry"),
        ({"a": {"dtype": "U8", "shape": [2], "data_offsets": [2, 0]}}, b"xx", "a: corrupt header entry"),
        ({"a": {"dtype": "U8", "shape": [10**4000] * 2, "data_offsets": [0, 2]}}, b"xx", "a: corrupt header entry"),
        ({"a": {"dtype": "U8", "shape": [2**62] * 300, "data_offsets": [0, 2]}}, b"xx", "a: corrupt header entry"),
        ({"a": 7}, b"", "a: corrupt header entry"),
        ({"a": tensor(0, 2, dtype="F4")}, b"xx", "a: unknown dtype .found F4"),
        ({"a": tensor(0, 2, shape=[3])}, b"xx", "does not fit the shape .found 2, expected 3"),
        ({"a": tensor(0, 2), "b": tensor(1, 3)}, b"xxx", "b: overlaps"),
        ({"a": tensor(0, 2), "b": tensor(3, 4)}, b"xxxx", "b: a hole"),
        ({"a": tensor(0, 8)}, b"xx", "a: the file is truncated"),
        ({"a": tensor(0, 2)}, b"xxx", "bytes after the last tensor"),
    ],
)  # fmt: skip
def test_a_damaged_header_is_one_line(tmp_path, header, data, message):
    file = write(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\x01\x02", struct.pack("<Q", 2**40) + b"{}", struct.pack("<Q", 100) + b"{"])
def test_a_file_cut_in_its_header(tmp_path, content):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="truncated"):
        read_header(file)


def test_what_a_clone_without_git_lfs_has_in_its_place(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4792272488\n")
    with pytest.raises(CheckpointError, match="a Git LFS pointer, not the file itself"):
        read_header(file)


@settings(max_examples=100)
@given(st.data())
def test_any_cut_of_a_good_file_is_noticed(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cut")
    write_shards(
        folder, [tensor_of("a", "F32", np.ones((2, 3), np.float32)), tensor_of("b", "U8", np.ones(5, np.uint8))]
    )
    file = folder / "model-00001-of-00001.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(CheckpointError):
        read_header(file)
