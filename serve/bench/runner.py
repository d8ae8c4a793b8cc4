"""`run_bench` and `run_open_loop`: put one scenario's load on one server and measure it.

What makes the number mean something: prompts of an exact length made of ordinary token ids, answers of an exact length
(the end-of-sequence token is ignored), tokens counted by the server, a warm-up that is no part of the measurement, and
throughput taken over the steady window alone. Where a server cannot give one of these, the result says so.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puzzle_trtllm.errors import BenchError
from puzzle_trtllm.scenario import Arrival, Load, OpenScenario, Scenario, load_any_scenario, load_scenario
from puzzle_trtllm.serve.bench.load import Answer, errors_of, hold_concurrency
from puzzle_trtllm.serve.bench.open_loop import OpenLoopRun, arrival_times_ns, follow_schedule
from puzzle_trtllm.serve.bench.progress import LoadProgress
from puzzle_trtllm.serve.bench.prompts import load_requests
from puzzle_trtllm.serve.bench.result import BenchResult, OpenLoopResult, metric_facts
from puzzle_trtllm.serve.bench.target import Connect, Target, check_length, connect_triton, prompt_tokenizer
from puzzle_trtllm.serve.client.request import GenerationRequest
from puzzle_trtllm.serve.metrics.catalogue import LatencyLimits, MeasuredLoad, compute_metrics
from puzzle_trtllm.serve.metrics.provenance import Provenance
from puzzle_trtllm.serve.metrics.queue import OfferedLoad
from puzzle_trtllm.serve.metrics.records import RequestCounts, RequestRecord


def run_bench(
    url: str,
    *,
    scenario: Scenario | str | Path = "cpu-demo",
    concurrency: int | None = None,
    num_requests: int | None = None,
    warmup_requests: int | None = None,
    seed: int = 0,
    engine: str | Path | None = None,
    tokenizer_folder: str | Path | None = None,
    name: str | None = None,
    connect: Connect = connect_triton,
    quiet: bool = False,
) -> BenchResult:
    """Measure the server at `url` (gRPC, `host:port`) under `scenario`; the keywords below it override its fields.

    engine: the engine folder behind the URL, for provenance and for its tokenizer.
    tokenizer_folder: a checkpoint folder whose ordinary vocabulary the prompts are made of; needed without `engine`.
    seed: equal seeds give equal prompts. Rounds on one server need different seeds, or its prefix cache answers.

    Raises BenchError when no request succeeds, when the load was never held, or when there is no tokenizer to make
    prompts with; ServeError when nobody answers at `url`; ConfigError for a bad scenario.
    """
    load = override_scenario(scenario, concurrency, num_requests, warmup_requests)
    return asyncio.run(
        bench(
            url,
            load,
            seed=seed,
            engine=engine,
            tokenizer_folder=tokenizer_folder,
            name=name,
            connect=connect,
            quiet=quiet,
        )
    )


def override_scenario(
    scenario: Scenario | str | Path,
    concurrency: int | None = None,
    num_requests: int | None = None,
    warmup_requests: int | None = None,
) -> Scenario:
    """The scenario with the given fields replaced. Raises BenchError when it could never reach its concurrency."""
    chosen = scenario if isinstance(scenario, Scenario) else load_scenario(scenario)
    given = {"concurrency": concurrency, "num_requests": num_requests, "warmup_requests": warmup_requests}
    changes = {key: value for key, value in given.items() if value is not None}
    load = Scenario.model_validate(chosen.model_dump() | changes)
    if load.num_requests < load.concurrency:
        raise BenchError(
            "fewer requests than are to be in flight",
            file=load.name,
            key="num_requests",
            found=load.num_requests,
            expected=f"at least the concurrency, {load.concurrency}",
        )
    return load


def open_scenario(
    scenario: OpenScenario | Scenario | str | Path,
    *,
    request_rate: float | None = None,
    arrival: Arrival | None = None,
    num_requests: int | None = None,
    warmup_requests: int | None = None,
) -> OpenScenario:
    """The scenario as an open loop, with the given fields replaced; a closed one needs a `request_rate`.

    Raises BenchError without one, or for fewer than 2 requests; ConfigError for a bad scenario.
    """
    chosen = scenario if isinstance(scenario, Load) else load_any_scenario(scenario)
    given = {
        "request_rate": request_rate,
        "arrival": arrival,
        "num_requests": num_requests,
        "warmup_requests": warmup_requests,
    }
    changes = {key: value for key, value in given.items() if value is not None}
    fields = chosen.model_dump(exclude={"concurrency"}) | changes
    if "request_rate" not in fields:
        raise BenchError("missing: a closed-loop scenario has none", file=chosen.name, key="request_rate")
    if fields["num_requests"] < 2:
        raise BenchError("too few for an open loop", file=chosen.name, key="num_requests", found=1, expected=2)
    return OpenScenario.model_validate(fields)


def run_open_loop(
    url: str,
    *,
    scenario: OpenScenario | Scenario | str | Path,
    request_rate: float | None = None,
    arrival: Arrival | None = None,
    num_requests: int | None = None,
    warmup_requests: int | None = None,
    seed: int = 0,
    engine: str | Path | None = None,
    tokenizer_folder: str | Path | None = None,
    name: str | None = None,
    connect: Connect = connect_triton,
    quiet: bool = False,
) -> OpenLoopResult:
    """Measure the server at `url` at an arrival rate; the rest is as in `run_bench`.

    request_rate: mean arrivals per second; overrides the scenario's, and turns a closed-loop scenario into an open one.
    seed: equal seeds give equal prompts and equal arrival times.

    Raises BenchError also when no request ended before the last one arrived: then there is no steady window.
    """
    load = open_scenario(
        scenario,
        request_rate=request_rate,
        arrival=arrival,
        num_requests=num_requests,
        warmup_requests=warmup_requests,
    )
    runs: list[OpenLoopRun] = []

    async def drive(target: Target, requests: Sequence[GenerationRequest], label: str) -> list[Answer]:
        times_ns = arrival_times_ns(len(requests), request_rate=load.request_rate, arrival=load.arrival, seed=seed)
        with LoadProgress(label, num_requests=len(requests), quiet=quiet) as progress:
            run = await follow_schedule(
                target.stream, requests, times_ns=times_ns, is_truncated=_is_short, observer=progress
            )
        runs.append(run)
        return run.answers

    run = asyncio.run(
        _measure(
            url, load, drive, seed=seed, engine=engine, tokenizer_folder=tokenizer_folder, name=name, connect=connect
        )
    )
    measured = MeasuredLoad.of_open_loop(run.records, num_gpus=run.num_gpus, limits=_limits(load))
    queue = OfferedLoad.of(run.records, measured.window, max_send_delay_ms=runs[-1].max_send_delay_ms)
    return OpenLoopResult(scenario=load, queue=queue, **_facts(run, measured, url=url, name=name, seed=seed))


Drive = Callable[[Target, Sequence[GenerationRequest], str], Awaitable[list[Answer]]]
"""(server, requests, label of the progress line) -> answers in the order of the requests."""


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What came back, and what is known about where from."""

    answers: list[Answer]
    exact: bool
    provenance: Provenance

    @property
    def records(self) -> list[RequestRecord]:
        return [answer.record for answer in self.answers]

    @property
    def num_gpus(self) -> int:
        return self.provenance.engine.num_gpus if self.provenance.engine else 0


