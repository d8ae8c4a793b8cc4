"""A child that someone else made: its experts are found by their bytes, exactly; what was trained on is listed."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzle_trtllm.build import match_experts as matching
from puzzle_trtllm.build.derive import derive
from puzzle_trtllm.build.verify import verify
from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.checkpoint_writer import PlannedTensor, rewrite_checkpoint, rows_of, tensor_of
from puzzle_trtllm.errors import CheckpointError
from tests.front_door.cli import assert_user_error, invoke, last_json

PARENT_BLOCKS = [(6, 16), (6, None)]
CHILD_BLOCKS = [(4, 16), (3, 40)]
SCORES = [[5, 1, 3, 9, 2, 7], [1, 9, 3, 8, 7, 2]]
KEPT = ((0, 2, 3, 5), (1, 3, 4))
"""Worked out by hand: the largest scores of each layer."""

ROUTER = "model.layers.0.mlp.router.weight"
BLOCKS = "model.layers.0.mlp.experts.gate_up_proj_blocks"


@pytest.fixture
def parent(make_checkpoint) -> Path:
    return make_checkpoint(PARENT_BLOCKS)


@pytest.fixture
def child(parent, write_architecture, write_importance, tmp_path) -> Path:
    """Without its record, as from someone else."""
    arguments = {"architecture": write_architecture(CHILD_BLOCKS), "importance": write_importance(SCORES)}
    derive(parent, tmp_path / "child", **arguments)
    (tmp_path / "child" / "derivation.json").unlink()
    return tmp_path / "child"


def changed(folder: Path, replace: dict[str, PlannedTensor]) -> Path:
    """A copy of the folder with some tensors replaced."""
    source, out = Checkpoint.open(folder), folder.with_name(f"{folder.name}-changed")
    out.mkdir()
    rewrite_checkpoint(source, out, config=source.config, replace=replace)
    return out


def bits_flipped(folder: Path, name: str, byte: int) -> PlannedTensor:
    entry = Checkpoint.open(folder).entry(name)
    values = np.array(Checkpoint.open(folder).raw(name))
    values[byte] ^= 1
    dtype = np.uint16 if entry.dtype == "BF16" else np.uint8
    return tensor_of(name, entry.dtype, values.view(dtype).reshape(entry.shape))


def permuted(folder: Path, layer: int, order: list[int]) -> Path:
    """The child with the experts of one layer in another order, router included."""
    source = Checkpoint.open(folder)
    names = [name for name in source.tensors if name.startswith(f"model.layers.{layer}.mlp.")]
    return changed(folder, {name: rows_of(source.entry(name), order) for name in names})


def test_the_kept_experts_are_found(child, parent):
    report = verify(child, against=parent)
    checkpoint = Checkpoint.open(child)
    assert report.identical and not report.has_record
    assert report.kept_experts == KEPT
    assert (report.retrained, report.config_changes) == ((), ())
    assert (report.num_tensors, report.num_bytes) == (len(checkpoint.tensors), checkpoint.weight_bytes)


def test_bf16_experts_too(make_checkpoint, write_architecture, write_importance, tmp_path):
    parent = make_checkpoint(PARENT_BLOCKS, experts_format="bf16")
    arguments = {"architecture": write_architecture(CHILD_BLOCKS), "importance": write_importance(SCORES)}
    derive(parent, tmp_path / "child", **arguments)
    (tmp_path / "child" / "derivation.json").unlink()
    assert verify(tmp_path / "child", against=parent).kept_experts == KEPT


def test_the_whole_parent_is_a_subset_of_itself(parent):
    assert verify(parent, against=parent).kept_experts == (tuple(range(6)),) * 2


@settings(max_examples=10)
@given(order=st.permutations(range(4)))
def test_in_any_order(order, make_checkpoint, tmp_path_factory):
    parent = make_checkpoint(PARENT_BLOCKS)
    twin = permuted(parent, 0, [*order, 4, 5])
    assert verify(twin, against=parent).kept_experts == ((*order, 4, 5), tuple(range(6)))


def test_what_distillation_retrains_is_listed_and_no_error(child, parent):
    names = ["model.layers.1.self_attn.q_proj.weight", "model.layers.0.input_layernorm.weight", "lm_head.weight"]
    trained = changed(child, {name: bits_flipped(child, name, 3) for name in names})
    report = verify(trained, against=parent)
    assert report.identical and report.kept_experts == KEPT
    assert sorted(report.retrained) == sorted(names)
    assert report.num_tensors == len(Checkpoint.open(child).tensors) - 3


def test_other_settings_are_listed_and_no_error(child, parent):
    config = json.loads((child / "config.json").read_text())
    (child / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-6}))
    report = verify(child, against=parent)
    assert report.identical
    assert report.config_changes == ("config.json: rms_norm_eps: 1e-06 in the child, 1e-05 in the parent",)


@pytest.mark.parametrize(
    "name",
    [
        ROUTER,
        "model.layers.0.mlp.router.bias",
        BLOCKS,
        "model.layers.0.mlp.experts.gate_up_proj_scales",
        "model.layers.0.mlp.experts.down_proj_bias",
    ],
)
@pytest.mark.parametrize("row", [0, 3])
def test_one_bit_of_experts_or_router_is_named(child, parent, name, row):
    entry = Checkpoint.open(child).entry(name)
    row_bytes = entry.num_bytes // entry.shape[0]
    damaged = changed(child, {name: bits_flipped(child, name, row * row_bytes + 1)})
    report = verify(damaged, against=parent)
    assert report.first_difference == f"{name}[{row}], the parent's expert {KEPT[0][row]}: differs at byte 1"


def test_an_expert_of_nobody_is_named(child, parent, make_checkpoint):
    stranger = Checkpoint.open(make_checkpoint(PARENT_BLOCKS, seed=1))
    own = Checkpoint.open(child)
    replace = {}
    for name in [n for n in own.tensors if n.startswith("model.layers.0.mlp.")]:
        values = np.array(own.numpy(name))
        values[2] = stranger.numpy(name)[0]
        replace[name] = tensor_of(name, own.entry(name).dtype, values)
    report = verify(changed(child, replace), against=parent)
    assert report.first_difference == "model.layers.0.mlp.experts[2]: is no expert of the parent"


def test_one_expert_twice_is_no_subset(child, parent):
    report = verify(permuted(child, 0, [0, 1, 1, 3]), against=parent)
    assert report.first_difference == "model.layers.0.mlp.experts[2]: the parent's expert 2, as is [1]"


def test_a_childs_expert_from_the_wrong_router_row(child, parent):
    """Experts in another order, but not their router rows: each is the parent's, together they are another model."""
    source = Checkpoint.open(child)
    names = [name for name in source.tensors if name.startswith("model.layers.0.mlp.experts.")]
    swapped = changed(child, {name: rows_of(source.entry(name), [1, 0, 2, 3]) for name in names})
    difference = verify(swapped, against=parent).first_difference
    assert difference is not None and difference.startswith(f"{ROUTER}[0], the parent's expert 2: differs at byte")


