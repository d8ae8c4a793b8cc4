"""Prompt chunks attending to their past and themselves: the native CPU kernel against PyTorch's.

    .venv/bin/python tests/bench/prefill_attention.py [--threads 1] [--dtype bfloat16] [--kv-dtype bfloat16]

Random queries, keys and values of the shapes below, both kernels in turns on the same tensors, wall milliseconds,
medians over rounds (range), and the ratio of the rounds, as a median.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from puzzle_trtllm.models.reference.kernels import Kernels
from puzzle_trtllm.models.reference.kernels.native_kernels import NativeKernels
from puzzle_trtllm.models.reference.kernels.reads import Chunks, GroupReads
from puzzle_trtllm.models.reference.kernels.torch_kernels import TorchKernels

BLOCK_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class Case:
    """`prompts` chunks of `tokens` behind `past` tokens each."""

    heads: int
    kv_heads: int
    head_dim: int
    tokens: int
    past: int = 0
    window: int | None = None
    prompts: int = 1

    def __str__(self) -> str:
        heads = f"{self.heads}/{self.kv_heads} heads of {self.head_dim}"
        return f"{heads}, {self.prompts} x {self.tokens} tokens, past {self.past}, window {self.window}"


CASES = [
    Case(heads=4, kv_heads=2, head_dim=32, tokens=128),
    Case(heads=8, kv_heads=2, head_dim=32, tokens=128, prompts=32),
    Case(heads=64, kv_heads=8, head_dim=64, tokens=128),
    Case(heads=64, kv_heads=8, head_dim=64, tokens=2048),
    Case(heads=64, kv_heads=8, head_dim=64, tokens=2048, window=128),
    Case(heads=64, kv_heads=8, head_dim=64, tokens=512, past=4096),
]
"""The demo's model, that of tests/bench/peers.py, gpt-oss."""


def make_call(case: Case, dtype: torch.dtype, kv_dtype: torch.dtype) -> Callable[[Kernels], Tensor]:
    """Attention of one layer, to be given the kernels. What kernels derive once a step is derived in every call."""
    rows, blocks = case.prompts * case.tokens, -(-case.past // BLOCK_TOKENS)
    q = torch.randn(rows, case.heads, case.head_dim).to(dtype)
    kv = torch.randn(2, rows, case.kv_heads, case.head_dim).to(kv_dtype)
    pool_rows = max(1, case.prompts * blocks) * case.kv_heads
    storage = torch.randn(2, pool_rows, BLOCK_TOKENS, case.head_dim).to(kv_dtype)
    sinks = torch.randn(case.heads)
    reads = GroupReads(
        window=case.window,
        num_kv_heads=case.kv_heads,
        blocks=torch.arange(case.prompts * blocks).view(case.prompts, blocks),
        first_keys=torch.zeros(case.prompts, dtype=torch.int64),
        positions=torch.full((case.prompts,), case.past),
    )
    chunks = Chunks(lengths=torch.full((case.prompts,), case.tokens), longest=case.tokens)

    def call(kernels: Kernels) -> Tensor:
        own_reads, own_chunks = replace(reads, derived={}), replace(chunks, derived={})
        return kernels.prefill_attention(q, kv, sinks, storage, own_reads, own_chunks)

    return call


def measure(call: Callable[[Kernels], Tensor], kernels: Kernels) -> float:
    """Wall milliseconds."""
    began = time.perf_counter()
    call(kernels)
    return (time.perf_counter() - began) * 1e3


def main() -> None:
    """Measure and print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--kv-dtype", choices=["bfloat16", "float8_e4m3fn", "float32"], default="bfloat16")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kernels: dict[str, Kernels] = {"native": NativeKernels(), "torch": TorchKernels(dequantize_experts=True)}
    rows = []
    for case in CASES:
        call = make_call(case, getattr(torch, options.dtype), getattr(torch, options.kv_dtype))
        samples: dict[str, list[float]] = {name: [] for name in kernels}
        for index in range(options.rounds + 1):  # the first round warms up
            for name in list(kernels) if index % 2 == 0 else list(kernels)[::-1]:
                elapsed_ms = measure(call, kernels[name])
                if index:
                    samples[name].append(elapsed_ms)
        ratio = statistics.median(b / a for a, b in zip(samples["native"], samples["torch"], strict=True))
        rows.append({"case": str(case), **{name: statistics.median(own) for name, own in samples.items()}})
        times = ", ".join(
            f"{name} {statistics.median(own):8.2f} ms ({min(own):.2f} to {max(own):.2f})"
            for name, own in samples.items()
        )
        print(f"{case!s:66} {times}  x{ratio:.1f}")
    print(json.dumps({**vars(options), "rows": rows}))


if __name__ == "__main__":
    main()
