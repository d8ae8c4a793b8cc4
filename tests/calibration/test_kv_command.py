"""`calibrate kv` as a user meets it: bad input is one line and leaves nothing, results go to stdout as promised."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from puzzle_trtllm.checkpoint import Checkpoint
from tests.front_door.cli import assert_user_error, invoke, last_json
from tests.toys import change_values

CHILD = [(6, 5), (4, None), (3, 17)]


def write_data(file: Path, rows: list[list[int]]) -> Path:
    file.write_text("\n".join(json.dumps({"input_ids": row}) for row in rows))
    return file


@pytest.fixture
def folder(make_checkpoint) -> Path:
    folder = make_checkpoint(CHILD, seed=2)
    rng = np.random.default_rng(0)
    write_data(folder / "calibration.jsonl", [rng.integers(7, 90, 20).tolist() for _ in range(16)])
    return folder


def empty(folder: Path) -> list[str]:
    (folder / "empty.jsonl").write_text("")
    return ["--dataset", str(folder / "empty.jsonl")]


def another_vocabulary(folder: Path) -> list[str]:
    return ["--dataset", str(write_data(folder / "other.jsonl", [[5, 200_000]]))]


def too_long(folder: Path) -> list[str]:
    return ["--dataset", str(write_data(folder / "long.jsonl", [[7] * 513]))]


def not_finite(folder: Path) -> list[str]:
    change_values(Checkpoint.open(folder), "model.layers.1.self_attn.v_proj.bias", {0: float("inf")})
    return []


def no_gpu(folder: Path) -> list[str]:
    return ["--device", "cuda"]


BAD: dict[str, tuple[Callable[[Path], list[str]], tuple[str, ...]]] = {
    "an empty dataset": (empty, ("empty.jsonl", "empty")),
    "another model's tokens": (another_vocabulary, ("other.jsonl:1", "vocabulary", "found 200000", "expected below")),
    "a sequence beyond the limit": (too_long, ("long.jsonl:1", "longer than the model's limit", "found 513")),
    "an infinite activation": (not_finite, ("model.layers.1.self_attn (V)", "not finite", "found infinity")),
    "a GPU that is not there": (no_gpu, ("device", "found cuda")),
    "held-out text that is not there": (lambda folder: ["--held-out", str(folder / "none.jsonl")], ("none.jsonl",)),
    "more held out than drawn": (lambda folder: ["--held-out", "16"], ("held_out", "found 16", "expected 0 to 15")),
}


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(folder, tmp_path, name, stream):
    make, words = BAD[name]
    if name == "a GPU that is not there" and torch.cuda.is_available():
        pytest.skip("there is one")
    assert_user_error(invoke("calibrate", "kv", folder, tmp_path / "out", stream, *make(folder)), *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_a_modelopt_whose_configs_are_dictionaries_is_too_old(folder, tmp_path, monkeypatch, stream):
    old = {"quant_cfg": {"*[kv]_bmm_quantizer": {"num_bits": (4, 3), "axis": None}}, "algorithm": "max"}
    monkeypatch.setattr("modelopt.torch.quantization.FP8_KV_CFG", old)
    result = invoke("calibrate", "kv", folder, tmp_path / "out", stream)
    assert_user_error(result, "nvidia-modelopt: too old", "expected 0.44 or newer")
    assert not (tmp_path / "out").exists()


def test_scales_that_are_there_ask_for_overwrite(make_checkpoint, tmp_path):
    folder = make_checkpoint(CHILD, seed=2, kv_scales=[(8.0, 4.0)] * 3)
    write_data(folder / "calibration.jsonl", [[9, 10, 11]])
    assert_user_error(invoke("calibrate", "kv", folder, tmp_path / "out"), "k_scale", "already has", "--overwrite")
    assert not list(tmp_path.iterdir())


def test_more_ranks_than_data_are_refused_before_any_process_starts(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("puzzle_trtllm.calibration.kv.run_ranks", lambda *_: pytest.fail("processes were started"))
    result = invoke("calibrate", "kv", folder, tmp_path / "out", "--ranks", "500")
    assert_user_error(result, "ranks: too little data to share", "found 500")
    assert not (tmp_path / "out").exists()


def test_a_negative_number_of_held_out_sequences_is_no_name_of_a_dataset(folder, tmp_path):
    assert_user_error(invoke("calibrate", "kv", folder, tmp_path / "out", "--held-out", "-1"), "held_out", "found -1")


def test_the_tables(folder, tmp_path):
    result = invoke("calibrate", "kv", folder, tmp_path / "out", "--seq-len", "100", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.stderr
    assert "Against BF16 KV on held-out text: 2 sequences, 40 tokens" in result.stdout
    for name in ("unit", "calibrated", "channel"):
        assert f" {name} " in result.stdout
    assert "saved at 512 tokens" not in result.stdout
    assert "saved at 100 tokens" in result.stdout
    assert "100%" in result.stderr
    assert json.loads((tmp_path / "out" / "kv_report.json").read_text())["dtype"] == "bfloat16"


def test_the_json_is_the_report(folder, tmp_path):
    result = invoke("calibrate", "kv", folder, tmp_path / "out", "--json", "--held-out", "4", "--exact")
    found = last_json(result.stdout)
    written = json.loads((tmp_path / "out" / "kv_report.json").read_text())
    assert found.pop("path") == str(tmp_path / "out")
    assert found == written
    assert (found["num_sequences"], found["held_out"]["num_sequences"]) == (12, 4)
    assert found["scale_rule"] == "amax / 448"


def test_without_quality_the_tables_say_so(folder, tmp_path):
    result = invoke("calibrate", "kv", folder, tmp_path / "out", "--no-quality")
    assert "not measured: not asked for" in result.stdout
    assert "Against BF16 KV" not in result.stdout
