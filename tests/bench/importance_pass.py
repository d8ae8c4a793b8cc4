"""What scoring experts costs over a plain forward pass of the same model and tokens.

    .venv/bin/python tests/bench/importance_pass.py [--layers 2] [--experts 40] [--rounds 5]

One synthetic MXFP4 model (random weights, tests/toys.py) is loaded once in bfloat16. Rounds take turns between a plain
pass over the decoder stack, experts as transformers chooses to multiply them, and the observed pass with m = k + 1
experts run for each token (one-shot scores, votes) and with m = 2 k (where tokens are followed further). What follows
the pass is timed apart: all four one-shot scores, and the iterative removal order by output error. Seconds of wall
time, medians, ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from puzzle_trtllm.calibration.dataset import CalibrationDataset
from puzzle_trtllm.calibration.expert_choices import TokenChoices, observe_choices
from puzzle_trtllm.calibration.expert_scores import SCORES, one_shot, removal_order
from puzzle_trtllm.calibration.forward import run_dataset
from puzzle_trtllm.models.huggingface.loading import load_causal_lm

ROOT = Path(__file__).parents[2]
TOP_K = 4


def main() -> None:
    """Measure in turns and print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=40)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512, help="tokens a sequence")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    model, data = make_model(options), make_data(options)

    def plain() -> None:
        run_dataset(model, data, what="forward")

    def observed(m: int) -> Callable[[], list[TokenChoices]]:
        return lambda: observe_choices(
            model, lambda watched: run_dataset(watched, data, what="observed"), [m] * options.layers
        )

    passes: dict[str, Callable[[], object]] = {
        "plain forward": plain,
        "m = k + 1": observed(TOP_K + 1),
        "m = 2 k": observed(2 * TOP_K),
    }
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for run in passes.values():
        run()  # warm-up
    for round_ in range(options.rounds):
        for name in passes if round_ % 2 == 0 else list(passes)[::-1]:
            seconds[name].append(timed(passes[name]))
    layers = observed(2 * TOP_K)()
    scoring = {
        "four one-shot scores": timed(lambda: [one_shot(layer, score) for layer in layers for score in SCORES]),
        "iterative order by output error": timed(lambda: [removal_order(layer, "output-error") for layer in layers]),
    }
    plain_median = statistics.median(seconds["plain forward"])
    print("| | seconds (range) | over plain forward |\n| --- | ---: | ---: |")
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"| {name} | {median:.2f} ({min(times):.2f} to {max(times):.2f}) | {median / plain_median:.2f} |")
    for name, once in scoring.items():
        print(f"| afterwards: {name}, {data.num_tokens:,} tokens, {options.layers} layers | {once:.2f} | |")
    print(json.dumps({**vars(options), "threads": torch.get_num_threads(), "seconds": seconds, "scoring": scoring}))


def make_model(options: argparse.Namespace) -> Any:
    """Random weights, of the released format."""
    sys.path.insert(0, str(ROOT))
    from tests.toys import toy_architecture, write_toy_checkpoint

    blocks = [(options.experts, 128 if i % 2 == 0 else None) for i in range(options.layers)]
    dims: dict[str, Any] = {"hidden_size": options.hidden, "intermediate_size": options.hidden}
    dims |= {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64, "experts_per_token": TOP_K}
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_toy_checkpoint(Path(scratch) / "model", toy_architecture(blocks, **dims))
        return load_causal_lm(folder, dtype=torch.bfloat16)


def make_data(options: argparse.Namespace) -> CalibrationDataset:
    """Random token ids."""
    from tests.toys import VOCAB_SIZE

    rng = np.random.default_rng(0)
    rows = tuple(rng.integers(7, VOCAB_SIZE, options.tokens) for _ in range(options.sequences))
    return CalibrationDataset(source="random", sequences=rows)


def timed(run: Callable[[], object]) -> float:
    """Seconds of wall time."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
