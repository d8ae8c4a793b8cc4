"""`bench`: a load on a running server."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from puzzle_trtllm.commands.clients import (
    DEFAULT_URL,
    CaCertOption,
    ClientCertOption,
    ClientKeyOption,
    EngineOption,
    NameOption,
    OutOption,
    SecretOption,
    TokenizerOption,
    UrlOption,
    connector,
    show_result,
)
from puzzle_trtllm.commands.output import JsonOption
from puzzle_trtllm.errors import PuzzleError

if TYPE_CHECKING:
    from puzzle_trtllm.scenario import Arrival
    from puzzle_trtllm.serve.metrics.result_file import ResultFile
    from puzzle_trtllm.trace import Trace

NEEDS = {
    "--arrival": "--request-rate",
    "--speed": "--trace",
    "--max-seconds": "--trace",
}
EXCLUDES = (
    ("--sweep", "--trace"),
    ("--sweep", "--concurrency"),
    ("--speed", "--request-rate"),
    ("--speed", "--concurrency"),
)


def bench_command(
    url: UrlOption = DEFAULT_URL,
    scenario: Annotated[
        str | None,
        typer.Option("--scenario", help="A YAML file or a shipped name, such as long (default: the engine's own)."),
    ] = None,
    engine: EngineOption = None,
    tokenizer: TokenizerOption = None,
    concurrency: Annotated[int | None, typer.Option("--concurrency", min=1, help="Overrides the scenario's.")] = None,
    num_requests: Annotated[
        int | None,
        typer.Option("--num-requests", min=1, help="Overrides the scenario's; a trace's first so many."),
    ] = None,
    warmup_requests: Annotated[
        int | None, typer.Option("--warmup-requests", min=0, help="Overrides the scenario's.")
    ] = None,
    request_rate: Annotated[
        float | None, typer.Option("--request-rate", help="Open loop: arrivals per second instead of a concurrency.")
    ] = None,
    arrival: Annotated[str | None, typer.Option("--arrival", help="Open loop: poisson (default) or constant.")] = None,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", help="JSONL of requests to replay (docs/measurement.md), Mooncake's form included."),
    ] = None,
    speed: Annotated[float | None, typer.Option("--speed", help="Replay the trace so many times as fast.")] = None,
    max_seconds: Annotated[
        float | None, typer.Option("--max-seconds", help="Only the trace's first so many recorded seconds.")
    ] = None,
    trace_block_tokens: Annotated[
        int, typer.Option("--trace-block-tokens", min=1, help="Tokens behind one of the trace's hash_ids.")
    ] = 512,
    trace_time_unit: Annotated[str, typer.Option("--trace-time-unit", help="Of its timestamps: ms or s.")] = "ms",
    sweep: Annotated[
        str | None,
        typer.Option("--sweep", metavar="1,2,4,...", help="Concurrencies to measure in turn; goes on from --out."),
    ] = None,
    csv: Annotated[
        Path | None, typer.Option("--csv", help="Table to write: a row a request, or a point of the sweep.")
    ] = None,
    max_ttft_ms: Annotated[float | None, typer.Option("--max-ttft-ms", help="Goodput: limit on TTFT.")] = None,
    max_tpot_ms: Annotated[
        float | None,
        typer.Option("--max-tpot-ms", "--max-itl-ms", help="Goodput: limit on TPOT, the mean ITL of a request."),
    ] = None,
    workers: Annotated[
        str, typer.Option("--workers", help="Processes that send the load: a number, or auto by its size.")
    ] = "auto",
    seed: Annotated[int, typer.Option("--seed", help="Equal seeds give equal prompts and arrivals.")] = 0,
    name: NameOption = None,
    ca_cert: CaCertOption = None,
    client_cert: ClientCertOption = None,
    client_key: ClientKeyOption = None,
    secret: SecretOption = None,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a server under a scenario's load, or a recorded trace's.

    Output throughput over the steady window, and percentiles of TTFT, ITL and E2E.
    """
    from puzzle_trtllm.scenario import OpenScenario, Scenario, load_any_scenario
    from puzzle_trtllm.serve.bench.runner import run_bench, run_open_loop
    from puzzle_trtllm.serve.bench.sweep import run_sweep

    changes = {
        "warmup_requests": warmup_requests,
        "max_ttft_ms": _positive(max_ttft_ms, "--max-ttft-ms"),
        "max_tpot_ms": _positive(max_tpot_ms, "--max-tpot-ms"),
    }
    scenario = scenario or _scenario_of(engine)
    load = load_any_scenario(scenario)
    load = load.model_copy(update={key: value for key, value in changes.items() if value is not None})
    is_open = _check_loop(
        {
            "--concurrency": concurrency,
            "--sweep": sweep,
            "--request-rate": request_rate,
            "--arrival": arrival,
            "--trace": trace,
            "--speed": speed,
            "--max-seconds": max_seconds,
        },
        scenario_is_open=isinstance(load, OpenScenario),
    )
    own_scenario = Path(scenario) if scenario.endswith((".yaml", ".yml")) else None
    inputs = {"the trace": trace, "the scenario": own_scenario}
    _check_output(out, "--out", inputs)
    _check_output(csv, "--csv", {**inputs, "--out": out})
    options: dict[str, Any] = {
        "num_requests": num_requests,
        "seed": seed,
        "engine": engine,
        "tokenizer_folder": tokenizer,
        "name": name,
        "workers": _workers(workers),
        "connect": connector(ca_cert, client_cert, client_key, secret),
    }
    if trace is not None:
        options["trace"] = _trace(
            trace,
            time_unit=trace_time_unit,
            block_tokens=trace_block_tokens,
            max_requests=num_requests,
            max_seconds=_positive(max_seconds, "--max-seconds"),
        )
    result: ResultFile
    if is_open:
        options |= {"request_rate": _positive(request_rate, "--request-rate"), "arrival": _arrival(arrival)}
        result = run_open_loop(url, scenario=load, speed=_positive(speed, "--speed"), csv=csv, **options)
    elif sweep is not None:
        assert isinstance(load, Scenario)
        result = points = run_sweep(url, scenario=load, concurrencies=_concurrencies(sweep), out=out, **options)
        if csv is not None:
            points.save_csv(csv)
    else:
        assert isinstance(load, Scenario)
        result = run_bench(url, scenario=load, concurrency=concurrency, csv=csv, **options)
    if csv is not None:
        print(f"written to {csv}", file=sys.stderr)
    show_result(result, out, as_json=as_json)


