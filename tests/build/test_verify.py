"""`verify` proves byte identity, and names the first byte that is not."""

from __future__ import annotations

import json

import numpy as np
import pytest

from puzzle_trtllm.build.derive import derive
from puzzle_trtllm.build.verify import verify
from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.checkpoint_writer import rewrite_checkpoint, tensor_of
from puzzle_trtllm.errors import CheckpointError
from tests.toys import flip_bit

BLOCKS = [(6, 16), (6, None)]
CHILD_BLOCKS = [(4, 16), (6, 40)]
SCORES = [[5, 1, 3, 9, 2, 7], [1, 2, 3, 4, 5, 6]]


@pytest.fixture
def parent(make_checkpoint):
    return make_checkpoint(BLOCKS)


@pytest.fixture
def child(parent, write_architecture, write_importance, tmp_path):
    arguments = {"architecture": write_architecture(CHILD_BLOCKS), "importance": write_importance(SCORES)}
    derive(parent, tmp_path / "child", **arguments)
    return tmp_path / "child"


def edit_record(child, **changes: object) -> None:
    file = child / "derivation.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_derived_child_is_identical_to_the_last_byte(child, parent):
    report = verify(child, against=parent)
    checkpoint = Checkpoint.open(child)
    assert report.identical and report.first_difference is None
    assert (report.num_tensors, report.num_bytes) == (len(checkpoint.tensors), checkpoint.weight_bytes)


def test_a_window_that_was_changed_since(child, parent):
    file = child / "config.json"
    config = json.loads(file.read_text())
    config["block_configs"][1]["sliding_window"] = 4
    file.write_text(json.dumps(config))
    report = verify(child, against=parent)
    assert not report.identical
    assert report.first_difference == (
        "config.json: block_configs[1]: {'num_local_experts': 6, 'sliding_window': 4} in the child, "
        "{'num_local_experts': 6, 'sliding_window': 40} when it was derived"
    )


@pytest.mark.parametrize(
    ("name", "row", "expert"),
    [
        ("model.layers.0.mlp.experts.gate_up_proj_blocks", 2, 3),
        ("model.layers.0.mlp.experts.down_proj_scales", 3, 5),
        ("model.layers.0.mlp.router.weight", 0, 0),
        ("model.layers.1.mlp.experts.down_proj_bias", 4, 4),
    ],
)
def test_one_bit_of_a_kept_row_is_named_with_its_expert(child, parent, name, row, expert):
    entry = Checkpoint.open(child).entry(name)
    row_bytes = entry.num_bytes // entry.shape[0]
    flip_bit(child, name, row * row_bytes + row_bytes - 1)
    report = verify(child, against=parent)
    assert not report.identical
    assert report.first_difference == (f"{name}[{row}], the parent's expert {expert}: differs at byte {row_bytes - 1}")


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.self_attn.sinks", "model.embed_tokens.weight"])
def test_one_bit_of_an_untouched_tensor_is_named(child, parent, name):
    flip_bit(child, name, 5)
    assert verify(child, against=parent).first_difference == f"{name}: differs at byte 5"


def test_wrong_indices_are_noticed(child, parent):
    edit_record(child, kept_experts=[[0, 1, 3, 5], list(range(6))])  # expert 2 was kept, not 1
    difference = verify(child, against=parent).first_difference
    assert difference is not None and "[1], the parent's expert 1: differs at byte" in difference


def test_a_changed_config_is_a_difference(child, parent):
    file = child / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "rms_norm_eps": 1e-6}))
    assert verify(child, against=parent).first_difference == (
        "config.json: rms_norm_eps: 1e-06 in the child, 1e-05 in the parent"
    )


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (
            "layer_types",
            ["full_attention"] * 2,
            "['full_attention', 'full_attention'] in the child, ['sliding_attention', ",
        ),
        ("eos_token_id", 2, "2 in the child, 1 as it was derived"),
        ("hidden_act", "gelu", "'gelu' in the child, 'silu' as it was derived"),
        ("quantization_config", {"quant_method": "mxfp4"}, "{'quant_method': 'mxfp4'} in the child, {"),
    ],
)
def test_a_setting_that_only_other_engines_read(child, parent, key, value, words):
    file = child / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    difference = verify(child, against=parent).first_difference
    assert difference is not None and difference.startswith(f"config.json: {key}: {words}")


def test_scales_added_by_calibration_are_no_difference(child, parent, tmp_path):
    source, out = Checkpoint.open(child), tmp_path / "calibrated"
    out.mkdir()
    scale = tensor_of("model.layers.0.self_attn.k_proj.k_scale", "F32", np.array(2.0, np.float32))
    rewrite_checkpoint(source, out, config=source.config, replace={}, add=[scale])
    (out / "derivation.json").write_bytes((child / "derivation.json").read_bytes())
    report = verify(out, against=parent)
    assert report.identical
    assert report.added_scales == ("model.layers.0.self_attn.k_proj.k_scale",)


def test_tensors_dropped_by_name_are_accounted_for(parent, write_architecture, write_importance, tmp_path):
    source, old = Checkpoint.open(parent), tmp_path / "old"
    old.mkdir()
    extra = tensor_of("model.layers.0.self_attn.rotary_emb.inv_freq", "F32", np.ones(8, np.float32))
    rewrite_checkpoint(source, old, config=source.config, replace={}, add=[extra])
    arguments = {"architecture": write_architecture(CHILD_BLOCKS), "importance": write_importance(SCORES)}
    derive(old, tmp_path / "child", **arguments)
    assert verify(tmp_path / "child", against=old).identical
    edit_record(tmp_path / "child", dropped_tensors={})
    with pytest.raises(CheckpointError, match="was derived from another parent"):
        verify(tmp_path / "child", against=old)


def test_another_parent_is_refused(child, make_checkpoint):
    with pytest.raises(CheckpointError, match=r"was derived from another parent .found sha256:.*, expected sha256:"):
        verify(child, against=make_checkpoint(BLOCKS, seed=1))


@pytest.mark.parametrize("kept", [[0, 2, 3], [0, 2, 3, 6], [0, 3, 2, 5], [0, 2, 2, 5], [-1, 2, 3, 5]])
def test_indices_that_no_choice_gives_are_refused(child, parent, kept):
    edit_record(child, kept_experts=[kept, list(range(6))])
    with pytest.raises(CheckpointError, match=r"kept_experts\[0\]: is no choice of the parent's experts"):
        verify(child, against=parent)


@pytest.mark.parametrize("index", [True, "1", 1.0])
def test_an_index_that_is_no_integer_is_refused(child, parent, index):
    edit_record(child, kept_experts=[[0, index, 3, 5], list(range(6))])
    with pytest.raises(CheckpointError, match=r"derivation\.json: kept_experts\.0\.1: .*valid integer"):
        verify(child, against=parent)


@pytest.mark.parametrize("content", ["{", "{}", '{"schema_version": 2}'])
def test_a_damaged_record_is_one_line(child, parent, content):
    (child / "derivation.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"derivation\.json") as caught:
        verify(child, against=parent)
    assert "\n" not in str(caught.value)
