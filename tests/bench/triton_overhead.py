"""What Triton and gRPC cost: the same engine and the same load, in process and through the server.

    .venv/bin/python tests/bench/triton_overhead.py [--rounds 5] [--requests 64]

Builds the demo's child (as the demo does, into a scratch folder) without a memory cap, loads it once in this process
and once behind Triton, for `stream_interval` 10 and 1 and without streaming, and lets all of them run the demo's load
in turn, rounds in alternating order. The load generator is one and the same: in process it drives `LLM.generate_async`
instead of a gRPC client. Prints tokens/s, the ratio to in process, and one JSON line. Wall time includes a run's start
and end; the machine's two cores are shared by client, server, stub and engine, as in the demo.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

from puzzle_trtllm.build.engine_build import build_engine
from puzzle_trtllm.engine import Engine, load_engine_config
from puzzle_trtllm.scenario import load_scenario
from puzzle_trtllm.serve.bench.load import hold_concurrency
from puzzle_trtllm.serve.bench.prompts import load_requests
from puzzle_trtllm.serve.bench.target import Connect, Target, connect_triton, prompt_tokenizer
from puzzle_trtllm.serve.client.request import GenerationChunk, GenerationRequest
from puzzle_trtllm.serve.runtimes import create_llm
from puzzle_trtllm.serve.runtimes.reference import LLM, SamplingParams
from puzzle_trtllm.serve.triton.server import TritonServer

ABACUS = Path(__file__).parents[2] / "puzzle_trtllm" / "demo" / "abacus"


class InProcess:
    """A load target without a server: the LLM itself."""

    gives_token_ids = True

    def __init__(self, llm: LLM) -> None:
        self.llm = llm

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        params = SamplingParams(max_tokens=request.max_tokens or 1, ignore_eos=bool(request.ignore_eos))
        seen = 0
        running = self.llm.generate_async(list(request.input_ids or ()), params, streaming=request.streaming)
        async for step in running:
            output = step.outputs[0]
            yield GenerationChunk(
                text="",
                token_ids=output.token_ids[seen:],
                num_output_tokens=len(output.token_ids),
                finish_reason=output.finish_reason,
                received_ns=time.perf_counter_ns(),
            )
            seen = len(output.token_ids)


def connect_in_process(llm: LLM) -> Connect:
    """A `Connect` for the load generator."""

    @asynccontextmanager
    async def connect(_: str) -> AsyncIterator[Target]:
        yield InProcess(llm)

    return connect


class Silent:
    """No progress display."""

    def on_tokens(self, count: int) -> None: ...
    def on_end(self, *_: object) -> None: ...


async def tokens_per_s(connect: Connect, url: str, requests: list[GenerationRequest], concurrency: int) -> float:
    """All generated tokens over the wall time of the whole run."""
    async with connect(url) as target:
        began = time.perf_counter()
        answers = await hold_concurrency(
            target.stream, requests, concurrency=concurrency, is_truncated=lambda *_: False, observer=Silent()
        )
        return sum(a.record.num_output_tokens for a in answers) / (time.perf_counter() - began)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--checkpoint", type=Path, default=ABACUS)
    options = parser.parse_args()
    scenario = load_scenario("cpu-demo")
    config = load_engine_config("cpu-demo").model_copy(update={"memory_bytes": None, "kv_dtype": "bf16"})
    # Rounds repeat their prompts, which no cache may answer.
    no_reuse = {"kv_cache_config": {"enable_block_reuse": False}}
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        runs: dict[str, tuple[Connect, str, bool]] = {}
        for interval in (10, 1):
            folder = scratch / f"interval-{interval}"
            build_engine(
                options.checkpoint,
                folder,
                config=config.model_copy(update={"llm_args": {"stream_interval": interval, **no_reuse}}),
            )
            engine = Engine.open(folder)
            llm = stack.enter_context(create_llm(engine))
            server = stack.enter_context(TritonServer(engine))
            for streaming in (True, False) if interval == 10 else (True,):
                label = f"interval {interval}" if streaming else "no streaming"
                runs[f"in process, {label}"] = (connect_in_process(llm), "", streaming)
                runs[f"Triton, {label}"] = (connect_triton, server.grpc_url, streaming)
        tokenizer = prompt_tokenizer(engine=scratch / "interval-1", tokenizer_folder=None)
        requests = load_requests(
            tokenizer,
            num_requests=options.requests,
            input_tokens=scenario.input_tokens,
            output_tokens=scenario.output_tokens,
            seed=0,
            exact=True,
        )
        samples: dict[str, list[float]] = {name: [] for name in runs}
        for index in range(options.rounds + 1):  # the first round warms up
            for name in list(runs) if index % 2 == 0 else list(runs)[::-1]:
                connect, url, streaming = runs[name]
                load = [replace(request, streaming=streaming) for request in requests]
                rate = asyncio.run(tokens_per_s(connect, url, load, scenario.concurrency))
                if index:
                    samples[name].append(rate)
    report(samples, options.rounds)


def report(samples: dict[str, list[float]], rounds: int) -> None:
    """The table and the JSON line; a ratio is the median of the rounds' own ratios."""
    rows = {}
    for name, rates in samples.items():
        base = samples["in process, " + name.split(", ")[1]]
        ratio = statistics.median(own / other for own, other in zip(rates, base, strict=True))
        rows[name] = {"tokens_per_s": statistics.median(rates), "ratio_to_in_process": ratio}
        print(f"{name:28} {statistics.median(rates):7.0f} tok/s ({min(rates):.0f} to {max(rates):.0f})  x{ratio:.2f}")
    print(json.dumps({"rounds": rounds, "runs": rows}))


if __name__ == "__main__":
    main()
