"""Decode and prefill of the reference runtime on a GPU against the roofline, parent and child in one run.

    .venv/bin/python tests/bench/gpu_roofline.py --gpu h200-141gb \
        --model parent=tests/data/gpt-oss-120b.config.json child=tests/data/gpt-oss-puzzle-88b.config.json \
        [--batch 1 8 64] [--context 8192] [--kv fp8] [--memory-gb 80] [--rounds 5]

Weights are random (`load_format: dummy`) at the true geometry. A decode step is timed with every sequence at --context
tokens, their blocks claimed and not computed, because attention costs the same whatever the keys are; prefill is one
chunk of --chunk tokens. The roofline is the planner's at full efficiency: bytes that must be read over the memory's
bandwidth, or FLOPs over the peak where that is slower, both from puzzle_trtllm/gpus.yaml; launches are not counted.
--memory-gb holds weights and KV cache to a budget, as if the GPU were smaller. Models take turns, medians over rounds.

Without a GPU it runs on the CPU (--gpu still names the roofline), which tests the script and measures nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from puzzle_trtllm.architecture import PuzzleArchitecture
from puzzle_trtllm.build.planner.assumptions import Assumptions
from puzzle_trtllm.build.planner.layout import Layout
from puzzle_trtllm.build.planner.roofline import Setup, Step, step_seconds
from puzzle_trtllm.gpus import load_gpu
from puzzle_trtllm.models.reference.step import SequenceStep, plan_step
from puzzle_trtllm.serve.runtimes.api import KvCacheConfig
from puzzle_trtllm.serve.runtimes.reference.arguments import EngineArguments
from puzzle_trtllm.serve.runtimes.reference.engine import ReferenceEngine
from puzzle_trtllm.serve.runtimes.reference.loading import load_engine

STEPS = 20


def main() -> None:
    """Measure and print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", required=True, help="a name of gpus.yaml: the roofline")
    parser.add_argument("--model", nargs="+", required=True, metavar="NAME=CONFIG.json")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--chunk", type=int, default=8192)
    parser.add_argument("--kv", choices=["bf16", "fp8"], default="fp8")
    parser.add_argument("--memory-gb", type=float, help="weights and KV cache together, GB")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    models = dict(item.split("=", 1) for item in options.model)
    results: dict[tuple[str, str], list[float]] = {}
    fits: dict[str, int] = {}
    for _ in range(options.rounds):
        for name, config in models.items():
            measure(name, Path(config), options, results, fits)
    rows = [summarize(key, times, options, models) for key, times in results.items()]
    print(f"{'model':10} {'work':22} {'ms':>9} {'range':>19} {'tok/s':>10} {'roofline ms':>12} {'of roofline':>11}")
    for row in rows:
        span = f"{row['min_ms']:.2f} to {row['max_ms']:.2f}"
        print(
            f"{row['model']:10} {row['work']:22} {row['ms']:9.2f} {span:>19} {row['tokens_per_s']:10.0f}"
            f" {row['roofline_ms']:12.2f} {row['of_roofline']:11.2f}"
        )
    print(f"sequences of {options.context} tokens that fit: {fits}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu: the times mean nothing"
    print(json.dumps({"device": device, "torch": torch.__version__, "rows": rows, "sequences_that_fit": fits}))


def measure(
    name: str,
    config: Path,
    options: argparse.Namespace,
    results: dict[tuple[str, str], list[float]],
    fits: dict[str, int],
) -> None:
    """One round of one model: every batch that fits, and a prompt chunk."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(config, Path(folder) / "config.json")
        engine = load(Path(folder), options)
        held = engine.cache
        need = held.demand(options.context + STEPS + 8)
        fits[name] = min(held.pools[window].num_blocks // blocks for window, blocks in need.items())
        for batch in options.batch:
            if batch <= fits[name]:
                seconds = decode_seconds(engine, batch, options.context)
                results.setdefault((name, f"decode batch {batch}"), []).append(seconds)
        results.setdefault((name, f"prefill {options.chunk}"), []).append(prefill_seconds(engine, options.chunk))
        del engine, held
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def load(folder: Path, options: argparse.Namespace) -> ReferenceEngine:
    """An engine of random weights whose KV cache takes what the budget leaves."""
    architecture = PuzzleArchitecture.from_path(folder)
    budget = 0
    if options.memory_gb:
        from puzzle_trtllm.tensors import count_weight_bytes

        budget = int(options.memory_gb * 1e9) - count_weight_bytes(architecture)
        if budget <= 0:
            raise SystemExit(f"--memory-gb {options.memory_gb}: the weights alone take more")
    length = max(options.context, options.chunk) + STEPS + 8
    engine, _ = load_engine(
        EngineArguments(
            model=str(folder),
            load_format="dummy",
            max_seq_len=length,
            max_num_tokens=options.chunk,
            max_batch_size=max(options.batch),
            kv_cache_config=KvCacheConfig(
                dtype="fp8" if options.kv == "fp8" else "auto",
                max_gpu_total_bytes=budget,
                enable_block_reuse=False,
            ),
        )
    )
    return engine


def decode_seconds(engine: ReferenceEngine, batch: int, context: int) -> float:
    """Median seconds of a decode step: `batch` sequences, each with `context` tokens before it."""
    cache = engine.cache
    blocks = [cache.admit(context + STEPS + 8) for _ in range(batch)]
    for own in blocks:
        for window, pool in cache.pools.items():
            pool.extend(own[window], 0 if window is None else max(0, context - window), context)

    def step(index: int) -> None:
        parts = [
            SequenceStep(tokens=[(7 * row + index) % 100], start=context + index, blocks=own, wants_logits=True)
            for row, own in enumerate(blocks)
        ]
        engine.model.forward(plan_step(parts, cache), cache).argmax(dim=-1).tolist()

    times = [timed(lambda index=index: step(index)) for index in range(STEPS)]
    for own in blocks:
        cache.release(own, context + STEPS + 8)
    return statistics.median(times[3:])


def prefill_seconds(engine: ReferenceEngine, chunk: int) -> float:
    """Seconds of a prompt of one chunk."""
    cache = engine.cache

    def step() -> None:
        own = cache.admit(chunk)
        tokens = [(31 * i) % 100 for i in range(chunk)]
        part = SequenceStep(tokens=tokens, start=0, blocks=own, wants_logits=True)
        engine.model.forward(plan_step([part], cache), cache).argmax(dim=-1).tolist()
        cache.release(own, chunk)

    return statistics.median([timed(step) for _ in range(3)][1:])


def timed(run: Callable[[], None]) -> float:
    """Seconds; what is timed ends with a copy to the CPU, so nothing is left running."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def summarize(
    key: tuple[str, str], times: list[float], options: argparse.Namespace, models: dict[str, str]
) -> dict[str, float | str]:
    """One row of the table."""
    name, work = key
    kind, number = work.rsplit(" ", 1)
    count = int(number)
    tokens = count
    setup = Setup(
        architecture=PuzzleArchitecture.from_path(models[name]),
        gpu=load_gpu(options.gpu),
        layout=Layout(kind="tp", gpus_per_replica=1),
        kv_dtype=options.kv,
        assumptions=Assumptions(launch_us_per_layer=0.0),
    )
    if kind == "prefill":
        step = Step(tokens=count, start=0, stop=count, sequences=1, logits=1)
    else:
        step = Step(tokens=count, start=options.context, stop=options.context + STEPS, sequences=count, logits=count)
    ideal, median = sum(step_seconds(setup, step).values()), statistics.median(times)
    return {
        "model": name,
        "work": work,
        "ms": median * 1e3,
        "min_ms": min(times) * 1e3,
        "max_ms": max(times) * 1e3,
        "tokens_per_s": tokens / median,
        "roofline_ms": ideal * 1e3,
        "of_roofline": ideal / median,
    }


if __name__ == "__main__":
    main()
