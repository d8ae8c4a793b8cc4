"""Several engines side by side: a Triton server each, all up together, measured in interleaved rounds.

The capped engines and their uncapped twins are rounds of one and the same load, so that their ratios see the same
machine. The evaluation then runs on the capped servers, one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from puzzle_trtllm.engine import Engine
from puzzle_trtllm.serve.bench.interleaved import run_interleaved
from puzzle_trtllm.serve.bench.result import BenchResult
from puzzle_trtllm.serve.evaluate.result import EvaluationResult
from puzzle_trtllm.serve.evaluate.runner import evaluate
from puzzle_trtllm.serve.report.assemble import assemble_measurement
from puzzle_trtllm.serve.report.measurement import EngineMeasurement
from puzzle_trtllm.serve.triton.server import TritonServer

SCENARIO = "cpu-demo"
EVALUATION_CONCURRENCY = 32
EVALUATION_MAX_TOKENS = 200


@dataclass(frozen=True, kw_only=True)
class EngineFolders:
    """One engine under the memory cap, and its twin without."""

    capped: Path
    uncapped: Path


@dataclass(frozen=True, kw_only=True)
class MeasurementPlan:
    """How much to measure; None means all that the scenario or the problem set has."""

    rounds: int
    num_requests: int | None
    num_problems: int | None


def server_folders(engines: Mapping[str, EngineFolders]) -> dict[str, Path]:
    """One server for every engine and every uncapped twin: engine folder by server name."""
    folders = {name: pair.capped for name, pair in engines.items()}
    return folders | {_uncapped(name): pair.uncapped for name, pair in engines.items()}


def bench_in_turn(
    urls: Mapping[str, str], folders: Mapping[str, Path], plan: MeasurementPlan
) -> dict[str, list[BenchResult]]:
    """Throughput of all servers in interleaved rounds, by server name."""
    result = run_interleaved(
        urls, scenario=SCENARIO, rounds=plan.rounds, num_requests=plan.num_requests, engines=folders
    )
    return {name: list(server.rounds) for name, server in result.servers.items()}


def evaluate_capped(
    urls: Mapping[str, str], engines: Mapping[str, EngineFolders], plan: MeasurementPlan, *, problems: Path
) -> dict[str, EvaluationResult]:
    """Accuracy at every reasoning effort of the capped engines, one after the other."""
    return {
        name: evaluate(
            urls[name],
            problems=problems,
            tokenizer_folder=Engine.open(pair.capped).model_path,
            concurrency=EVALUATION_CONCURRENCY,
            max_tokens=EVALUATION_MAX_TOKENS,
            limit=plan.num_problems,
            engine=pair.capped,
            name=name,
        )
        for name, pair in engines.items()
    }


def assemble_measurements(
    engines: Mapping[str, EngineFolders],
    rounds: Mapping[str, list[BenchResult]],
    evaluations: Mapping[str, EvaluationResult],
) -> list[EngineMeasurement]:
    """What the report compares: one record an engine, its uncapped twin's throughput inside."""
    return [
        assemble_measurement(
            name,
            engine=pair.capped,
            rounds=rounds[name],
            uncapped_rounds=rounds[_uncapped(name)],
            evaluation=evaluations[name],
        )
        for name, pair in engines.items()
    ]


@contextmanager
def running_servers(folders: Mapping[str, Path], log_folder: Path) -> Iterator[dict[str, str]]:
    """gRPC URLs by name, on free loopback ports; all servers are stopped at the end, whatever happens."""
    log_folder.mkdir(parents=True, exist_ok=True)
    servers = {name: TritonServer(folder, log_file=log_folder / f"{name}.log") for name, folder in folders.items()}
    with ExitStack() as running, ThreadPoolExecutor(max_workers=len(servers)) as starters:
        running.callback(_stop_all, servers)
        for started in [starters.submit(server.start) for server in servers.values()]:
            started.result()
        yield {name: server.grpc_url for name, server in servers.items()}


def _stop_all(servers: Mapping[str, TritonServer]) -> None:
    with ThreadPoolExecutor(max_workers=len(servers)) as stoppers:
        list(stoppers.map(lambda server: server.stop(), servers.values()))


def _uncapped(name: str) -> str:
    return f"{name}_uncapped"
