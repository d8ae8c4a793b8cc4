"""Writing checkpoints: right bytes, experts apart, big shards linked, no tensor twice."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzle_trtllm.checkpoint import INDEX_NAME, Checkpoint
from puzzle_trtllm.checkpoint_writer import (
    PlannedTensor,
    bytes_to_write,
    copy_of,
    rewrite_checkpoint,
    rows_of,
    tensor_of,
    write_shards,
)
from puzzle_trtllm.tensors import TensorSpec, is_expert_tensor

BLOCKS = [(6, 16), (4, None)]
BLOCKS_TENSOR = "model.layers.0.mlp.experts.gate_up_proj_blocks"
SINKS = "model.layers.0.self_attn.sinks"


@pytest.fixture
def source(make_checkpoint):
    return Checkpoint.open(make_checkpoint(BLOCKS))


def shards_by_kind(checkpoint):
    """Shard names holding expert tensors, and those holding others."""
    experts = {e.file.name for n, e in checkpoint.tensors.items() if is_expert_tensor(n)}
    return experts, {e.file.name for n, e in checkpoint.tensors.items() if not is_expert_tensor(n)}


def collect(planned: PlannedTensor) -> bytes:
    return b"".join(chunk.tobytes() for chunk in planned.chunks())


@given(st.lists(st.integers(0, 5), max_size=8))
def test_rows_are_numpys_rows(source_session, rows):
    entry = source_session.entry(BLOCKS_TENSOR)
    planned = rows_of(entry, rows)
    expected = source_session.numpy(BLOCKS_TENSOR)[np.array(rows, dtype=int)]
    assert planned.spec.shape == expected.shape
    assert collect(planned) == expected.tobytes()


@pytest.fixture(scope="module")
def source_session(make_checkpoint):
    return Checkpoint.open(make_checkpoint(BLOCKS))


def test_a_copy_is_the_same_bytes(source):
    assert collect(copy_of(source.entry(BLOCKS_TENSOR))) == source.raw(BLOCKS_TENSOR).tobytes()


def test_a_scalar_stays_a_scalar():
    assert tensor_of("k_scale", "F32", np.array(2.0, dtype=np.float32)).spec.shape == ()


@settings(max_examples=25)
@given(st.integers(1_000, 400_000))
def test_shards_keep_experts_apart_and_below_the_limit(tmp_path_factory, source_session, limit):
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, [copy_of(e) for e in source_session.tensors.values()], max_shard_bytes=limit)
    (folder / "config.json").write_text(json.dumps(source_session.config))
    written = Checkpoint.open(folder)
    experts, others = shards_by_kind(written)
    assert not experts & others
    assert written.fingerprint() == source_session.fingerprint()
    for shard in experts | others:
        members = [e for e in written.tensors.values() if e.file.name == shard]
        assert sum(e.num_bytes for e in members) <= limit or len(members) == 1


def test_the_index_is_the_one_transformers_expects(source):
    index = json.loads((source.path / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == source.weight_bytes
    assert {name: entry.file.name for name, entry in source.tensors.items()} == index["weight_map"]


def test_a_plan_that_lies_is_our_own_bug(tmp_path):
    short = PlannedTensor(
        name="a", spec=TensorSpec(dtype="U8", shape=(4,)), chunks=lambda: [np.zeros(3, dtype=np.uint8)]
    )
    with pytest.raises(ValueError, match="3 bytes written, 4 planned"):
        write_shards(tmp_path, [short])
    twice = tensor_of("a", "U8", np.zeros(1, np.uint8))
    with pytest.raises(ValueError, match="planned twice"):
        write_shards(tmp_path, [twice, twice])


class TestRewrite:
    def rewrite(self, source, tmp_path, **arguments):
        out = tmp_path / "out"
        out.mkdir()
        rewrite_checkpoint(source, out, config=source.config, **{"replace": {}, **arguments})
        return Checkpoint.open(out)

    def test_expert_shards_are_the_same_file_on_disk(self, source, tmp_path):
        sinks = tensor_of(SINKS, "BF16", np.zeros(4, np.uint16))
        out = self.rewrite(source, tmp_path, replace={SINKS: sinks})
        assert out.entry(BLOCKS_TENSOR).file.stat().st_ino == source.entry(BLOCKS_TENSOR).file.stat().st_ino
        assert not out.numpy(SINKS).any()
        assert json.loads((out.path / INDEX_NAME).read_text())["metadata"]["total_size"] == source.weight_bytes
        for name in source.tensors:
            assert name == SINKS or out.raw(name).tobytes() == source.raw(name).tobytes(), name

    def test_progress_counts_what_was_written_not_what_was_linked(self, source, tmp_path):
        written: list[int] = []
        self.rewrite(source, tmp_path, progress=written.append)
        others = sum(e.num_bytes for n, e in source.tensors.items() if not is_expert_tensor(n))
        assert sum(written) == others

    def test_a_mixed_folder_is_resharded(self, source, tmp_path):
        pytest.importorskip("torch")
        torch_io = pytest.importorskip("safetensors.torch")
        tensors = {name: source.torch(name) for name in source.tensors}
        for file in [*source.path.glob("*.safetensors"), source.path / INDEX_NAME]:
            file.unlink()
        torch_io.save_file(tensors, source.path / "model.safetensors")
        out = self.rewrite(Checkpoint.open(source.path), tmp_path)
        experts, others = shards_by_kind(out)
        assert experts and others and not experts & others
        for name, expected in tensors.items():
            assert out.torch(name).equal(expected), name

    def test_unknown_names_are_our_own_bug(self, source, tmp_path):
        with pytest.raises(ValueError, match="not in the checkpoint"):
            self.rewrite(source, tmp_path, replace={"nothing": None})


def test_companions_are_copied_not_linked(source, tmp_path):
    rewrite_checkpoint(source, tmp_path, config=source.config, replace={})
    for file in source.companion_files():
        copy = tmp_path / file.name
        assert copy.read_bytes() == file.read_bytes() and not copy.samefile(file)


def test_what_cannot_be_linked_is_written(source, tmp_path):
    """Shards with other tensors than experts, and all that lies on another disk, also behind links."""
    _, others = shards_by_kind(source)
    mixed = sum(e.num_bytes for e in source.tensors.values() if e.file.name in others)
    assert bytes_to_write(source, source.path.parent / "new" / "out") == mixed < source.weight_bytes
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other_disk:
        assert bytes_to_write(source, Path(other_disk) / "out") == source.weight_bytes
        there = Path(other_disk) / "there"
        shutil.copytree(source.path, there)
        (tmp_path / "links").mkdir()
        for file in there.iterdir():
            (tmp_path / "links" / file.name).symlink_to(file)
        linked = Checkpoint.open(tmp_path / "links")
        assert bytes_to_write(linked, tmp_path / "out") == source.weight_bytes
        assert bytes_to_write(linked, Path(other_disk) / "out") == mixed
