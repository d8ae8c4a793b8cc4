"""Train abacus and write it as a checkpoint folder: `python -m puzzle_trtllm.demo.training OUT [--seed N]`.

Two cores take about 17 minutes. The same seed, number of threads, torch and processor give the same model.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from puzzle_trtllm.demo.training import checkpoint, heldout
from puzzle_trtllm.demo.training.dimensions import Dimensions
from puzzle_trtllm.demo.training.schedule import Plan
from puzzle_trtllm.demo.training.train import train
from puzzle_trtllm.folders import atomic_folder


def main() -> None:
    """Parse, train, write."""
    parser = argparse.ArgumentParser(prog="python -m puzzle_trtllm.demo.training", description=__doc__)
    parser.add_argument("out", type=Path, help="the checkpoint folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=Plan().steps)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    plan = replace(Plan(), steps=options.steps)
    with atomic_folder(options.out) as folder:
        model = train(Dimensions(), plan, options.seed, lambda line: print(line, file=sys.stderr, flush=True))
        checkpoint.save(model, folder)
        heldout.write(folder, options.seed)


if __name__ == "__main__":
    main()
