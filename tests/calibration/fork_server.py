"""Processes that have all that calibrates imported already: what is tested in them is what they do, not their start.

A new one imports torch, transformers and ModelOpt, which takes several times what a toy's calibration takes. These are
copies of one that has imported them and done nothing else, and are told what to do as any other (`spawn`) is.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import torch

FORK_SERVER = multiprocessing.get_context("forkserver")
FORK_SERVER.set_forkserver_preload(
    ["puzzle_trtllm.calibration.experts", "puzzle_trtllm.calibration.kv", "modelopt.torch.quantization"]
)


def stream_until_killed(stage: str, source: Path, out: Path, file: str, batch: int) -> None:
    """`calibrate_kv` or `calibrate_experts` as a stream, killed as it reads micro-batch `batch` of the hidden states
    `file`."""
    from puzzle_trtllm.calibration import experts, kv, layer_stream

    original = layer_stream._read_all

    def read_all(path: Path, *arguments: object) -> Iterator[torch.Tensor]:
        for i, hidden in enumerate(original(path, *arguments)):
            if (path.name, i) == (file, batch):
                os.kill(os.getpid(), signal.SIGKILL)
            yield hidden

    layer_stream._read_all = read_all
    calibrate = {"kv": kv.calibrate_kv, "experts": experts.calibrate_experts}[stage]
    calibrate(source, out, stream=True)
