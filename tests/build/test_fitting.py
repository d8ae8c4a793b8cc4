"""`inspect --gpu`: the planner's own memory and capacities, shown for every layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from puzzle_trtllm.architecture import PuzzleArchitecture
from puzzle_trtllm.build.fitting import fit
from puzzle_trtllm.build.planner import Load, plan
from puzzle_trtllm.errors import ConfigError
from puzzle_trtllm.gpus import load_gpu
from tests.front_door.cli import assert_user_error, invoke, last_json

DATA = Path(__file__).parents[1] / "data"
CHILD_CONFIG = DATA / "gpt-oss-puzzle-88b.config.json"
PARENT_CONFIG = DATA / "gpt-oss-120b.config.json"


@pytest.mark.parametrize("num_gpus", [1, 2, 8])
@pytest.mark.parametrize("config", [CHILD_CONFIG, PARENT_CONFIG])
def test_says_what_the_planner_says(config, num_gpus):
    architecture, gpu = PuzzleArchitecture.from_path(config), load_gpu("h100-80gb")
    fits = fit(architecture, gpu=gpu, num_gpus=num_gpus, kv_dtype="fp8", seq_lens=[8192])
    assert fits
    for one in fits:
        layout = f"{one.layout.kind}{one.layout.gpus_per_replica}"
        planned = plan(
            architecture, gpu=gpu, num_gpus=num_gpus, load=Load(isl=4096, osl=4096), kv_dtype="fp8", layout=layout
        )
        assert one.weight_bytes_per_gpu == planned.memory.weights.total
        assert one.kv_pool_bytes_per_gpu == planned.memory.kv_pool > 0
        assert one.max_sequences == ((8192, planned.sequences("trtllm_v1_tuned")),)


def test_a_model_that_does_not_fit_says_so():
    (one,) = fit(
        PuzzleArchitecture.from_path(PARENT_CONFIG),
        gpu=load_gpu("l40s-48gb"),
        num_gpus=1,
        kv_dtype="bf16",
        seq_lens=[8192, 4],
    )
    assert one.weight_bytes_per_gpu > one.gpu.memory_bytes
    assert one.kv_pool_bytes_per_gpu == 0 and one.max_sequences == ((8192, 0), (4, 0))


def test_the_command():
    result = invoke("inspect", CHILD_CONFIG, "--kv", "fp8", "--seq-len", "8192", "--gpu", "h100-80gb", "--gpus", "8")
    assert result.exit_code == 0
    assert "on 8 x NVIDIA H100 SXM5 80 GB, fp8 KV; sequences as TensorRT-LLM holds them" in " ".join(
        result.stdout.split()
    )
    assert "at 8,192 tokens" in " ".join(result.stdout.split())
    value = last_json(invoke("inspect", CHILD_CONFIG, "--gpu", "l40s-48gb", "--json").stdout)
    assert [(one["gpu"], one["num_gpus"], one["kv_pool_bytes_per_gpu"]) for one in value["fits"]] == [
        ("l40s-48gb", 1, 0)
    ]
    assert "fits" not in last_json(invoke("inspect", CHILD_CONFIG, "--json").stdout)


def test_refusals():
    assert_user_error(invoke("inspect", CHILD_CONFIG, "--gpus", "2"), "--gpus: which GPU?")
    assert_user_error(invoke("inspect", CHILD_CONFIG, "--gpu", "abacus"), "unknown GPU", "h100-80gb")
    assert_user_error(invoke("inspect", CHILD_CONFIG, "--gpu", "h100-80gb", "--gpus", "0"), "must be at least 1")
    with pytest.raises(ConfigError, match="a100-80gb has no FP8"):
        fit(
            PuzzleArchitecture.from_path(CHILD_CONFIG),
            gpu=load_gpu("a100-80gb"),
            num_gpus=1,
            kv_dtype="fp8",
            seq_lens=[1],
        )
