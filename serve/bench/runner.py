"""`run_bench`: hold one scenario's load on one server and measure it.

What makes the number mean something: prompts of an exact length made of ordinary token ids, answers of an exact length
(the end-of-sequence token is ignored), tokens counted by the server, a warm-up that is no part of the measurement, and
throughput taken over the steady window alone. Where a server cannot give one of these, the result says so.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from puzzle_trtllm.errors import BenchError
from puzzle_trtllm.scenario import Scenario, load_scenario
from puzzle_trtllm.serve.bench.load import Answer, errors_of, hold_concurrency
from puzzle_trtllm.serve.bench.progress import LoadProgress
from puzzle_trtllm.serve.bench.prompts import load_requests
from puzzle_trtllm.serve.bench.result import BenchResult, metric_facts
from puzzle_trtllm.serve.bench.target import Connect, Target, connect_triton, prompt_tokenizer
from puzzle_trtllm.serve.client.request import GenerationRequest
from puzzle_trtllm.serve.metrics.catalogue import MeasuredLoad, compute_metrics
from puzzle_trtllm.serve.metrics.provenance import Provenance
from puzzle_trtllm.serve.metrics.records import RequestCounts


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
    provenance = Provenance.collect(engine=engine)
    tokenizer = prompt_tokenizer(engine=engine, tokenizer_folder=tokenizer_folder)
    async with connect(url) as target:
        requests = load_requests(
            tokenizer,
            num_requests=scenario.warmup_requests + scenario.num_requests,
            input_tokens=scenario.input_tokens,
            output_tokens=scenario.output_tokens,
            seed=seed,
            exact=target.gives_token_ids,
        )
        warmup, measured = requests[: scenario.warmup_requests], requests[scenario.warmup_requests :]
        if warmup:
            await _run(target, warmup, scenario, f"warm-up {name or url}", quiet=quiet)
        answers = await _run(target, measured, scenario, f"bench {name or url}", quiet=quiet)
        exact = target.gives_token_ids
    return _result(answers, url=url, name=name or url, scenario=scenario, seed=seed, exact=exact, provenance=provenance)


async def _run(
    target: Target, requests: Sequence[GenerationRequest], scenario: Scenario, label: str, *, quiet: bool
) -> list[Answer]:
    with LoadProgress(label, num_requests=len(requests), quiet=quiet) as progress:
        return await hold_concurrency(
            target.stream,
            requests,
            concurrency=scenario.concurrency,
            is_truncated=_is_short,
            observer=progress,
        )


def _is_short(request: GenerationRequest, num_tokens: int, _reason: str | None) -> bool:
    """True when an answer of exact length was asked for and a shorter one came."""
    return bool(request.ignore_eos) and request.max_tokens is not None and num_tokens < request.max_tokens


def _result(
    answers: Sequence[Answer],
    *,
    url: str,
    name: str,
    scenario: Scenario,
    seed: int,
    exact: bool,
    provenance: Provenance,
) -> BenchResult:
    records = [answer.record for answer in answers]
    num_gpus = provenance.engine.num_gpus if provenance.engine else 0
    load = MeasuredLoad.of(records, concurrency=scenario.concurrency, num_gpus=num_gpus)
    values = compute_metrics(load)
    return BenchResult(
        name=name,
        url=url,
        scenario=scenario,
        seed=seed,
        lengths="exact" if exact else "nominal",
        token_counts="server" if exact else "responses",
        requests=RequestCounts.of(records),
        errors=dict(Counter(errors_of(answers))),
        steady_window_s=load.window.seconds,
        steady_window_tokens=load.window.count_tokens(records),
        wall_s=(max(r.end_ns for r in records) - min(r.sent_ns for r in records)) / 1e9,
        scalars=dict(values.scalars),
        distributions=dict(values.distributions),
        absent=dict(values.absent),
        units=metric_facts("unit"),
        formulas=metric_facts("formula"),
        provenance=provenance,
    )
