"""What Triton and gRPC cost: the same engine and the same load, in process and through the server.

    .venv/bin/python tests/bench/triton_overhead.py [--rounds 40] [--streaming none 10]
    .venv/bin/python tests/bench/triton_overhead.py --requests 128 --output 128 --output-spread 0
    .venv/bin/python tests/bench/triton_overhead.py --apart

Builds the demo's child (as the demo does, into a scratch folder) without a memory cap, loads it once in this process
and once behind Triton, for `stream_interval` 10 and 1 and without streaming, and lets all of them run one load in turn,
rounds in alternating order. The load generator is one and the same: in process it drives `LLM.generate_async` instead
of a gRPC client. Prints tokens/s, the ratio to in process (the median of the rounds' own, with the 95% interval that
drawing the rounds again gives), the CPU time a response that each process spent (the client's is this process's), and
one JSON line.

Lengths vary from half to one and a half of `--output`, as real ones do. With all of one length (the second command)
requests end together, and the next wave arrives together: in process at one instant, so that nothing hides what Triton
costs a request then. Wall time includes a run's start and end; the machine's cores are shared by client, server, stub
and engine, as in the demo. With `--apart` (the third) the engine behind Triton has the last core to itself, as `serve
--engine-cores` gives it; the client, and all that is in process, stays where it likes. With `--client-apart` the client
of the server leaves that core as well, as one on another host would.

A shared host's clock may change by half between two runs: many short rounds tell more than a few long ones. What
Triton costs is also counted in what no clock changes, the steps that the engine makes for the load (more of them when a
finished request's successor comes late) and the share of the time in which it computes (less when it waits for
requests, or for a core):

    at equal speed = steps in process / steps * share / share in process
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import ExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from puzzle_trtllm.build.engine_build import build_engine
from puzzle_trtllm.engine import Engine, load_engine_config
from puzzle_trtllm.process_states import children_of
from puzzle_trtllm.scenario import Spread, load_scenario
from puzzle_trtllm.serve.bench.load import hold_concurrency
from puzzle_trtllm.serve.bench.prompts import load_requests
from puzzle_trtllm.serve.bench.target import Connect, Target, connect_triton, prompt_tokenizer
from puzzle_trtllm.serve.client.request import GenerationChunk, GenerationRequest
from puzzle_trtllm.serve.metrics.bootstrap import percentile_interval, resampled_medians
from puzzle_trtllm.serve.runtimes import create_llm
from puzzle_trtllm.serve.runtimes.reference import LLM, SamplingParams
from puzzle_trtllm.serve.triton.metrics import PERIOD_S as METRICS_PERIOD_S
from puzzle_trtllm.serve.triton.probe import read_metrics
from puzzle_trtllm.serve.triton.server import TritonServer

WAYS = ("none", "10", "1")
SETTLING_S = METRICS_PERIOD_S + 0.2
"""Until the server's metrics have been set anew."""
ABACUS = Path(__file__).parents[2] / "puzzle_trtllm" / "demo" / "abacus"


