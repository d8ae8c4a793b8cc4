"""One load on one server, from the first connection to the fields of a result: what both kinds of loop share."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puzzle_trtllm.chat import ChatTokenizer
from puzzle_trtllm.scenario import Load
from puzzle_trtllm.serve.bench.load import Answer, errors_of, hold_concurrency
from puzzle_trtllm.serve.bench.open_loop import OpenLoopRun, follow_schedule
from puzzle_trtllm.serve.bench.progress import LoadProgress
from puzzle_trtllm.serve.bench.prompts import load_requests
from puzzle_trtllm.serve.bench.replay import trace_requests
from puzzle_trtllm.serve.bench.result import ClientFacts, metric_facts
from puzzle_trtllm.serve.bench.target import Connect, Target, check_length
from puzzle_trtllm.serve.bench.token_counts import count_by_tokenizer
from puzzle_trtllm.serve.bench.workers import Pattern, WorkersRun, drive_in_workers
from puzzle_trtllm.serve.client.request import GenerationRequest
from puzzle_trtllm.serve.metrics.catalogue import MeasuredLoad, compute_metrics
from puzzle_trtllm.serve.metrics.provenance import Provenance
from puzzle_trtllm.serve.metrics.records import RequestCounts, RequestRecord
from puzzle_trtllm.trace import Trace

WARMUP_CONCURRENCY = 16


@dataclass(frozen=True, kw_only=True)
class MeasuredRun:
    """What came back, and what is known about where from."""

    answers: list[Answer]
    exact: bool
    max_send_delay_ms: float
    client: ClientFacts
    provenance: Provenance
    num_instances: int

    @property
    def records(self) -> list[RequestRecord]:
        return [answer.record for answer in self.answers]

    @property
    def num_gpus(self) -> int:
        """Of the whole server; 0 on a CPU, or where the engine behind the URL is not known."""
        return self.provenance.engine.num_gpus * self.num_instances if self.provenance.engine else 0


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """A server that has been warmed up, and the requests for it; with one process also what they brought."""

    requests: list[GenerationRequest]
    exact: bool
    num_instances: int
    measured: WorkersRun | None


def measure(
    url: str,
    load: Load,
    pattern: Pattern,
    *,
    trace: Trace | None,
    tokenizer: ChatTokenizer,
    workers: int,
    seed: int,
    engine: str | Path | None,
    name: str | None,
    connect: Connect,
    quiet: bool,
) -> MeasuredRun:
    """Connect, warm up, and drive the measured requests."""
    check_length(load, engine)
    provenance = Provenance.collect(engine=engine)
    label = name or url

    async def prepare() -> _Prepared:
        async with connect(url) as target:
            exact = target.gives_token_ids
            requests = _requests(load, trace, tokenizer, seed=seed, exact=exact)
            warmup, requests = requests[: load.warmup_requests], requests[load.warmup_requests :]
            if warmup:
                some = Pattern(concurrency=min(pattern.concurrency or WARMUP_CONCURRENCY, len(warmup)))
                with LoadProgress(f"warm-up {label}", num_requests=len(warmup), quiet=quiet) as progress:
                    await _drive(target, warmup, some, progress)
            measured = None
            if workers <= 1:
                with LoadProgress(f"bench {label}", num_requests=len(requests), quiet=quiet) as progress:
                    measured = await _drive(target, requests, pattern, progress)
            return _Prepared(requests=requests, exact=exact, num_instances=target.num_instances, measured=measured)

    prepared = asyncio.run(prepare())
    measured, requests = prepared.measured, prepared.requests
    if measured is None:
        with LoadProgress(f"bench {label}, {workers} workers", num_requests=len(requests), quiet=quiet) as progress:
            measured = drive_in_workers(
                url,
                requests,
                pattern,
                workers=workers,
                connect=connect,
                is_truncated=is_short,
                progress=progress,
            )
    answers = measured.run.answers
    return MeasuredRun(
        answers=answers if prepared.exact else count_by_tokenizer(answers, tokenizer),
        exact=prepared.exact,
        max_send_delay_ms=measured.run.max_send_delay_ms,
        client=ClientFacts(workers=measured.workers, busiest_cpu=measured.busiest_cpu),
        provenance=provenance,
        num_instances=prepared.num_instances,
    )


async def _drive(
    target: Target, requests: Sequence[GenerationRequest], pattern: Pattern, progress: LoadProgress
) -> WorkersRun:
    """Send `requests` from this process."""
    began_s, cpu_s = time.perf_counter(), time.process_time()
    if pattern.concurrency is None:
        run = await follow_schedule(
            target.stream, requests, times_ns=pattern.times_ns, is_truncated=is_short, observer=progress
        )
    else:
        answers = await hold_concurrency(
            target.stream,
            requests,
            concurrency=pattern.concurrency,
            is_truncated=is_short,
            observer=progress,
        )
        run = OpenLoopRun(answers=answers, max_send_delay_ms=0.0)
    cpu = (time.process_time() - cpu_s) / (time.perf_counter() - began_s)
    return WorkersRun(run=run, workers=1, busiest_cpu=cpu)


def _requests(
    load: Load, trace: Trace | None, tokenizer: ChatTokenizer, *, seed: int, exact: bool
) -> list[GenerationRequest]:
    """The warm-up's requests, then the measured ones. Before a trace, random prompts of its mean length warm up."""
    count = load.warmup_requests + (load.num_requests if trace is None else 0)
    requests = load_requests(
        tokenizer,
        num_requests=count,
        input_tokens=load.input_tokens,
        output_tokens=load.output_tokens,
        input_spread=load.input_spread,
        output_spread=load.output_spread,
        seed=seed,
        exact=exact,
    )
    return requests if trace is None else [*requests, *trace_requests(trace, tokenizer, seed=seed, exact=exact)]


def is_short(request: GenerationRequest, num_tokens: int, _reason: str | None) -> bool:
    """True when an answer of exact length was asked for and a shorter one came."""
    return bool(request.ignore_eos) and request.max_tokens is not None and num_tokens < request.max_tokens


def result_fields(run: MeasuredRun, load: MeasuredLoad, *, url: str, name: str | None, seed: int) -> dict[str, Any]:
    """The fields of a LoadResult."""
    records = run.records
    values = compute_metrics(load)
    return {
        "name": name or url,
        "url": url,
        "seed": seed,
        "lengths": "exact" if run.exact else "nominal",
        "token_counts": "server" if run.exact else "tokenizer",
        "client": run.client,
        "num_instances": run.num_instances,
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
