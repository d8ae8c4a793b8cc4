"""Comparing servers fairly: all up at once, measured in turn, round after round, in alternating order.

Two runs an hour apart on one machine differ by 20% for reasons that have nothing to do with the engine (clocks, caches,
neighbours). Measuring A B, then B A, then A B spreads a slow drift over both, and the range over rounds shows what is
noise. The servers wait idle in between; only one is under load at a time. Every result says which turn it had, so that
reports pair rounds that saw the same machine, and no others.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

from puzzle_trtllm.errors import BenchError
from puzzle_trtllm.scenario import Scenario
from puzzle_trtllm.serve.bench.result import BenchResult, InterleavedResult, ServerRounds, Turn
from puzzle_trtllm.serve.bench.runner import Workers, override_scenario, run_bench

Bench = Callable[..., BenchResult]


def run_interleaved(
    servers: Mapping[str, str],
    *,
    scenario: Scenario | str | Path = "cpu-demo",
    rounds: int = 3,
    concurrency: int | None = None,
    num_requests: int | None = None,
    seed: int = 0,
    engines: Mapping[str, str | Path] | None = None,
    tokenizer_folder: str | Path | None = None,
    workers: Workers = "auto",
    quiet: bool = False,
    bench: Bench = run_bench,
) -> InterleavedResult:
    """Measure `servers` (name -> gRPC URL) in `rounds` rounds; round i uses seed + i, the same for every server.

    engines: name -> engine folder, where known. The warm-up runs in the first round only: the servers stay up.
    Raises BenchError for no servers, no rounds, an engine without a server, or whatever one run raises.
    """
    if not servers or rounds < 1:
        raise BenchError("nothing to measure", found=f"{len(servers)} servers, {rounds} rounds", expected="at least 1")
    unknown = set(engines or {}) - set(servers)
    if unknown:
        raise BenchError("an engine without a server", key=sorted(unknown)[0], expected=", ".join(servers))
    load = override_scenario(scenario, concurrency, num_requests)
    results: dict[str, list[BenchResult]] = {name: [] for name in servers}
    comparison = uuid.uuid4().hex
    order = [round_order(list(servers), index) for index in range(rounds)]
    for index, names in enumerate(order):
        for name in names:
            result = bench(
                servers[name],
                scenario=load,
                warmup_requests=load.warmup_requests if index == 0 else 0,
                seed=seed + index,
                engine=(engines or {}).get(name),
                tokenizer_folder=tokenizer_folder,
                name=name,
                workers=workers,
                quiet=quiet,
            )
            results[name].append(result.model_copy(update={"turn": Turn(comparison=comparison, round=index)}))
    return InterleavedResult(
        scenario=load, servers={name: ServerRounds.of(of_name) for name, of_name in results.items()}, order=order
    )


def round_order(names: list[str], index: int) -> list[str]:
    """A B C, then C B A, then A B C: each server is early as often as late (exactly so after an even number)."""
    return names if index % 2 == 0 else names[::-1]
