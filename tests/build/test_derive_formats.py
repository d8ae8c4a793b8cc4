"""`derive --experts`: MXFP4 and BF16 experts in, either out, exact where it can be and rounded to even where not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from puzzle_trtllm import mxfp4
from puzzle_trtllm.build import expert_formats
from puzzle_trtllm.build.derive import derive
from puzzle_trtllm.build.verify import verify
from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.checkpoint_writer import rewrite_checkpoint, tensor_of
from puzzle_trtllm.errors import CheckpointError, PuzzleError
from tests.front_door.cli import invoke, last_json
from tests.toys import flip_bit

PARENT_BLOCKS = [(6, 16), (6, None)]
CHILD_BLOCKS = [(4, 16), (3, 40)]
SCORES = [[5, 1, 3, 9, 2, 7], [1, 9, 3, 8, 7, 2]]
KEPT = [[0, 2, 3, 5], [1, 3, 4]]
MATRICES = [f"model.layers.{i}.mlp.experts.{name}" for i in range(2) for name in ("gate_up_proj", "down_proj")]
FORMATS = ["mxfp4", "bf16"]


@pytest.fixture
def inputs(write_architecture, write_importance):
    return {"architecture": write_architecture(CHILD_BLOCKS), "importance": write_importance(SCORES)}


@pytest.fixture(autouse=True)
def small_steps(monkeypatch) -> None:
    """So that toys take several steps."""
    monkeypatch.setattr(expert_formats, "ROWS_AT_ONCE", 5)


def layer_of(name: str) -> int:
    return int(name.split(".")[2])


@pytest.mark.parametrize("name", MATRICES)
def test_mxfp4_to_bf16_is_transformers_bit_for_bit(make_checkpoint, inputs, tmp_path, name):
    torch = pytest.importorskip("torch")
    convert = pytest.importorskip("transformers.integrations.mxfp4").convert_moe_packed_tensors
    parent = make_checkpoint(PARENT_BLOCKS)
    derive(parent, tmp_path / "child", **inputs, experts="bf16")
    source, child = Checkpoint.open(parent), Checkpoint.open(tmp_path / "child")
    kept = KEPT[layer_of(name)]
    theirs = convert(source.torch(f"{name}_blocks")[kept], source.torch(f"{name}_scales")[kept], dtype=torch.bfloat16)
    assert torch.equal(child.torch(name).view(torch.int16), theirs.contiguous().view(torch.int16))


@pytest.mark.parametrize("name", MATRICES)
def test_bf16_to_mxfp4_is_the_codec_applied_to_each_expert(make_checkpoint, inputs, tmp_path, name):
    parent = make_checkpoint(PARENT_BLOCKS, experts_format="bf16")
    derive(parent, tmp_path / "child", **inputs, experts="mxfp4")
    source, child = Checkpoint.open(parent), Checkpoint.open(tmp_path / "child")
    values = source.float32(name)[KEPT[layer_of(name)]].swapaxes(1, 2)
    blocks, scales = mxfp4.quantize(values)
    np.testing.assert_array_equal(child.numpy(f"{name}_blocks"), blocks)
    np.testing.assert_array_equal(child.numpy(f"{name}_scales"), scales)


@pytest.mark.parametrize("source_format", FORMATS)
@pytest.mark.parametrize("experts", [*FORMATS, "keep"])
def test_every_way_gives_a_whole_verified_child(make_checkpoint, inputs, tmp_path, source_format, experts):
    parent = make_checkpoint(PARENT_BLOCKS, experts_format=source_format)
    record = derive(parent, tmp_path / "child", **inputs, experts=experts)
    child = Checkpoint.open(tmp_path / "child")
    child.validate()
    wanted = source_format if experts == "keep" else experts
    assert child.architecture.experts_format == record.experts_format == wanted
    quantization = child.config.get("quantization_config", {}).get("quant_method")
    assert quantization == ("mxfp4" if wanted == "mxfp4" else None)
    report = verify(tmp_path / "child", against=parent)
    assert report.identical and report.num_tensors == len(child.tensors)


def test_there_and_back_is_the_child_again(make_checkpoint, inputs, tmp_path, write_architecture, write_importance):
    """MXFP4 to BF16 to MXFP4 gives the same values; blocks whose largest code is small may use another scale."""
    parent = make_checkpoint(PARENT_BLOCKS)
    derive(parent, tmp_path / "bf16", **inputs, experts="bf16")
    everything = {
        "architecture": write_architecture(CHILD_BLOCKS),
        "importance": write_importance([[1, 2, 3, 4], [1, 2, 3]]),
    }
    derive(tmp_path / "bf16", tmp_path / "back", **everything, experts="mxfp4")
    source, back = Checkpoint.open(parent), Checkpoint.open(tmp_path / "back")
    for name in MATRICES:
        kept = KEPT[layer_of(name)]
        expected = mxfp4.dequantize(source.numpy(f"{name}_blocks")[kept], source.numpy(f"{name}_scales")[kept])
        found = mxfp4.dequantize(back.numpy(f"{name}_blocks"), back.numpy(f"{name}_scales"))
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("source_format", "experts", "part"), [("mxfp4", "bf16", ""), ("bf16", "mxfp4", "_scales"),
                                                                ("bf16", "mxfp4", "_blocks")])  # fmt: skip
def test_verify_names_a_changed_expert(make_checkpoint, inputs, tmp_path, source_format, experts, part):
    parent = make_checkpoint(PARENT_BLOCKS, experts_format=source_format)
    derive(parent, tmp_path / "child", **inputs, experts=experts)
    name = f"{MATRICES[0]}{part}"
    entry = Checkpoint.open(tmp_path / "child").entry(name)
    flip_bit(tmp_path / "child", name, entry.num_bytes // 4 * 2 + 7)  # expert 2 of 4
    assert verify(tmp_path / "child", against=parent).first_difference == (
        f"{name}[2], the parent's expert 3 in the other format: differs at byte 7"
    )


def test_a_record_that_tells_of_another_format_is_noticed(make_checkpoint, inputs, tmp_path):
    parent = make_checkpoint(PARENT_BLOCKS)
    derive(parent, tmp_path / "child", **inputs, experts="bf16")
    file = tmp_path / "child" / "derivation.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "experts_format": "mxfp4"}))
    difference = verify(tmp_path / "child", against=parent).first_difference
    assert difference == "config.json: experts_format: bf16 in the child, mxfp4 in the parent"


def test_nan_in_a_bf16_expert_cannot_be_mxfp4(make_checkpoint, inputs, tmp_path):
    source, damaged = Checkpoint.open(make_checkpoint(PARENT_BLOCKS, experts_format="bf16")), tmp_path / "damaged"
    values = np.array(source.numpy(MATRICES[1]))
    values[3, 4, 5] = 0x7FC0
    damaged.mkdir()
    replace = {MATRICES[1]: tensor_of(MATRICES[1], "BF16", values)}
    rewrite_checkpoint(source, damaged, config=source.config, replace=replace)
    with pytest.raises(CheckpointError, match=r"down_proj\[3\]: NaN or infinity cannot be stored in MXFP4"):
        derive(damaged, tmp_path / "child", **inputs, experts="mxfp4")
    assert not (tmp_path / "child").exists()
    derive(damaged, tmp_path / "child", **inputs, experts="keep")


def test_a_killed_derivation_is_not_completed_in_another_format(make_checkpoint, inputs, tmp_path, monkeypatch):
    parent, jobs = make_checkpoint(PARENT_BLOCKS), []

    def stop(out: Path, *, job: object, **options: object) -> None:
        jobs.append(job)
        raise PuzzleError("enough seen")

    monkeypatch.setattr("puzzle_trtllm.build.derive.resumable_folder", stop)
    for experts in ("keep", "bf16", "mxfp4"):
        with pytest.raises(PuzzleError, match="enough seen"):
            derive(parent, tmp_path / "child", **inputs, experts=experts)
    assert jobs[0] == jobs[2] != jobs[1]


def test_memory_is_that_of_one_expert(make_checkpoint, inputs, tmp_path, monkeypatch):
    """No step of a conversion is given more than one expert's bytes."""
    sizes: list[int] = []
    dequantize = mxfp4.dequantize_to_bf16
    monkeypatch.setattr(mxfp4, "dequantize_to_bf16", lambda b, s: (sizes.append(b.nbytes), dequantize(b, s))[1])
    parent = make_checkpoint(PARENT_BLOCKS)
    derive(parent, tmp_path / "child", **inputs, experts="bf16")
    source = Checkpoint.open(parent)
    assert len(sizes) == 2 * sum(len(kept) for kept in KEPT)
    assert max(sizes) == source.entry(f"{MATRICES[0]}_blocks").num_bytes // 6


def test_transformers_sees_the_same_model_in_either_format(make_checkpoint, inputs, tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from puzzle_trtllm.models.huggingface.loading import load_causal_lm, load_child

    parent = make_checkpoint(PARENT_BLOCKS)
    for experts in FORMATS:
        derive(parent, tmp_path / experts, **inputs, experts=experts)
    tokens = torch.arange(7, 27)[None]
    with torch.no_grad():
        packed = load_causal_lm(tmp_path / "mxfp4", dtype=torch.bfloat16)(tokens).logits
        plain = load_child(tmp_path / "bf16", attn_implementation="eager")(tokens).logits
    assert packed.std() > 0.1 and torch.equal(plain, packed)


def test_on_the_command_line(make_checkpoint, inputs, tmp_path):
    parent = make_checkpoint(PARENT_BLOCKS)
    options = [f"--{key}={value}" for key, value in inputs.items()]
    result = invoke("derive", parent, tmp_path / "child", *options, "--experts", "bf16", "--json")
    assert result.exit_code == 0 and last_json(result.stdout)["experts_format"] == "bf16"
