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


def measure_engines(
    engines: Mapping[str, EngineFolders], plan: MeasurementPlan, *, problems: Path, log_folder: Path
) -> list[EngineMeasurement]:
    """Serve every engine, capped and uncapped, measure throughput in turn, then accuracy on the capped ones.

    Raises ServeError when a server does not start, BenchError when a measurement cannot be made.
    """
    folders = {name: pair.capped for name, pair in engines.items()}
    folders |= {_uncapped(name): pair.uncapped for name, pair in engines.items()}
    with _servers(folders, log_folder) as urls:
        rounds = run_interleaved(
            urls,
            scenario=SCENARIO,
            rounds=plan.rounds,
            num_requests=plan.num_requests,
            engines=folders,
        )
        results: dict[str, list[BenchResult]] = {name: list(server.rounds) for name, server in rounds.servers.items()}
        return [
            assemble_measurement(
                name,
                engine=pair.capped,
                rounds=results[name],
                uncapped_rounds=results[_uncapped(name)],
                evaluation=evaluate(
                    urls[name],
                    problems=problems,
                    tokenizer_folder=Engine.open(pair.capped).model_path,
                    concurrency=EVALUATION_CONCURRENCY,
                    max_tokens=EVALUATION_MAX_TOKENS,
                    limit=plan.num_problems,
                    engine=pair.capped,
                    name=name,
                ),
            )
            for name, pair in engines.items()
        ]


@contextmanager
def _servers(folders: Mapping[str, Path], log_folder: Path) -> Iterator[dict[str, str]]:
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
