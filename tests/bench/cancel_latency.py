"""How long a client that has disappeared goes on costing: from its end until its place is given away.

    .venv/bin/python tests/bench/cancel_latency.py [--rounds 25] [--open 1 32] [--how cancel close kill]

The demo's child behind Triton with `--open` places, all of them taken by streams that are read as they come, and one
request more, which waits. One of the streams belongs to a client process of its own, which cancels its call, closes its
connection, or is killed with SIGKILL. Measured from that order (CLOCK_MONOTONIC, one for all processes): until the stub
asks the engine to abort (found by its sweep), until the engine has (between two steps), and until the waiting request's
first token has arrived, as the sum of both and of its first step. For comparison, the time a token of another stream.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from puzzle_trtllm.build.engine_build import build_engine
from puzzle_trtllm.engine import Engine, load_engine_config
from puzzle_trtllm.serve.client.request import GenerationRequest
from puzzle_trtllm.serve.client.triton_client import TritonLlmClient
from puzzle_trtllm.serve.triton.server import TritonServer

HERE = Path(__file__).parent
ABACUS = HERE.parents[1] / "puzzle_trtllm" / "demo" / "abacus"
LONG = GenerationRequest(input_ids=[5, 6, 7], max_tokens=500, ignore_eos=True)
PARTS = ("asked", "aborted", "next_token")


async def disappear(url: str) -> None:
    """The client process: opens its stream at the first line of stdin, and at the second does what that says."""
    client = await TritonLlmClient(url).__aenter__()
    print("connected", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    stream = client.stream(LONG)
    await anext(stream)
    print("open", flush=True)
    reading = asyncio.ensure_future(_read(stream, []))
    how = (await asyncio.to_thread(sys.stdin.readline)).strip()
    if how == "close":
        await client.__aexit__(None, None, None)
    reading.cancel()
    await asyncio.to_thread(sys.stdin.readline)


async def _read(stream: Any, seen: list[Any]) -> None:
    async for chunk in stream:
        seen.append(chunk)


async def measure(url: str, num_open: int, how: str, times: Path) -> dict[str, float] | None:
    """Milliseconds from the order on, by PARTS, and `step`; None when a stream came to its end first."""
    command = [sys.executable, __file__, "--disappear", url]
    victim = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert victim.stdin is not None and victim.stdout is not None
    try:
        async with TritonLlmClient(url) as client:
            await asyncio.to_thread(victim.stdout.readline)
            streams = [client.stream(LONG) for _ in range(num_open - 1)]
            await asyncio.gather(*(anext(stream) for stream in streams))
            seen: list[Any] = []
            others = [asyncio.ensure_future(_read(stream, seen if stream is streams[0] else [])) for stream in streams]
            print("go", file=victim.stdin, flush=True)
            await asyncio.to_thread(victim.stdout.readline)
            waiting = asyncio.ensure_future(anext(client.stream(LONG)))
            await asyncio.sleep(0.1)
            if waiting.done():
                return None
            known = times.read_text()
            began_ns = time.monotonic_ns()
            if how == "kill":
                victim.kill()
            else:
                print(how, file=victim.stdin, flush=True)
            step = _time_a_token(seen) if seen else math.nan
            await waiting
            ends_ns = [*map(int, times.read_text()[len(known) :].split()[:2]), time.monotonic_ns()]
            if len(ends_ns) != len(PARTS):
                return None
            found = {name: (end_ns - began_ns) / 1e6 for name, end_ns in zip(PARTS, ends_ns, strict=True)}
            found["step"] = step
            for other in others:
                other.cancel()
    finally:
        with suppress(OSError):
            victim.communicate(timeout=10)
    return found


def _time_a_token(chunks: list[Any]) -> float:
    num_tokens = chunks[-1].num_output_tokens - chunks[0].num_output_tokens
    return (chunks[-1].received_ns - chunks[0].received_ns) / max(1, num_tokens) / 1e6


def serve_and_measure(options: argparse.Namespace, num_open: int, scratch: Path) -> dict[str, list[dict[str, float]]]:
    """All `options.how` in turns, by name."""
    llm_args = {"stream_interval": options.stream_interval, "max_batch_size": num_open}
    config = load_engine_config("cpu-demo").model_copy(update={"memory_bytes": None, "llm_args": llm_args})
    build_engine(ABACUS, scratch / "engine", config=config.model_copy(update={"kv_dtype": "bf16"}), quiet=True)
    times = scratch / "times"
    times.touch()
    samples: dict[str, list[dict[str, float]]] = {how: [] for how in options.how}
    with TritonServer(
        Engine.open(scratch / "engine"),
        runtime_module="abort_times",
        environment={"PYTHONPATH": str(HERE), "ABORT_TIMES": str(times)},
        cancellation_check_period_ms=options.period,
    ) as server:
        for index in range(options.rounds + 1):  # the first round warms up
            for how in options.how:
                while (sample := asyncio.run(measure(server.grpc_url, num_open, how, times))) is None:
                    print(f"{how}: a stream came to its end first, left out", flush=True)
                    time.sleep(0.3)
                samples[how] += [sample] if index else []
                time.sleep(0.3)
    return samples


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--open", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--how", nargs="+", choices=["cancel", "close", "kill"], default=["cancel", "close", "kill"])
    parser.add_argument("--stream-interval", type=int, default=10)
    parser.add_argument("--period", type=float, default=25, help="cancellation_check_period_ms")
    parser.add_argument("--disappear", metavar="URL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.disappear:
        asyncio.run(disappear(options.disappear))
        return
    for num_open in options.open:
        with tempfile.TemporaryDirectory() as scratch:
            samples = serve_and_measure(options, num_open, Path(scratch))
        for how, found in samples.items():
            columns = {name: sorted(sample[name] for sample in found) for name in (*PARTS, "step")}
            text = ", ".join(f"{name} {statistics.median(v):.1f} (worst {max(v):.1f})" for name, v in columns.items())
            print(f"{num_open} open, {how}: {text} ms", flush=True)
            print(json.dumps({"open": num_open, "how": how, **columns}), flush=True)


if __name__ == "__main__":
    main()