class InProcess:
    """A load target without a server: the LLM itself."""

    gives_token_ids = True
    num_instances = 1

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


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One run."""

    tokens_per_s: float
    """All generated tokens over the wall time of the whole run."""
    responses: int
    cpu_s: dict[str, float]
    """User and system time by process: client, and behind Triton server, stub, engine."""
    steps: int
    """Of the engine."""
    elapsed_s: float

    @property
    def computing(self) -> float:
        """Share of the time in which the engine computes; it does so on one thread."""
        return self.cpu_s["engine"] / self.elapsed_s


@dataclass(frozen=True, kw_only=True)
class Run:
    """One way to the engine."""

    connect: Connect
    url: str
    streaming: bool
    processes: dict[str, psutil.Process]
    count_steps: Callable[[], int]
    """Of the engine, since its start; asked when nothing has run for `SETTLING_S`."""

    def cpu_s(self) -> dict[str, float]:
        times = {name: process.cpu_times() for name, process in self.processes.items()}
        return {name: t.user + t.system for name, t in times.items()}

    async def measure(self, requests: list[GenerationRequest], concurrency: int) -> Sample:
        """Run the load once."""
        responses = 0
        async with self.connect(self.url) as target:

            async def counted(request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
                nonlocal responses
                async with aclosing(target.stream(request)) as chunks:
                    async for chunk in chunks:
                        responses += 1
                        yield chunk

            await asyncio.sleep(SETTLING_S)  # both ways: an idle machine is slower at first
            steps = self.count_steps()
            before, began = self.cpu_s(), time.perf_counter()
            answers = await hold_concurrency(
                counted, requests, concurrency=concurrency, is_truncated=lambda *_: False, observer=Silent()
            )
            elapsed_s, after = time.perf_counter() - began, self.cpu_s()
            await asyncio.sleep(SETTLING_S)
        return Sample(
            tokens_per_s=sum(a.record.num_output_tokens for a in answers) / elapsed_s,
            responses=responses,
            cpu_s={name: after[name] - before[name] for name in after},
            steps=self.count_steps() - steps,
            elapsed_s=elapsed_s,
        )


def processes_in_process(llm: LLM) -> dict[str, psutil.Process]:
    return {"client": psutil.Process(), "engine": psutil.Process(llm.engine_pid)}


def processes_of(server: TritonServer) -> dict[str, psutil.Process]:
    (stub,) = server.stub_pids()
    (engine,) = children_of(stub)
    pids = {"server": server.pid, "stub": stub, "engine": engine}
    return {"client": psutil.Process(), **{name: psutil.Process(pid) for name, pid in pids.items()}}


def count_steps_behind(server: TritonServer) -> int:
    """What the server's metrics say."""
    metrics = read_metrics(server.metrics_url)
    assert metrics is not None
    return int(metrics["puzzle_engine_steps_total"])


def start_ways(
    stack: ExitStack, checkpoint: Path, folder: Path, streaming: str, engine_cores: list[int] | None
) -> dict[str, Run]:
    """One engine in process and one behind Triton; `streaming` is its interval, or `none`."""
    config = load_engine_config("cpu-demo").model_copy(update={"memory_bytes": None, "kv_dtype": "bf16"})
    llm_args = {
        "stream_interval": 1 if streaming == "none" else int(streaming),
        # Rounds repeat their prompts, which no cache may answer.
        "kv_cache_config": {"enable_block_reuse": False},
    }
    build_engine(checkpoint, folder, config=config.model_copy(update={"llm_args": llm_args}))
    engine = Engine.open(folder)
    llm = stack.enter_context(create_llm(engine))
    server = stack.enter_context(TritonServer(engine, engine_cores=engine_cores))
    label = "no streaming" if streaming == "none" else f"interval {streaming}"
    return {
        f"in process, {label}": Run(
            connect=connect_in_process(llm),
            url="",
            streaming=streaming != "none",
            processes=processes_in_process(llm),
            count_steps=lambda: int(llm.get_stats()[0]["iter"]),
        ),
        f"Triton, {label}": Run(
            connect=connect_triton,
            url=server.grpc_url,
            streaming=streaming != "none",
            processes=processes_of(server),
            count_steps=lambda: count_steps_behind(server),
        ),
    }