class TestParentsWithLookalikes:
    """Several of the parent's experts with equal signatures: all their bytes decide."""

    def lookalikes(self, parent: Path, differ_at: int | None) -> Path:
        """Experts 1 and 2 of layer 0 made copies of expert 0, but for one late byte in expert 2's blocks."""
        source, replace = Checkpoint.open(parent), {}
        for name in [n for n in source.tensors if n.startswith("model.layers.0.mlp.")]:
            values = np.array(source.numpy(name))
            values[1] = values[2] = values[0]
            if name == BLOCKS and differ_at is not None:
                values[2].reshape(-1)[differ_at] ^= 1
            replace[name] = tensor_of(name, source.entry(name).dtype, values)
        return changed(parent, replace)

    @pytest.mark.parametrize("order", list(itertools.permutations([0, 2])))
    def test_equal_at_the_start_of_every_row(self, parent, order, monkeypatch):
        monkeypatch.setattr(matching, "SIGNATURE_BYTES", 64)
        twins = self.lookalikes(parent, differ_at=-1)
        report = verify(permuted(twins, 0, [*order, 3, 4, 5, 1]), against=twins)
        # 0 and 1 are copies of each other: which of the two is which nobody can say.
        assert report.identical
        assert {report.kept_experts[0][order.index(0)], report.kept_experts[0][5]} == {0, 1}
        assert report.kept_experts[0][order.index(2)] == 2

    def test_true_copies_are_given_out_once_each(self, parent):
        twins = self.lookalikes(parent, differ_at=None)
        assert verify(twins, against=twins).kept_experts[0] == tuple(range(6))


class TestRefusals:
    def test_another_number_of_layers(self, child, make_checkpoint):
        with pytest.raises(CheckpointError, match=r"the numbers of layers differ .found 2, expected 3"):
            verify(child, against=make_checkpoint([*PARENT_BLOCKS, (6, 16)]))

    def test_experts_of_another_shape_or_format(self, child, make_checkpoint):
        other = make_checkpoint(PARENT_BLOCKS, intermediate_size=64)
        assert "U8 [4, 64, 2, 16] in the child, U8 [6, 128, 2, 16]" in str(
            verify(child, against=other).first_difference
        )
        bf16 = make_checkpoint(PARENT_BLOCKS, experts_format="bf16")
        with pytest.raises(CheckpointError, match=r"experts in another format .*found mxfp4, expected bf16"):
            verify(child, against=bf16)


class TestCommand:
    def test_prints_what_was_found(self, child, parent):
        name = "lm_head.weight"
        trained = changed(child, {name: bits_flipped(child, name, 3)})
        result = last_json(invoke("verify", trained, "--against", parent, "--json").stdout)
        assert result["has_record"] is False and result["identical"] is False
        assert result["kept_experts"] == [list(kept) for kept in KEPT]
        assert (result["retrained"], result["config_changes"]) == ([name], [])
        table = " ".join(invoke("verify", trained, "--against", parent).stdout.split())
        assert "7 experts in 2 layers" in table and "1 tensors: lm_head.weight" in table

    def test_a_difference_is_the_users_error(self, child, parent):
        damaged = changed(child, {ROUTER: bits_flipped(child, ROUTER, 1)})
        assert_user_error(invoke("verify", damaged, "--against", parent), f"{ROUTER}[0], the parent's expert 0")
