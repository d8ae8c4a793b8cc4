"""What a decode step of the reference engine costs, without processes, Triton or clients.

    .venv/bin/python tests/bench/engine_steps.py [--model DIR] [--batch 4 24] [--rounds 5]

Variants (compute dtype, KV dtype) take turns on the same model, prompts and lengths. Times are CPU milliseconds of the
process, because wall time on a shared machine measures the neighbours; medians over rounds, and the ratio to the first
variant.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from puzzle_trtllm.serve.runtimes.api import KvCacheConfig
from puzzle_trtllm.serve.runtimes.reference.arguments import EngineArguments
from puzzle_trtllm.serve.runtimes.reference.engine import ReferenceEngine
from puzzle_trtllm.serve.runtimes.reference.loading import load_engine
from puzzle_trtllm.serve.runtimes.reference.messages import DecodingRule, Submit

ABACUS = Path(__file__).parents[2] / "puzzle_trtllm" / "demo" / "abacus"
VARIANTS = [("bfloat16", "auto"), ("bfloat16", "fp8"), ("float32", "auto"), ("float32", "fp8"), ("auto", "auto")]
PROMPT_TOKENS, STEPS = 128, 60


def make_engine(model: Path, dtype: str, kv_dtype: str) -> ReferenceEngine:
    """An engine with room for everything."""
    kv = KvCacheConfig(dtype=kv_dtype, tokens_per_block=16)
    arguments = EngineArguments(model=str(model), dtype=dtype, max_seq_len=320, max_batch_size=64, kv_cache_config=kv)
    return load_engine(arguments)[0]


def cpu_ms_per_step(engine: ReferenceEngine, batch: int) -> float:
    """Fill the batch, then time `STEPS` pure decode steps."""
    for request_id in range(batch):
        prompt = [5 + (request_id + i) % 20 for i in range(PROMPT_TOKENS)]
        rule = DecodingRule(max_tokens=STEPS + 10)
        engine.submit(Submit(request_id=request_id, prompt_token_ids=prompt, rule=rule, arrival_ns=0))
    while any(s.num_generated < 3 for s in (*engine.scheduler.running.values(), *engine.scheduler.waiting.values())):
        engine.step()
    began = time.process_time()
    for _ in range(STEPS):
        engine.step()
    elapsed = time.process_time() - began
    while engine.has_work:
        engine.step()
    return elapsed / STEPS * 1e3


def main() -> None:
    """Measure and print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ABACUS)
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 24])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    engines = {variant: make_engine(options.model, *variant) for variant in VARIANTS}
    print(
        f"{options.model}: CPU ms a decode step, median of {options.rounds} rounds, {torch.get_num_threads()} thread(s)"
    )
    rows = []
    for batch in options.batch:
        samples: dict[tuple[str, str], list[float]] = {variant: [] for variant in VARIANTS}
        for index in range(options.rounds):
            for variant in VARIANTS if index % 2 == 0 else VARIANTS[::-1]:
                samples[variant].append(cpu_ms_per_step(engines[variant], batch))
        first = statistics.median(samples[VARIANTS[0]])
        for (dtype, kv_dtype), times in samples.items():
            median = statistics.median(times)
            rows.append({"batch": batch, "dtype": dtype, "kv": kv_dtype, "cpu_ms": median, "ratio": median / first})
            print(
                f"  batch {batch:3} {dtype:9} kv {kv_dtype:5} {median:7.2f} ms ({min(times):.2f} to {max(times):.2f})"
                f"  x{median / first:.2f}"
            )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
