"""A sweep: one scenario at several concurrencies, where its throughput stops growing, and a file to go on from.

More requests in flight buy throughput with latency, until the server is full; from there on they buy nothing but
waiting. The knee is where to operate. It is defined here without a fitted curve, so that anyone can check it by hand:

    knee = the smallest measured concurrency whose output throughput is at least 90% of the sweep's best

When the largest concurrency measured is that knee itself, the throughput was still rising there: no knee was seen, and
none is named.

Every point sends as many waves of requests as the scenario does (`num_requests / concurrency`, at least 8 requests), so
that the points' edges weigh alike, with a seed of its own (`point_seed`), so that no point finds its prompts in a
prefix cache. A point is saved as soon as it is measured; the same sweep started again measures only what is missing,
and a point that was broken off with prompts that it has not sent before.
"""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Callable, Collection, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from rich.table import Table

from puzzle_trtllm.engine import Engine
from puzzle_trtllm.errors import BenchError
from puzzle_trtllm.folders import write_atomically
from puzzle_trtllm.scenario import Scenario
from puzzle_trtllm.serve.bench.result import BenchResult, show_lengths
from puzzle_trtllm.serve.bench.runner import override_scenario, run_bench
from puzzle_trtllm.serve.metrics.provenance import EngineProvenance
from puzzle_trtllm.serve.metrics.result_file import ResultFile
from puzzle_trtllm.serve.metrics.units import NONE, show_number

KNEE_FRACTION = 0.9
MIN_REQUESTS = 8
CSV_STATISTICS = ("mean", "p50", "p90", "p95", "p99")

Bench = Callable[..., BenchResult]


class SweepResult(ResultFile):
    """One scenario at several concurrencies, ascending."""

    kind: Literal["sweep"] = "sweep"
    scenario: Scenario
    """As given; each point's own says its concurrency and number of requests."""
    seed: int
    engine: str | None
    """The engine folder behind the server, an absolute path: points of another engine are another sweep."""
    knee: int | None
    """The knee's concurrency; None when throughput was still rising at the largest one."""
    points: list[BenchResult]
    begun_seeds: list[int] = Field(default_factory=list)
    """Of all points that were begun, finished or not: a server's prefix cache may know their prompts."""

    @classmethod
    def of(
        cls,
        scenario: Scenario,
        seed: int,
        engine: str | None,
        points: Sequence[BenchResult],
        begun_seeds: Sequence[int] = (),
    ) -> SweepResult:
        ordered = sorted(points, key=lambda point: point.scenario.concurrency)
        curve = {point.scenario.concurrency: point.output_tokens_per_s for point in ordered}
        return cls(
            scenario=scenario,
            seed=seed,
            engine=engine,
            knee=find_knee(curve),
            points=ordered,
            begun_seeds=list(begun_seeds),
        )

    def save_csv(self, path: str | Path) -> Path:
        """One row a point; a metric that a point does not have is an empty cell."""
        write_atomically(Path(path), csv_of(self.points))
        return Path(path)

    def __rich__(self) -> Table:
        return sweep_table(self)


def find_knee(tokens_per_s: dict[int, float]) -> int | None:
    """Concurrency -> throughput; the knee as defined above. None for fewer than two points."""
    if len(tokens_per_s) < 2:
        return None
    enough = KNEE_FRACTION * max(tokens_per_s.values())
    knee = min(concurrency for concurrency, speed in tokens_per_s.items() if speed >= enough)
    return knee if knee < max(tokens_per_s) else None


def run_sweep(
    url: str,
    *,
    scenario: Scenario | str | Path = "cpu-demo",
    concurrencies: Sequence[int],
    num_requests: int | None = None,
    seed: int = 0,
    engine: str | Path | None = None,
    out: str | Path | None = None,
    bench: Bench = run_bench,
    **options: Any,
) -> SweepResult:
    """Measure `scenario` at each of `concurrencies`, ascending; `options` go to `run_bench`.

    num_requests: the same for every point; default: as many waves as the scenario has.
    out: the sweep's file, written before and after every point; points that it holds already are not measured again.

    Raises BenchError for no concurrencies, or an `out` that holds another sweep; whatever a point raises ends the sweep
    with the points before it saved.
    """
    base = override_scenario(scenario)
    if not concurrencies or min(concurrencies) < 1:
        raise BenchError("nothing to sweep over", key="concurrencies", found=list(concurrencies), expected="1 or more")
    engine_name = _place(engine)
    wanted = [point_scenario(base, concurrency, num_requests) for concurrency in sorted(set(concurrencies))]
    sweep = SweepResult.of(base, seed, engine_name, *_earlier_points(out, url, base, seed, engine_name))
    for load in wanted:
        if load in [point.scenario for point in sweep.points]:
            continue
        own_seed = point_seed(seed, load, sweep.begun_seeds)
        begun = [*sweep.begun_seeds, own_seed]
        if out is not None:
            SweepResult.of(base, seed, engine_name, sweep.points, begun).save(out)
        points = [point for point in sweep.points if point.scenario.concurrency != load.concurrency]
        points.append(bench(url, scenario=load, seed=own_seed, engine=engine, **options))
        sweep = SweepResult.of(base, seed, engine_name, points, begun)
        if out is not None:
            sweep.save(out)
    return sweep


