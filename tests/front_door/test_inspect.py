"""`inspect`: bytes and windows as worked out by hand, from headers, from a config alone, and from an engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from puzzle_trtllm.errors import CheckpointError, PuzzleError
from puzzle_trtllm.inspection import inspect
from tests.front_door.cli import ROOT, assert_user_error, invoke, last_json, run

MakeCheckpoint = Callable[..., Path]
BLOCKS = [(8, 16), (6, None), (4, 32)]
CHILD_CONFIG = ROOT / "tests" / "data" / "gpt-oss-puzzle-88b.config.json"


def test_a_toy_by_hand(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint(BLOCKS)
    value = inspect(folder, seq_lens=[20, 100]).to_json()
    assert (value["num_layers"], value["kv_dtype"], value["kv_sequence_tokens"]) == (3, "bf16", 20)
    # K and V, 2 heads of 16, 2 bytes: 128 bytes a token and layer.
    assert value["kv_bytes_per_token"] == 3 * 128
    # Of 20 tokens the layers keep 16, 20 and 20; of 100 they keep 16, 100 and 32.
    assert value["kv_bytes_per_sequence"] == (16 + 20 + 20) * 128
    assert value["kv_sequences"][1] == {"kv_sequence_tokens": 100, "kv_bytes_per_sequence": (16 + 100 + 32) * 128}
    on_disk = {file: file.stat().st_size for file in folder.glob("*.safetensors")}
    headers = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in on_disk)
    assert value["weight_bytes"] == sum(on_disk.values()) - headers


def test_a_folder_is_called_what_it_is_called(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Brackets and colons are no markup."""
    folder = tmp_path / "a[bold]:warning:[" / "b]"
    folder.parent.mkdir()
    make_checkpoint(BLOCKS).rename(folder)
    result = invoke("inspect", folder)
    assert result.exit_code == 0, result.stderr
    assert "a[bold]:warning:[/b]" in "".join(result.stdout.split())  # a long path is broken into lines


def test_layers_are_told_apart(make_checkpoint: MakeCheckpoint) -> None:
    blocks = inspect(make_checkpoint(BLOCKS)).to_json()["blocks"]
    assert [(b["num_local_experts"], b["sliding_window"]) for b in blocks] == BLOCKS
    # One expert, D = 64, F = 32: gate_up 2F x D and down D x F at 17 bytes in 32 values, biases 2F + D and router row
    # D and its bias in BF16.
    expert = (64 * 64 + 64 * 32) * 17 // 32 + 2 * (64 + 64) + 2 * (64 + 1)
    assert blocks[0]["weight_bytes"] - blocks[1]["weight_bytes"] == 2 * expert
    assert blocks[1]["weight_bytes"] - blocks[2]["weight_bytes"] == 2 * expert


def test_a_config_alone_gives_the_same_numbers_as_the_files(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint(BLOCKS)
    whole, alone = inspect(folder).to_json(), inspect(folder / "config.json").to_json()
    assert {**alone, "source": ""} == {**whole, "source": ""}


def test_an_index_beside_a_config_alone_is_checked_too(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint(BLOCKS)
    index = folder / "model.safetensors.index.json"
    for weight_map, words in ((None, "weight_map: must be an object"), ({"lm_head.weight": 7}, "lm_head.weight")):
        index.write_text(json.dumps({"weight_map": weight_map}))
        assert_user_error(invoke("inspect", folder / "config.json"), index.name, words)


def test_the_released_child_from_its_config() -> None:
    value = inspect(CHILD_CONFIG, seq_lens=[131072], kv_dtype="fp8").to_json()
    assert round(value["parameters"] / 1e9, 2) == 88.15  # as published
    assert round(value["weight_bytes"] / 2**30, 2) == 46.56  # as published
    # 1024 bytes a token and layer; 18 windows of 128, 8 of 8192 and 10 full layers.
    assert value["kv_bytes_per_sequence"] == 1024 * (18 * 128 + 8 * 8192 + 10 * 131072)


def test_kv_scales_mean_an_fp8_cache(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint([(4, 16), (4, None)], kv_scales=[(0.5, 0.25), (0.5, 0.25)])
    plain = make_checkpoint([(4, 16), (4, None)])
    assert inspect(folder).kv_dtype == "fp8"
    assert inspect(folder / "config.json").kv_dtype == "fp8"  # the index names the scales
    assert inspect(plain).kv_dtype == "bf16"
    assert inspect(plain, kv_dtype="fp8").to_json()["kv_bytes_per_token"] == 2 * 64


def test_several_lengths_after_one_option(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint(BLOCKS)
    after = last_json(invoke("inspect", folder, "--seq-len", "20", "100", "--json").stdout)
    before = last_json(invoke("inspect", "--seq-len", "20", "--seq-len", "100", folder, "--json").stdout)
    assert after == before == inspect(folder, seq_lens=[20, 100]).to_json()


def test_from_a_shell_json_is_the_last_line(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint(BLOCKS)
    done = run("inspect", folder, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == inspect(folder).to_json()


def test_the_table_shows_experts_windows_and_totals(make_checkpoint: MakeCheckpoint) -> None:
    text = invoke("inspect", make_checkpoint(BLOCKS), "--seq-len", "100").stdout
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if "█" in line]
    assert [(row[1], row[3], row[5]) for row in rows] == [
        ("8", "16", "2.00 KiB"),
        ("6", "full", "12.50 KiB"),
        ("4", "32", "4.00 KiB"),
    ]
    assert rows[0][2].count("█") == 2 * rows[2][2].count("█")  # 8 experts against 4


def test_an_engine_is_inspected_as_it_is_served(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = make_checkpoint(BLOCKS, kv_scales=[(0.5, 0.25)] * 3)
    config = tmp_path / "config.yaml"
    config.write_text("runtime: reference\nkv_dtype: fp8\n", encoding="utf-8")
    built = invoke("build", folder, tmp_path / "engine", "--config", config, "--json")
    assert built.exit_code == 0, built.stderr
    value = inspect(tmp_path / "engine").to_json()
    assert value["kv_dtype"] == "fp8"  # though its serving copy holds no scale
    assert value["weight_bytes"] == last_json(built.stdout)["weight_bytes"]


def test_what_is_no_model(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint([(4, None)])
    assert_user_error(invoke("inspect", tmp_path / "nothing"), "nothing", "no such checkpoint folder")
    assert_user_error(invoke("inspect", tmp_path), "config.json", "missing")
    assert_user_error(invoke("inspect", next(folder.glob("*.safetensors"))), "one file of a checkpoint")
    with pytest.raises(PuzzleError, match="at least 1 token"):
        inspect(folder, seq_lens=[0])
    (folder / "model.safetensors.index.json").unlink()
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"no .*safetensors files"):
        inspect(folder)
