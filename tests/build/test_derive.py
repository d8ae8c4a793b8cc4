"""Deriving a child: kept experts byte for byte, everything else untouched, wrong inputs refused without a trace."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import puzzle_trtllm.build.derive
import puzzle_trtllm.output_folder
from puzzle_trtllm.build.derivation import read_derivation
from puzzle_trtllm.build.derive import derive
from puzzle_trtllm.build.importance import best_experts
from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.checkpoint_writer import rewrite_checkpoint, tensor_of
from puzzle_trtllm.errors import ArchitectureError, CheckpointError, ConfigError, PuzzleError
from puzzle_trtllm.tensors import is_expert_tensor

PARENT_BLOCKS = [(6, 16), (6, None), (6, 16)]
CHILD_BLOCKS = [(4, 16), (6, 40), (3, None)]
SCORES = [[5, 1, 3, 9, 2, 7], [1, 2, 3, 4, 5, 6], [0.5, 0.5, 0.5, 0.5, 0.25, 0.5]]
KEPT = [[0, 2, 3, 5], [0, 1, 2, 3, 4, 5], [0, 1, 2]]
"""Worked out by hand: the 4 largest of layer 0; all of layer 1; in layer 2 ties go to the lower index."""


@pytest.fixture
def parent(make_checkpoint):
    return make_checkpoint(PARENT_BLOCKS)


@pytest.fixture
def inputs(parent, write_architecture, write_importance):
    importance = write_importance(SCORES, fingerprint=Checkpoint.open(parent).fingerprint())
    return {"architecture": write_architecture(CHILD_BLOCKS), "importance": importance}


def library_tensors(folder: Path) -> dict[str, object]:
    """Oracle: what the safetensors library reads, all shards together."""
    load_file = pytest.importorskip("safetensors.torch").load_file
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def expected_child(parent: Path) -> dict[str, object]:
    """Oracle: the parent's tensors, rows picked with torch's indexing."""
    expected = {}
    for name, tensor in library_tensors(parent).items():
        parts = name.split(".")
        per_expert = len(parts) > 4 and parts[3] == "mlp"
        expected[name] = tensor[KEPT[int(parts[2])]] if per_expert else tensor
    return expected


def assert_same_tensors(found, expected) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].equal(tensor), name


@given(st.lists(st.sampled_from([0.0, 0.25, 1.0, -1.0, float("inf")]), min_size=1, max_size=12), st.data())
def test_best_experts_by_definition(scores, data):
    count = data.draw(st.integers(1, len(scores)))
    kept = best_experts(np.array(scores, dtype=np.float32), count)
    assert len(kept) == count and list(kept) == sorted(set(kept))
    for inside in kept:
        for outside in set(range(len(scores))) - set(kept):
            assert scores[inside] > scores[outside] or (scores[inside] == scores[outside] and inside < outside)


class TestTheChild:
    @pytest.mark.parametrize("experts_format", ["mxfp4", "bf16"])
    def test_is_the_parents_rows_byte_for_byte(
        self, make_checkpoint, write_architecture, write_importance, tmp_path, experts_format
    ):
        parent = make_checkpoint(PARENT_BLOCKS, experts_format=experts_format)
        derive(
            parent,
            tmp_path / "child",
            architecture=write_architecture(CHILD_BLOCKS),
            importance=write_importance(SCORES),
        )
        assert_same_tensors(library_tensors(tmp_path / "child"), expected_child(parent))

    def test_is_the_same_from_any_sharding(self, make_checkpoint, inputs, tmp_path):
        parent = make_checkpoint(PARENT_BLOCKS, max_shard_bytes=15_000)
        assert len(list(parent.glob("*.safetensors"))) > 5
        derive(parent, tmp_path / "child", **inputs, max_shard_bytes=10_000)
        assert_same_tensors(library_tensors(tmp_path / "child"), expected_child(parent))

    def test_has_the_blocks_that_were_asked_for(self, parent, inputs, tmp_path):
        derive(parent, tmp_path / "child", **inputs)
        child, source = Checkpoint.open(tmp_path / "child"), Checkpoint.open(parent)
        child.validate()
        assert [(b.num_local_experts, b.sliding_window) for b in child.architecture.blocks] == CHILD_BLOCKS
        assert child.architecture == source.architecture.with_blocks(child.architecture.blocks)
        assert child.config["model_type"] == "gpt_oss_puzzle"
        assert child.config["architectures"] == ["GptOssPuzzleForCausalLM"]
        assert child.config["layer_types"] == ["sliding_attention", "sliding_attention", "full_attention"]
        assert child.config["quantization_config"] == source.config["quantization_config"]

    @pytest.mark.parametrize("form", ["nested", "per_layer_config"])
    def test_says_its_blocks_in_the_flat_form_whatever_its_parents_is(
        self, parent, inputs, write_importance, tmp_path, form
    ):
        """ModelOpt nests `block_configs`; the `per_layer_config` of transformers would compete with them."""
        config = json.loads((parent / "config.json").read_text())
        if form == "nested":
            config["block_configs"] = [
                {"attention": {"sliding_window": window}, "ffn": {"moe": {"num_local_experts": experts}}}
                for experts, window in PARENT_BLOCKS
            ]
        else:
            config["per_layer_config"] = {
                str(layer): {"num_local_experts": experts, "sliding_window": window}
                for layer, (experts, window) in enumerate(PARENT_BLOCKS)
            }
        (parent / "config.json").write_text(json.dumps(config))
        inputs["importance"] = write_importance(SCORES)  # the fingerprint holds the config
        derive(parent, tmp_path / "child", **inputs)
        written = json.loads((tmp_path / "child" / "config.json").read_text())
        assert [(b["num_local_experts"], b["sliding_window"]) for b in written["block_configs"]] == CHILD_BLOCKS
        assert all(set(block) == {"num_local_experts", "sliding_window"} for block in written["block_configs"])
        assert "per_layer_config" not in written

    def test_keeps_experts_in_shards_of_their_own(self, parent, inputs, tmp_path):
        derive(parent, tmp_path / "child", **inputs, max_shard_bytes=20_000)
        child = Checkpoint.open(tmp_path / "child")
        kinds: dict[str, set[bool]] = {}
        for name, entry in child.tensors.items():
            kinds.setdefault(entry.file.name, set()).add(is_expert_tensor(name))
        assert all(len(kind) == 1 for kind in kinds.values())

    def test_brings_tokenizer_and_code_along(self, parent, inputs, tmp_path):
        derive(parent, tmp_path / "child", **inputs)
        child = tmp_path / "child"
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
            assert (child / name).read_bytes() == (parent / name).read_bytes()
        for module in json.loads((child / "config.json").read_text())["auto_map"].values():
            assert (child / f"{module.split('.')[0]}.py").is_file()

    def test_edited_in_place_leaves_the_parent_alone(self, parent, inputs, tmp_path):
        before = (parent / "generation_config.json").read_bytes()
        derive(parent, tmp_path / "child", **inputs)
        with (tmp_path / "child" / "generation_config.json").open("r+") as file:
            file.write("{ }")
        assert (parent / "generation_config.json").read_bytes() == before

    def test_carries_kv_scales_along(self, make_checkpoint, write_architecture, write_importance, tmp_path):
        parent = make_checkpoint(PARENT_BLOCKS, kv_scales=[(0.5, 2.0)] * 3)
        arguments = {"architecture": write_architecture(CHILD_BLOCKS), "importance": write_importance(SCORES)}
        derive(parent, tmp_path / "child", **arguments)
        child = Checkpoint.open(tmp_path / "child")
        assert {key: float(child.numpy(e.name)) for key, e in child.kv_scales.items()} == {
            (layer, kind): scale for layer in range(3) for kind, scale in (("k", 0.5), ("v", 2.0))
        }
        assert (tmp_path / "child" / "hf_quant_config.json").is_file()

    def test_may_itself_be_a_parent(self, parent, inputs, tmp_path, write_architecture, write_importance):
        derive(parent, tmp_path / "child", **inputs)
        blocks = [(2, 16), (2, 40), (2, 8)]
        scores = [[0, 9, 0, 8], [1, 2, 3, 4, 5, 6], [1, 0, 1]]
        record = derive(
            tmp_path / "child",
            tmp_path / "grandchild",
            architecture=write_architecture(blocks),
            importance=write_importance(scores),
        )
        assert record.kept_experts == [[1, 3], [4, 5], [0, 2]]
        grandchild, source = Checkpoint.open(tmp_path / "grandchild"), Checkpoint.open(parent)
        router = "model.layers.0.mlp.router.weight"
        np.testing.assert_array_equal(grandchild.numpy(router), source.numpy(router)[[2, 5]])


class TestTheRecord:
    def test_says_what_was_kept_and_from_where(self, parent, inputs, tmp_path):
        record = derive(parent, tmp_path / "child", **inputs)
        assert read_derivation(tmp_path / "child") == record
        assert record.kept_experts == KEPT
        assert record.parent_fingerprint == Checkpoint.open(parent).fingerprint()
        assert record.child_fingerprint == Checkpoint.open(tmp_path / "child").fingerprint()
        assert Path(record.parent_path) == parent
        assert record.importance.metadata["method"] == "test"
        assert record.block_configs == json.loads(inputs["architecture"].read_text())["block_configs"]
        assert (record.dropped_tensors, record.warnings) == ({}, [])

    def test_names_dropped_tensors_with_the_reason(self, parent, tmp_path, inputs, write_importance):
        name = "model.layers.0.self_attn.rotary_emb.inv_freq"
        source = Checkpoint.open(parent)
        old = tmp_path / "old"
        old.mkdir()
        extra = tensor_of(name, "F32", np.ones(8, np.float32))
        rewrite_checkpoint(source, old, config=source.config, replace={}, add=[extra])
        record = derive(old, tmp_path / "child", **inputs)
        assert record.dropped_tensors == {name: "computed from config.json"}
        assert_same_tensors(library_tensors(tmp_path / "child"), expected_child(parent))

    def test_warns_when_the_importance_names_no_parent(self, parent, inputs, write_importance, tmp_path):
        inputs["importance"] = write_importance(SCORES)
        record = derive(parent, tmp_path / "child", **inputs)
        assert len(record.warnings) == 1 and "parent_fingerprint" in record.warnings[0]


class TestRefusals:
    """Each is one line, and nothing is left where the child was expected."""

    @pytest.fixture(autouse=True)
    def _setup(self, parent, inputs, tmp_path):
        self.parent, self.inputs, self.out = parent, inputs, tmp_path / "results" / "child"
        self.out.parent.mkdir()

    def refused(self, error: type[PuzzleError], match: str) -> None:
        before = {file: file.read_bytes() for file in self.parent.iterdir()}
        with pytest.raises(error, match=match) as caught:
            derive(self.parent, self.out, **self.inputs)
        assert "\n" not in str(caught.value)
        assert list(self.out.parent.iterdir()) == []
        assert {file: file.read_bytes() for file in self.parent.iterdir()} == before

    def test_importance_of_another_model(self, write_importance):
        self.inputs["importance"] = write_importance(SCORES, fingerprint="sha256:0")
        self.refused(ConfigError, r"parent_fingerprint: made for another model .found sha256:0, expected sha256:")

    def test_importance_with_another_expert_count(self, write_importance):
        self.inputs["importance"] = write_importance([SCORES[0], SCORES[1][:5], SCORES[2]])
        self.refused(ConfigError, r"layers\.1\..*wrong number of experts.*found F32 \[5\], expected F32 \[6\]")

    def test_importance_without_a_layer(self, write_importance):
        self.inputs["importance"] = write_importance(SCORES[:2], layers=[0, 2])
        self.refused(ConfigError, r"layers\.1\.mlp\.experts\.importance: missing layer")

    def test_importance_of_another_dtype(self, write_importance):
        self.inputs["importance"] = write_importance(SCORES, dtype="F64")
        self.refused(ConfigError, r"found F64 \[6\], expected F32 \[6\]")

    def test_importance_with_nan(self, write_importance):
        self.inputs["importance"] = write_importance([SCORES[0], [1, 2, float("nan"), 4, 5, 6], SCORES[2]])
        self.refused(ConfigError, r"layers\.1\..*importance is NaN .found expert 2")

    def test_importance_that_is_no_safetensors_file(self, tmp_path):
        (tmp_path / "x.safetensors").write_text("scores")
        self.inputs["importance"] = tmp_path / "x.safetensors"
        self.refused(ConfigError, r"x\.safetensors: truncated")

    def test_importance_that_is_not_there(self, tmp_path):
        self.inputs["importance"] = tmp_path / "x.safetensors"
        self.refused(ConfigError, r"x\.safetensors: cannot be read")

    def test_more_experts_than_the_parent_has(self, write_architecture):
        self.inputs["architecture"] = write_architecture([(7, 16), (6, None), (6, 16)])
        self.refused(ArchitectureError, r"block_configs\[0\].num_local_experts: impossible expert count .found 7")

    def test_another_number_of_layers(self, write_architecture):
        self.inputs["architecture"] = write_architecture([(4, 16)])
        self.refused(ArchitectureError, "wrong number of layers .found 1, expected 3")

    def test_a_truncated_shard(self):
        shard = sorted(self.parent.glob("*.safetensors"))[-1]
        shard.write_bytes(shard.read_bytes()[:-7])
        self.refused(CheckpointError, rf"{shard.name}: .*truncated")

    def test_a_missing_shard(self):
        shard = sorted(self.parent.glob("*.safetensors"))[0]
        shard.unlink()
        self.refused(CheckpointError, rf"{shard.name}: .*missing shard")

    def test_a_tensor_that_nobody_knows(self, tmp_path):
        source, odd = Checkpoint.open(self.parent), tmp_path / "odd"
        odd.mkdir()
        extra = tensor_of("model.layers.0.mystery", "U8", np.ones(3, np.uint8))
        rewrite_checkpoint(source, odd, config=source.config, replace={}, add=[extra])
        self.parent = odd
        self.refused(CheckpointError, r"model\.layers\.0\.mystery: no such tensor")

    def test_a_full_disk_is_noticed_before_the_first_byte(self, monkeypatch):
        usage = shutil.disk_usage(self.parent)._replace(free=1000)
        monkeypatch.setattr(puzzle_trtllm.output_folder.shutil, "disk_usage", lambda folder: usage)
        monkeypatch.setattr("puzzle_trtllm.build.derive.write_shards", lambda *a, **k: pytest.fail("wrote"))
        self.refused(PuzzleError, r"not enough disk space .found 0\.00 GiB")

    def test_a_disk_that_fills_up_in_the_middle(self, monkeypatch):
        def fail(num_bytes: int) -> None:
            raise OSError(28, "No space left on device")

        write_shards = puzzle_trtllm.build.derive.write_shards
        monkeypatch.setattr(
            "puzzle_trtllm.build.derive.write_shards", lambda *a, **k: write_shards(*a, **{**k, "progress": fail})
        )
        self.refused(PuzzleError, "No space left on device")

    @pytest.mark.parametrize("option", ["architecture", "importance"])
    def test_an_output_that_would_replace_what_it_is_made_from(self, tmp_path, option):
        (tmp_path / "kept").mkdir()
        file = Path(shutil.copy(self.inputs[option], tmp_path / "kept"))
        with pytest.raises(PuzzleError, match=rf"would replace a file it is made from \(found {file}"):
            derive(self.parent, tmp_path / "kept", **{**self.inputs, option: file}, overwrite=True)
        assert file.is_file()

    @pytest.mark.parametrize("out", [".", ".."])
    def test_an_output_that_would_replace_the_parent(self, out):
        before = {file: file.read_bytes() for file in self.parent.iterdir()}
        with pytest.raises(PuzzleError, match="would replace the checkpoint it is made from"):
            derive(self.parent, self.parent / out, **self.inputs, overwrite=True)
        assert {file: file.read_bytes() for file in self.parent.iterdir()} == before

    def test_an_existing_folder_is_kept_unless_overwritten(self):
        derive(self.parent, self.out, **self.inputs)
        marker = self.out / "mine"
        marker.write_text("")
        with pytest.raises(PuzzleError, match="exists and is not empty"):
            derive(self.parent, self.out, **self.inputs)
        assert marker.exists()
        derive(self.parent, self.out, **self.inputs, overwrite=True)
        assert not marker.exists() and list(self.out.parent.iterdir()) == [self.out]


def test_progress_and_warnings_go_to_stderr(parent, inputs, write_importance, tmp_path, capsys):
    inputs["importance"] = write_importance(SCORES)
    derive(parent, tmp_path / "child", **inputs, quiet=False)
    captured = capsys.readouterr()
    assert captured.out == "" and "warning: " in captured.err and "parent_fingerprint" in captured.err
    derive(parent, tmp_path / "child", **inputs, overwrite=True)
    assert capsys.readouterr() == ("", "")
