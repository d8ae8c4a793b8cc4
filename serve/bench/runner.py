"""`run_bench` and `run_open_loop`: put one scenario's load on one server and measure it.

What makes the number mean something: prompts of an exact length made of ordinary token ids, answers of an exact length
(the end-of-sequence token is ignored), tokens counted by the server, a warm-up that is no part of the measurement, and
throughput taken over the steady window alone. Where a server cannot give one of these, the result says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from puzzle_trtllm.errors import BenchError
from puzzle_trtllm.scenario import (
    Arrival,
    Load,
    OpenScenario,
    ReplayScenario,
    Scenario,
    load_any_scenario,
    load_scenario,
)
from puzzle_trtllm.serve.bench.measure import measure, result_fields
from puzzle_trtllm.serve.bench.open_loop import arrival_times_ns
from puzzle_trtllm.serve.bench.replay import replay_times_ns, trace_load
from puzzle_trtllm.serve.bench.requests_csv import save_requests_csv
from puzzle_trtllm.serve.bench.result import BenchResult, OpenLoopResult
from puzzle_trtllm.serve.bench.target import Connect, connect_triton, prompt_tokenizer
from puzzle_trtllm.serve.bench.workers import Pattern, choose_workers
from puzzle_trtllm.serve.metrics.catalogue import LatencyLimits, MeasuredLoad
from puzzle_trtllm.serve.metrics.queue import OfferedLoad
from puzzle_trtllm.trace import Trace

Workers = int | Literal["auto"]


def run_bench(
    url: str,
    *,
    scenario: Scenario | str | Path = "cpu-demo",
    trace: Trace | None = None,
    concurrency: int | None = None,
    num_requests: int | None = None,
    warmup_requests: int | None = None,
    seed: int = 0,
    engine: str | Path | None = None,
    tokenizer_folder: str | Path | None = None,
    name: str | None = None,
    workers: Workers = "auto",
    csv: str | Path | None = None,
    connect: Connect = connect_triton,
    quiet: bool = False,
) -> BenchResult:
    """Measure the server at `url` (gRPC, `host:port`) under `scenario`; the keywords below it override its fields.

    trace: lengths and prompts come from it instead; the scenario's limits, warm-up and concurrency hold.
    engine: the engine folder behind the URL, for provenance and for its tokenizer.
    tokenizer_folder: a checkpoint folder whose ordinary vocabulary the prompts are made of; needed without `engine`.
    seed: equal seeds give equal prompts. Rounds on one server need different seeds, or its prefix cache answers.
    workers: processes that send the load; "auto" is one for each 64 in flight, at most one a core.
    csv: a table to write with a row for each request, also where no metric can be computed.

    Raises BenchError when no request succeeds, when the load was never held, when a worker dies, or when there is no
    tokenizer to make prompts with; ServeError when nobody answers at `url`; ConfigError for a bad scenario.
    """
    tokenizer = prompt_tokenizer(engine=engine, tokenizer_folder=tokenizer_folder)
    load: Load
    if trace is None:
        load = override_scenario(scenario, concurrency, num_requests, warmup_requests)
    else:
        base = scenario if isinstance(scenario, Scenario) else load_scenario(scenario)
        fields = _fields_for_trace(base, warmup_requests)
        load = trace_load(trace, tokenizer, concurrency=concurrency or base.concurrency, **fields)
    assert isinstance(load, Scenario)
    _require_requests(load)
    run = measure(
        url,
        load,
        Pattern(concurrency=load.concurrency),
        trace=trace,
        tokenizer=tokenizer,
        workers=choose_workers(concurrency=load.concurrency) if workers == "auto" else workers,
        seed=seed,
        engine=engine,
        name=name,
        connect=connect,
        quiet=quiet,
    )
    if csv is not None:
        save_requests_csv(run.answers, csv)
    measured = MeasuredLoad.of(run.records, concurrency=load.concurrency, num_gpus=run.num_gpus, limits=_limits(load))
    return BenchResult(scenario=load, **result_fields(run, measured, url=url, name=name, seed=seed))


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
    _require_requests(load)
    return load


def _require_requests(load: Scenario) -> None:
    if load.num_requests < load.concurrency:
        raise BenchError(
            "fewer requests than are to be in flight",
            file=load.name,
            key="num_requests",
            found=load.num_requests,
            expected=f"at least the concurrency, {load.concurrency}",
        )


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
    _require_two(fields["num_requests"], chosen.name)
    return OpenScenario.model_validate(fields)


def _require_two(num_requests: int, name: str) -> None:
    if num_requests < 2:
        raise BenchError(
            "too few for an open loop", file=name, key="num_requests", found=num_requests, expected="at least 2"
        )


def run_open_loop(
    url: str,
    *,
    scenario: OpenScenario | Scenario | str | Path,
    trace: Trace | None = None,
    request_rate: float | None = None,
    arrival: Arrival | None = None,
    speed: float | None = None,
    num_requests: int | None = None,
    warmup_requests: int | None = None,
    seed: int = 0,
    engine: str | Path | None = None,
    tokenizer_folder: str | Path | None = None,
    name: str | None = None,
    workers: Workers = "auto",
    csv: str | Path | None = None,
    connect: Connect = connect_triton,
    quiet: bool = False,
) -> OpenLoopResult:
    """Measure the server at `url` at an arrival rate, or replay a trace; the rest is as in `run_bench`.

    request_rate: mean arrivals per second; overrides the scenario's, and turns a closed-loop scenario into an open one.
    trace: its lengths and prompts; without a `request_rate` also its moments, `speed` times as fast.
    seed: equal seeds give equal prompts and equal arrival times.
    workers: "auto" is one process for each 2,000 tokens/s that the load asks for, at most one a core.

    Raises BenchError also when no request was answered before the last one arrived: then there is no steady window.
    """
    tokenizer = prompt_tokenizer(engine=engine, tokenizer_folder=tokenizer_folder)
    load: Load
    if trace is None:
        load = open_scenario(
            scenario,
            request_rate=request_rate,
            arrival=arrival,
            num_requests=num_requests,
            warmup_requests=warmup_requests,
        )
    else:
        base = scenario if isinstance(scenario, Load) else load_any_scenario(scenario)
        fields = _fields_for_trace(base, warmup_requests)
        load = trace_load(trace, tokenizer, request_rate=request_rate, arrival=arrival, speed=speed, **fields)
    assert isinstance(load, OpenScenario | ReplayScenario)
    _require_two(load.num_requests, load.name)
    times_ns = _times_ns(load, trace, seed=seed)
    seconds = times_ns[-1] / 1e9 or 1.0
    run = measure(
        url,
        load,
        Pattern(times_ns=tuple(times_ns)),
        trace=trace,
        tokenizer=tokenizer,
        workers=(
            choose_workers(tokens_per_s=load.num_requests * load.output_tokens / seconds)
            if workers == "auto"
            else workers
        ),
        seed=seed,
        engine=engine,
        name=name,
        connect=connect,
        quiet=quiet,
    )
    if csv is not None:
        save_requests_csv(run.answers, csv)
    measured = MeasuredLoad.of_open_loop(run.records, num_gpus=run.num_gpus, limits=_limits(load))
    queue = OfferedLoad.of(run.records, measured.window, max_send_delay_ms=run.max_send_delay_ms)
    return OpenLoopResult(scenario=load, queue=queue, **result_fields(run, measured, url=url, name=name, seed=seed))


def _times_ns(load: OpenScenario | ReplayScenario, trace: Trace | None, *, seed: int) -> list[int]:
    if isinstance(load, OpenScenario):
        return arrival_times_ns(load.num_requests, request_rate=load.request_rate, arrival=load.arrival, seed=seed)
    assert trace is not None
    return replay_times_ns(trace, speed=load.speed)


def _fields_for_trace(base: Load, warmup_requests: int | None) -> dict[str, Any]:
    """What a trace's load takes from a scenario."""
    warmup = base.warmup_requests if warmup_requests is None else warmup_requests
    return {"warmup_requests": warmup, "max_ttft_ms": base.max_ttft_ms, "max_tpot_ms": base.max_tpot_ms}


def _limits(load: Load) -> LatencyLimits:
    return LatencyLimits(max_ttft_ms=load.max_ttft_ms, max_tpot_ms=load.max_tpot_ms)
