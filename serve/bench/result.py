"""What a load run leaves behind: numbers with units, and everything needed to judge and repeat them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict
from rich.table import Table

from puzzle_trtllm.errors import BenchError
from puzzle_trtllm.scenario import Load, OpenScenario, ReplayScenario, Scenario
from puzzle_trtllm.serve.metrics.catalogue import METRICS
from puzzle_trtllm.serve.metrics.provenance import Provenance
from puzzle_trtllm.serve.metrics.queue import OfferedLoad
from puzzle_trtllm.serve.metrics.records import RequestCounts
from puzzle_trtllm.serve.metrics.result_file import ResultFile
from puzzle_trtllm.serve.metrics.statistics import Distribution, Spread
from puzzle_trtllm.serve.metrics.units import show_number

Lengths = Literal["exact", "nominal"]
TokenCounts = Literal["server", "tokenizer"]

BUSY_CLIENT = 0.8
"""A client process that uses more of a core than this may be what limits the load."""


class ClientFacts(BaseModel):
    """The load generator itself: whether it may have been the limit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    workers: int
    """Processes that sent the load."""
    busiest_cpu: float
    """CPU seconds a second of the process that used most, over its share of the load."""

    def __str__(self) -> str:
        processes = "1 process" if self.workers == 1 else f"{self.workers} processes"
        line = f"client: {processes}, {self.busiest_cpu:.0%} of a core"
        advice = "; ITS OWN SPEED MAY BE IN THESE NUMBERS: raise --workers"
        return line + (advice if self.busiest_cpu > BUSY_CLIENT else "")


class LoadResult(ResultFile):
    """One load against one server: what closed and open loops have in common."""

    name: str
    """What the server is called in comparisons."""
    url: str
    seed: int
    lengths: Lengths
    """nominal: a stock server takes text only and stops where the model does; the scenario's lengths are wishes."""
    token_counts: TokenCounts
    """tokenizer: a stock server tells no counts, so its text is encoded again (token_counts.py)."""
    client: ClientFacts | None = None
    num_instances: int | None = None
    """Engines in the server, by its own account; None in older files, whose numbers a GPU are those of one engine."""
    requests: RequestCounts
    errors: dict[str, int]
    """Reason of every request that failed or was cancelled -> how many gave it."""
    steady_window_s: float
    steady_window_tokens: int
    wall_s: float
    """First request sent to last response, edges included."""
    scalars: dict[str, float]
    distributions: dict[str, Distribution]
    absent: dict[str, str]
    """Metrics that do not exist for this run, and why."""
    units: dict[str, str]
    formulas: dict[str, str]
    provenance: Provenance

    def scalar(self, tag: str) -> float:
        """Raises BenchError with the reason when the run has no such number."""
        if tag not in self.scalars:
            raise BenchError(f"missing metric: {self.absent.get(tag, 'not in this result')}", file=self.name, key=tag)
        return self.scalars[tag]

    @property
    def output_tokens_per_s(self) -> float:
        return self.scalar("output_tokens_per_s")


class Turn(BaseModel):
    """One round of one interleaved comparison: results of equal turns were measured right after one another."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    comparison: str
    """Different for every comparison."""
    round: int


class BenchResult(LoadResult):
    """One closed-loop scenario against one server."""

    kind: Literal["bench"] = "bench"
    turn: Turn | None = None
    """None for a server that was measured by itself, and in older files."""
    scenario: Scenario
    """The load as it was run, overrides included."""

    def __rich__(self) -> Table:
        return load_table(self, self.scenario, f"{self.scenario.concurrency} in flight")


class OpenLoopResult(LoadResult):
    """One open loop or replay against one server. `report` refuses it: below capacity its throughput is the load's."""

    kind: Literal["open_loop_bench"] = "open_loop_bench"
    scenario: OpenScenario | ReplayScenario
    """The load as it was run, overrides included."""
    queue: OfferedLoad

    def __rich__(self) -> Table:
        queue = self.queue
        first, _, last = queue.mean_in_flight_by_third
        verdict = "THE QUEUE GREW WITHOUT BOUND: latencies say how long the run was" if queue.queue_grew else "steady"
        scenario = self.scenario
        arrivals = (
            f"{scenario.arrival} arrivals"
            if isinstance(scenario, OpenScenario)
            else f"arrivals of the trace at {scenario.speed:g} times its speed"
        )
        load = (
            f"{arrivals}, {show_number(queue.offered_requests_per_s)} requests/s offered, "
            f"{show_number(queue.achieved_requests_per_s)} achieved; in flight {first:.1f} to {last:.1f}, {verdict};"
        )
        return load_table(self, self.scenario, load)