async def bench(
    url: str,
    scenario: Scenario,
    *,
    seed: int,
    engine: str | Path | None,
    tokenizer_folder: str | Path | None,
    name: str | None,
    connect: Connect,
    quiet: bool,
) -> BenchResult:
    """`run_bench` for callers that have an event loop."""

    async def drive(target: Target, requests: Sequence[GenerationRequest], label: str) -> list[Answer]:
        with LoadProgress(label, num_requests=len(requests), quiet=quiet) as progress:
            return await hold_concurrency(
                target.stream,
                requests,
                concurrency=scenario.concurrency,
                is_truncated=_is_short,
                observer=progress,
            )

    run = await _measure(
        url, scenario, drive, seed=seed, engine=engine, tokenizer_folder=tokenizer_folder, name=name, connect=connect
    )
    measured = MeasuredLoad.of(
        run.records, concurrency=scenario.concurrency, num_gpus=run.num_gpus, limits=_limits(scenario)
    )
    return BenchResult(scenario=scenario, **_facts(run, measured, url=url, name=name, seed=seed))


async def _measure(
    url: str,
    load: Load,
    drive: Drive,
    *,
    seed: int,
    engine: str | Path | None,
    tokenizer_folder: str | Path | None,
    name: str | None,
    connect: Connect,
) -> _Run:
    """Connect, warm up, and drive the measured requests."""
    check_length(load, engine)
    provenance = Provenance.collect(engine=engine)
    tokenizer = prompt_tokenizer(engine=engine, tokenizer_folder=tokenizer_folder)
    async with connect(url) as target:
        requests = load_requests(
            tokenizer,
            num_requests=load.warmup_requests + load.num_requests,
            input_tokens=load.input_tokens,
            output_tokens=load.output_tokens,
            seed=seed,
            exact=target.gives_token_ids,
        )
        if load.warmup_requests:
            await drive(target, requests[: load.warmup_requests], f"warm-up {name or url}")
        answers = await drive(target, requests[load.warmup_requests :], f"bench {name or url}")
        return _Run(answers=answers, exact=target.gives_token_ids, provenance=provenance)


def _limits(load: Load) -> LatencyLimits:
    return LatencyLimits(max_ttft_ms=load.max_ttft_ms, max_itl_ms=load.max_itl_ms)


def _is_short(request: GenerationRequest, num_tokens: int, _reason: str | None) -> bool:
    """True when an answer of exact length was asked for and a shorter one came."""
    return bool(request.ignore_eos) and request.max_tokens is not None and num_tokens < request.max_tokens


def _facts(run: _Run, load: MeasuredLoad, *, url: str, name: str | None, seed: int) -> dict[str, Any]:
    """The fields of a LoadResult."""
    records = run.records
    values = compute_metrics(load)
    return {
        "name": name or url,
        "url": url,
        "seed": seed,
        "lengths": "exact" if run.exact else "nominal",
        "token_counts": "server" if run.exact else "responses",
        "requests": RequestCounts.of(records),
        "errors": dict(Counter(errors_of(run.answers))),
        "steady_window_s": load.window.seconds,
        "steady_window_tokens": load.window.count_tokens(records),
        "wall_s": (max(r.end_ns for r in records) - min(r.sent_ns for r in records)) / 1e9,
        "scalars": dict(values.scalars),
        "distributions": dict(values.distributions),
        "absent": dict(values.absent),
        "units": metric_facts("unit"),
        "formulas": metric_facts("formula"),
        "provenance": run.provenance,
    }
