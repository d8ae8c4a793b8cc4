"""Which way to multiply the experts: all on every token (dense), or each on its own tokens (by expert).

    .venv/bin/python tests/bench/experts_paths.py [--rounds 7]

Random layers of two shapes, both paths in turns on the same inputs, one thread, CPU microseconds, medians. The
crossover is what `DENSE_MAX_WORK` in models/reference/kernels/torch_experts.py says.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from puzzle_trtllm.models.reference.kernels.expert_weights import ExpertWeights
from puzzle_trtllm.models.reference.kernels.torch_experts import by_expert, dense

SHAPES = [(128, 128, 8, 2), (256, 256, 16, 4), (512, 512, 32, 4)]
"""hidden, intermediate, experts, experts a token"""
TOKENS = [2, 8, 24, 48, 96, 192, 384, 1024]
LIMIT = 7.0


def random_layer(hidden: int, ffn: int, experts: int, dtype: torch.dtype) -> ExpertWeights:
    """Weights of the right shapes."""
    return ExpertWeights(
        gate_up=torch.randn(experts, 2 * ffn, hidden, dtype=dtype),
        gate_up_bias=torch.randn(experts, 2 * ffn, dtype=dtype),
        down=torch.randn(hidden, experts, ffn, dtype=dtype),
        down_bias=torch.randn(experts, hidden, dtype=dtype),
    )


def cpu_us(run: Callable[[], Tensor], repeats: int) -> float:
    """CPU microseconds of one call."""
    began = time.process_time()
    for _ in range(repeats):
        run()
    return (time.process_time() - began) / repeats * 1e6


def main() -> None:
    """Measure and print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for hidden, ffn, experts, top_k in SHAPES:
            layer = random_layer(hidden, ffn, experts, dtype)
            for tokens in TOKENS:
                x = torch.randn(tokens, hidden, dtype=dtype)
                weights, chosen = torch.randn(tokens, experts, dtype=dtype).softmax(-1).topk(top_k, dim=-1)
                paths = {
                    "dense": lambda: dense(x, layer, weights, chosen, LIMIT),  # noqa: B023 - called at once
                    "by expert": lambda: by_expert(x, layer, weights, chosen, LIMIT),  # noqa: B023
                }
                repeats = max(3, 200 // tokens)
                times = {name: [cpu_us(run, repeats) for _ in range(options.rounds)] for name, run in paths.items()}
                medians = {name: statistics.median(samples) for name, samples in times.items()}
                ratio = medians["dense"] / medians["by expert"]
                name = str(dtype).removeprefix("torch.")
                rows.append({"dtype": name, "shape": [hidden, ffn, experts, top_k], "tokens": tokens, **medians})
                print(
                    f"{name:9} D {hidden} F {ffn} E {experts} k {top_k}  {tokens:5} tokens: dense"
                    f" {medians['dense']:9.0f} us, by expert {medians['by expert']:9.0f} us, ratio {ratio:.2f}"
                )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
