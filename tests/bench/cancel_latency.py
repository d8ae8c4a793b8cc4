"""How long a client that has disappeared goes on costing: from the end of its stream until its place is given away.

    .venv/bin/python tests/bench/cancel_latency.py [--rounds 15] [--open 32]

The demo's child behind Triton with `--open` places, all of them taken by streams, and one request more, which waits. A
stream is closed; what is measured is the time until the waiting request's first token. For comparison, the time a token
of another stream, since the waiting request's own first step takes one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path

from puzzle_trtllm.build.engine_build import build_engine
from puzzle_trtllm.engine import Engine, load_engine_config
from puzzle_trtllm.serve.client.request import GenerationRequest
from puzzle_trtllm.serve.client.triton_client import TritonLlmClient
from puzzle_trtllm.serve.triton.server import TritonServer

ABACUS = Path(__file__).parents[2] / "puzzle_trtllm" / "demo" / "abacus"
LONG = GenerationRequest(input_ids=[5, 6, 7], max_tokens=250, ignore_eos=True)


async def measure(url: str, num_open: int) -> tuple[float, float]:
    """(ms until the waiting request's first token, ms a token of another stream)."""
    async with TritonLlmClient(url) as client:
        streams = [client.stream(LONG) for _ in range(num_open)]
        await asyncio.gather(*(anext(stream) for stream in streams))
        extra = client.stream(LONG)
        first = asyncio.ensure_future(anext(extra))
        chunks = [await anext(streams[-1]) for _ in range(20)]
        if first.done():
            raise SystemExit("the request more did not have to wait: --open is not the engine's batch size")
        began = time.perf_counter()
        await streams[0].aclose()
        await first
        waited_s = time.perf_counter() - began
        for stream in (*streams[1:], extra):
            await stream.aclose()
    num_tokens = (chunks[-1].num_output_tokens or 0) - (chunks[0].num_output_tokens or 0)
    return waited_s * 1e3, (chunks[-1].received_ns - chunks[0].received_ns) / num_tokens / 1e6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--open", type=int, default=32)
    options = parser.parse_args()
    llm_args = {"stream_interval": 1, "max_batch_size": options.open}
    config = load_engine_config("cpu-demo").model_copy(update={"memory_bytes": None, "llm_args": llm_args})
    config = config.model_copy(update={"kv_dtype": "bf16"})
    with tempfile.TemporaryDirectory() as scratch:
        build_engine(ABACUS, Path(scratch) / "engine", config=config)
        with TritonServer(Engine.open(Path(scratch) / "engine")) as server:
            samples = []
            for index in range(options.rounds + 1):  # the first round warms up
                sample = asyncio.run(measure(server.grpc_url, options.open))
                samples += [sample] if index else []
                time.sleep(0.3)
    waits, steps = (sorted(values) for values in zip(*samples, strict=True))
    print(f"{options.open} open: first token {statistics.median(waits):.0f} ms after a client went", end=" ")
    print(f"({waits[0]:.0f} to {waits[-1]:.0f}); a step takes {statistics.median(steps):.1f} ms")
    print(json.dumps({"open": options.open, "waited_ms": waits, "step_ms": steps}))


if __name__ == "__main__":
    main()