def move_threads(cores: set[int]) -> None:
    """All threads of this process to `cores`."""
    for thread in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread.name), cores)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--requests", type=int, default=192)
    parser.add_argument("--output", type=int, default=84, help="mean tokens an answer")
    parser.add_argument("--output-spread", type=float, default=0.5, help="lengths vary by this share of the mean")
    parser.add_argument("--streaming", nargs="+", choices=WAYS, default=WAYS, help="which stream_intervals")
    parser.add_argument("--apart", action="store_true", help="server and stub off the engine's core, the last one")
    parser.add_argument("--client-apart", action="store_true", help="with --apart: the client off that core as well")
    parser.add_argument("--checkpoint", type=Path, default=ABACUS)
    options = parser.parse_args()
    if options.client_apart and not options.apart:
        parser.error("--client-apart goes with --apart")
    scenario = load_scenario("cpu-demo")
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        runs: dict[str, Run] = {}
        all_cores = os.sched_getaffinity(0)
        cores = [max(all_cores)] if options.apart else None
        client_cores = all_cores - {max(all_cores)} if options.client_apart else all_cores
        for streaming in options.streaming:
            runs |= start_ways(stack, options.checkpoint, scratch / streaming, streaming, cores)
        engine = Engine.open(scratch / options.streaming[0])
        longest = scenario.input_tokens + int(options.output * (1 + options.output_spread))
        if longest > engine.llm_args["max_seq_len"]:  # the engine would cut the answers, and they would hardly vary
            parser.error(f"{longest} tokens a request, but the engine has {engine.llm_args['max_seq_len']} positions")
        requests = load_requests(
            prompt_tokenizer(engine=engine.path, tokenizer_folder=None),
            num_requests=options.requests,
            input_tokens=scenario.input_tokens,
            output_tokens=options.output,
            output_spread=Spread(uniform=options.output_spread) if options.output_spread else None,
            seed=0,
            exact=True,
        )
        samples: dict[str, list[Sample]] = {name: [] for name in runs}
        for index in range(options.rounds + 1):  # the first round warms up
            for name in list(runs) if index % 2 == 0 else list(runs)[::-1]:
                load = [replace(request, streaming=runs[name].streaming) for request in requests]
                move_threads(client_cores if runs[name].url else all_cores)
                sample = asyncio.run(runs[name].measure(load, scenario.concurrency))
                if index:
                    samples[name].append(sample)
    report(samples, options.rounds)


def report(samples: dict[str, list[Sample]], rounds: int) -> None:
    """The tables and the JSON line; a ratio is the median of the rounds' own ratios."""
    rows = {}
    for name, own in samples.items():
        base = samples["in process, " + name.split(", ")[1]]
        rates = [sample.tokens_per_s for sample in own]
        ratios = [a.tokens_per_s / b.tokens_per_s for a, b in zip(own, base, strict=True)]
        interval = percentile_interval(resampled_medians(tuple(ratios)))
        at_equal_speed = statistics.median(
            b.steps / a.steps * a.computing / b.computing for a, b in zip(own, base, strict=True)
        )
        cpu_us = {
            process: statistics.median(sample.cpu_s[process] / sample.responses for sample in own) * 1e6
            for process in own[0].cpu_s
        }
        rows[name] = {
            "tokens_per_s": statistics.median(rates),
            "ratio_to_in_process": statistics.median(ratios),
            "ratio_interval": (interval.low, interval.high),
            "ratio_at_equal_speed": at_equal_speed,
            "steps": statistics.median(sample.steps for sample in own),
            "computing": statistics.median(sample.computing for sample in own),
            "responses": statistics.median(sample.responses for sample in own),
            "cpu_us_per_response": cpu_us,
        }
        print(f"{name:26} {statistics.median(rates):6.0f} tok/s ({min(rates):.0f} to {max(rates):.0f})")
        if own is not base:
            ends = "no interval" if interval.low is None else f"{interval.low:.3f} to {interval.high:.3f}"
            print(
                f"{'':26} x{statistics.median(ratios):.3f} of in process ({ends}); at equal speed x{at_equal_speed:.3f}"
            )
        print(f"{'':26} {rows[name]['steps']:6.0f} steps, computing {rows[name]['computing']:.1%} of the time")
        parts = ", ".join(f"{process} {value:.0f}" for process, value in cpu_us.items())
        print(f"{'':26} {rows[name]['responses']:6.0f} responses; CPU us a response: {parts}")
    print(json.dumps({"rounds": rounds, "runs": rows}))


if __name__ == "__main__":
    main()
