"""A child's folder loads with `trust_remote_code` where this package is not installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch

from puzzle_trtllm.models.huggingface.loading import load_child
from puzzle_trtllm.models.huggingface.remote_code import write_remote_code

CHILD = [(6, 5), (4, None), (2, 3), (5, 17), (3, 1)]

LOAD_REMOTE = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "puzzle_trtllm":
            raise ModuleNotFoundError("No module named 'puzzle_trtllm'")
sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.bfloat16)
tokens = torch.arange(7, 47)[None]
torch.save(model(tokens).logits, sys.argv[2])
assert "puzzle_trtllm" not in sys.modules
"""


def test_remote_code_loads_without_this_package(make_checkpoint, tmp_path):
    folder = make_checkpoint(CHILD)
    config = write_remote_code(folder, json.loads((folder / "config.json").read_text()))
    (folder / "config.json").write_text(json.dumps(config))
    own = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", LOAD_REMOTE, folder, tmp_path / "logits.pt"],
        capture_output=True,
        text=True,
        env={**os.environ, **own},
        cwd=tmp_path,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    expected = load_child(folder)(torch.arange(7, 47)[None]).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)