def point_scenario(base: Scenario, concurrency: int, num_requests: int | None) -> Scenario:
    """The scenario of one point: the same waves, unless the number of requests is given."""
    waves = base.num_requests / base.concurrency
    count = num_requests or max(MIN_REQUESTS, round(waves * concurrency))
    return override_scenario(base, concurrency, count)


def point_seed(seed: int, load: Scenario, begun_seeds: Collection[int] = ()) -> int:
    """The seed of one point: no other point of this sweep has it, nor one of a sweep with another seed.

    begun_seeds: those whose prompts were sent before; a point that is begun again gets its next seed.
    """

    def draw(attempt: int) -> int:
        name = f"{seed} {load.concurrency} {load.num_requests}"
        return random.Random(f"{name} {attempt}" if attempt else name).getrandbits(32)

    return next(drawn for drawn in map(draw, count()) if drawn not in begun_seeds)


def _earlier_points(
    out: str | Path | None, url: str, base: Scenario, seed: int, engine: str | None
) -> tuple[list[BenchResult], list[int]]:
    """Points, and seeds of points, that the sweep's file holds. Raises BenchError for the points of another sweep."""
    if out is None or not Path(out).exists():
        return [], []
    earlier = SweepResult.load(out)
    begun = list(dict.fromkeys([*earlier.begun_seeds, *(point.seed for point in earlier.points)]))
    if not earlier.points:
        return [], begun
    for key, found, expected in (
        *((f"scenario.{key}", getattr(earlier.scenario, key), getattr(base, key)) for key in Scenario.model_fields),
        ("seed", earlier.seed, seed),
        ("engine", _place(earlier.engine), engine),
        *(("url", point.url, url) for point in earlier.points),
    ):
        if found != expected:
            message = "holds another sweep; remove it or write elsewhere"
            raise BenchError(message, file=out, key=key, found=str(found), expected=str(expected))
    if engine is not None:
        _check_engine_of(earlier.points, EngineProvenance.of(Engine.open(engine)), out)
    return earlier.points, begun


def _place(engine: str | Path | None) -> str | None:
    """One folder has one name, however it is written."""
    return None if engine is None else str(Path(engine).resolve())


def _check_engine_of(points: Sequence[BenchResult], now: EngineProvenance, out: str | Path) -> None:
    for point in points:
        then = point.provenance.engine
        if then is not None and not then.describes(now):
            message = "holds points of another engine than the folder now does; remove it or write elsewhere"
            raise BenchError(message, file=out, key="engine", found=f"{then.path}, built otherwise", expected=now.path)


def sweep_table(sweep: SweepResult) -> Table:
    """One row a concurrency; the knee is marked."""
    scenario = sweep.scenario
    knee = str(sweep.knee) if sweep.knee else "none: throughput was still rising at the largest"
    table = Table(
        title=f"{scenario.name}, {show_lengths(scenario)}",
        caption=f"knee (smallest concurrency with {KNEE_FRACTION:.0%} of the best throughput): {knee}",
        title_justify="left",
        caption_justify="left",
    )
    columns = ("in flight", "tok/s", "requests/s", "TTFT p50 ms", "ITL p50 ms", "ITL p99 ms", "E2E p50 ms", "requests")
    for column in columns:
        table.add_column(column, justify="left" if column == "requests" else "right", no_wrap=True)
    for point in sweep.points:
        concurrency = point.scenario.concurrency
        mark = " *" if concurrency == sweep.knee else ""
        cells = [_cell(point, tag) for tag in ("output_tokens_per_s", "requests_per_s")]
        latencies = (("ttft_ms", "p50"), ("itl_ms", "p50"), ("itl_ms", "p99"), ("e2e_ms", "p50"))
        cells += [_cell(point, tag, statistic) for tag, statistic in latencies]
        table.add_row(f"{concurrency}{mark}", *cells, str(point.requests))
    return table


def _cell(point: BenchResult, tag: str, statistic: str | None = None) -> str:
    if statistic is None:
        return show_number(point.scalars[tag]) if tag in point.scalars else NONE
    return show_number(getattr(point.distributions[tag], statistic)) if tag in point.distributions else NONE


def csv_of(points: Sequence[BenchResult]) -> str:
    """A header and one row a point: its load, how its requests ended, every scalar, five statistics a distribution."""
    rows = [_csv_row(point) for point in points]
    columns = dict.fromkeys(column for row in rows for column in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _csv_row(point: BenchResult) -> dict[str, object]:
    load, requests = point.scenario, point.requests
    row: dict[str, object] = {"name": point.name, "scenario": load.name}
    row |= {key: getattr(load, key) for key in ("input_tokens", "output_tokens", "concurrency", "num_requests")}
    row |= {key: getattr(requests, key) for key in ("completed", "truncated", "failed", "cancelled")}
    row |= {"steady_window_s": point.steady_window_s, **point.scalars}
    for tag, distribution in point.distributions.items():
        row |= {f"{tag}_{statistic}": getattr(distribution, statistic) for statistic in CSV_STATISTICS}
    return row
