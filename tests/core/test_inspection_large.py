"""A checkpoint of the true size (of sparse files): opening and inspecting it reads its headers and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from puzzle_trtllm.architecture import PuzzleArchitecture
from puzzle_trtllm.checkpoint import INDEX_NAME
from puzzle_trtllm.inspection import inspect
from puzzle_trtllm.safetensors_file import encode_header
from puzzle_trtllm.tensors import TensorSpec, tensor_table

CHILD_CONFIG = Path(__file__).parents[1] / "data" / "gpt-oss-puzzle-88b.config.json"
IO_COUNTERS = Path("/proc/self/io")


@pytest.fixture
def large_checkpoint(tmp_path) -> Path:
    """The released child in 11 shards: true headers, and holes where 46.56 GiB of data would be."""
    config = json.loads(CHILD_CONFIG.read_text())
    tensors = list(tensor_table(PuzzleArchitecture.from_config(config)).items())
    weight_map: dict[str, str] = {}
    for number in range(11):
        shard: dict[str, TensorSpec] = dict(tensors[number::11])
        name = f"model-{number + 1:05d}-of-00011.safetensors"
        header = encode_header({n: (s.dtype, s.shape) for n, s in shard.items()})
        (tmp_path / name).write_bytes(header)
        with (tmp_path / name).open("r+b") as stream:
            stream.truncate(len(header) + sum(s.num_bytes for s in shard.values()))
        weight_map.update(dict.fromkeys(shard, name))
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tmp_path


@pytest.mark.skipif(not IO_COUNTERS.exists(), reason="counts the bytes of read calls where Linux tells them")
def test_inspect_reads_headers_only(large_checkpoint):
    def bytes_read() -> int:
        return int(IO_COUNTERS.read_text().split()[1])  # rchar: all read calls, from the page cache too

    before = bytes_read()
    value = inspect(large_checkpoint).to_json()
    assert bytes_read() - before < 2**20
    assert f"{value['weight_bytes'] / 2**30:.2f}" == "46.56"  # as published
