"""How many prompt blocks a prefix cache finds, by the room that window groups have beyond what running sequences hold.

    .venv/bin/python tests/bench/prefix_reuse.py [--requests 1500]

The engine's real scheduler and cache with a model that draws logits at random, so it takes seconds. Layers with windows
of 7 and 24 and with full attention, blocks of 8, 16 requests at a time. Prompts of 1 to 60 tokens come from eight
families and follow their family's text to a random point.
"""

from __future__ import annotations

import argparse
import json
import random

import torch

from puzzle_trtllm.kv_layout import KvLayout
from puzzle_trtllm.models.reference.kv_cache import PagedKvCache
from puzzle_trtllm.serve.runtimes.reference.engine import ReferenceEngine
from puzzle_trtllm.serve.runtimes.reference.scheduler import Scheduler
from tests.serve.test_reference_engine import RandomModel, family_prompt, submit
from tests.toys import toy_architecture

RUNNING = {7: 32, 24: 64, None: 240}
"""Blocks that 16 sequences of 120 tokens hold in each group."""


def hit_rate(room: int, num_requests: int) -> float:
    """Share of prompt blocks found, with window pools `room` times what running sequences hold."""
    num_blocks = {window: count * (1 if window is None else room) for window, count in RUNNING.items()}
    layout = KvLayout(
        architecture=toy_architecture([(4, 24), (4, None), (4, 7)]),
        tokens_per_block=8,
        num_blocks=num_blocks,
        dtype=torch.bfloat16,
    )
    cache = PagedKvCache(layout, torch.device("cpu"))
    engine = ReferenceEngine(RandomModel(64), Scheduler(cache, max_batch_size=16, max_num_tokens=64))  # type: ignore[arg-type]
    rng, num_open = random.Random(0), 0
    for request_id in range(num_requests):
        submit(engine, request_id, family_prompt(rng, rng.randint(1, 60)), max_tokens=rng.randint(1, 12))
        num_open += 1
        while num_open > 40:
            num_open -= sum(update.finish_reason is not None for update in engine.step())
    return float(engine.stats["kvCacheStats"]["cacheHitRate"])


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1500)
    options = parser.parse_args()
    rates = {room: hit_rate(room, options.requests) for room in (1, 2, 4, 100)}
    for room, rate in rates.items():
        print(f"window pools {room:3} times what running sequences hold: {rate:.3f} of the prompt blocks found")
    print(json.dumps(rates))


if __name__ == "__main__":
    main()