def _scenario_of(engine: Path | None) -> str:
    """The load that the engine was built for; another would say little about it."""
    from puzzle_trtllm.engine import Engine

    own = None if engine is None else Engine.open(engine).scenario
    return own or "cpu-demo"


def _check_loop(options: Mapping[str, object], *, scenario_is_open: bool) -> bool:
    """Whether the loop is open. Raises PuzzleError for options that exclude or need one another."""
    given = {key for key, value in options.items() if value is not None}
    is_open = "--request-rate" in given or scenario_is_open or ("--trace" in given and "--concurrency" not in given)
    for key, needed in NEEDS.items():
        if key in given and needed not in given and not (key == "--arrival" and scenario_is_open):
            raise PuzzleError(f"needs {needed}", key=key)
    for key, excluded in EXCLUDES:
        if {key, excluded} <= given:
            raise PuzzleError(f"excludes {excluded}", key=key)
    for key in ("--concurrency", "--sweep"):
        if is_open and key in given:
            raise PuzzleError("excludes a request rate: a loop is either open or closed", key=key)
    return is_open


def _check_output(file: Path | None, option: str, others: Mapping[str, Path | None]) -> None:
    """Raises PuzzleError for a file that cannot be written, or is one of `others`."""
    from puzzle_trtllm.folders import check_writable

    if file is None:
        return
    check_writable(file)
    for what, other in others.items():
        if other is not None and file.resolve() == other.resolve():
            raise PuzzleError(f"would replace {what}", key=option, found=file)


def _workers(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise PuzzleError("must be a number of processes", key="--workers", found=text, expected="auto or 1 and more")


def _trace(file: Path, *, time_unit: str, **limits: Any) -> Trace:
    from puzzle_trtllm.trace import TimeUnit, read_trace

    units: dict[str, TimeUnit] = {"ms": "ms", "s": "s"}
    if time_unit not in units:
        raise PuzzleError("unknown", key="--trace-time-unit", found=time_unit, expected="ms or s")
    return read_trace(file, time_unit=units[time_unit], **limits)


def _concurrencies(text: str) -> list[int]:
    words = text.replace(",", " ").split()
    if not words or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise PuzzleError("must be concurrencies", key="--sweep", found=text, expected="such as 1,2,4,8")
    return [int(word) for word in words]


def _positive(value: float | None, key: str) -> float | None:
    if value is not None and not 0 < value < float("inf"):
        raise PuzzleError("must be positive", key=key, found=value)
    return value


def _arrival(value: str | None) -> Arrival | None:
    known: dict[str | None, Arrival | None] = {None: None, "poisson": "poisson", "constant": "constant"}
    if value in known:
        return known[value]
    raise PuzzleError("unknown", key="--arrival", found=value, expected="poisson or constant")