class ServerRounds(BaseModel):
    """The rounds of one server in an interleaved comparison."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    output_tokens_per_s: Spread
    rounds: list[BenchResult]

    @classmethod
    def of(cls, rounds: list[BenchResult]) -> ServerRounds:
        return cls(output_tokens_per_s=Spread.of(r.output_tokens_per_s for r in rounds), rounds=rounds)


class InterleavedResult(ResultFile):
    """Several servers under one scenario, measured in turn."""

    kind: Literal["interleaved_bench"] = "interleaved_bench"
    scenario: Scenario
    servers: dict[str, ServerRounds]
    order: list[list[str]]
    """Which server was measured when, round by round."""

    def __rich__(self) -> Table:
        return interleaved_table(self.servers)


def metric_facts(field: Literal["unit", "formula"]) -> dict[str, str]:
    """Tag -> unit, or tag -> formula, of the whole catalogue."""
    return {tag: str(getattr(metric, field)) for tag, metric in METRICS.items()}


def show_lengths(load: Load) -> str:
    """`1,024 in, 256 out`, and `about` where they are means."""
    varies = load.trace is not None
    parts = ((load.input_tokens, load.input_spread, "in"), (load.output_tokens, load.output_spread, "out"))
    return ", ".join(f"{'about ' if varies or spread else ''}{mean:,} {way}" for mean, spread, way in parts)


def load_table(result: LoadResult, scenario: Load, load: str) -> Table:
    """One row a metric, one column a statistic; how the requests ended stands below."""
    title = f"{result.name}: {scenario.name}, {show_lengths(scenario)}"
    caption = f"{load} for {result.steady_window_s:.1f} s; requests: {result.requests}"
    if result.token_counts != "server":
        caption += "\ntokens counted by the tokenizer: this server tells no counts, and lengths are not enforced"
    if result.client is not None:
        caption += f"\n{result.client}"
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for column in ("metric", "unit"):
        table.add_column(column, overflow="fold")  # in a narrow terminal names give way, never a digit
    for column in ("mean", "p50", "p90", "p95", "p99"):
        table.add_column(column, justify="right", no_wrap=True)
    for tag, value in result.scalars.items():
        table.add_row(tag, result.units[tag], show_number(value))
    for tag, d in result.distributions.items():
        numbers = (show_number(number) for number in (d.mean, d.p50, d.p90, d.p95, d.p99))
        table.add_row(tag, result.units[tag], *numbers)
    return table


def interleaved_table(servers: Mapping[str, ServerRounds]) -> Table:
    """One row a server: median and rounds of its output throughput, and its last round's latencies."""
    table = Table(title="Output tokens per second, rounds in turn", title_justify="left")
    for column in ("server", "median", "rounds", "TTFT p50", "ITL p50", "requests"):
        table.add_column(column, justify="left" if column in ("server", "requests") else "right")
    for name, server in servers.items():
        spread, last = server.output_tokens_per_s, server.rounds[-1]
        latencies = [
            f"{show_number(last.distributions[tag].p50)} ms" if tag in last.distributions else "-"
            for tag in ("ttft_ms", "itl_ms")
        ]
        rounds = " ".join(f"{value:,.0f}" for value in spread.rounds)
        table.add_row(name, f"{spread.median:,.0f}", rounds, *latencies, str(last.requests))
    return table
