"""The pages say of every metric what the code computes, and of every field what results hold."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from puzzle_trtllm.serve.bench.sweep import KNEE_FRACTION, MIN_REQUESTS
from puzzle_trtllm.serve.metrics.catalogue import METRICS, Metric, ScalarMetric
from puzzle_trtllm.serve.metrics.queue import GROWTH_SIGMAS, OfferedLoad
from puzzle_trtllm.serve.triton import metrics as triton_metrics

PAGE = (Path(__file__).parents[2] / "docs" / "measurement.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return PAGE.split(f"## {title}\n")[1].split("\n## ")[0]


def row(metric: Metric) -> str:
    kind = "number" if isinstance(metric, ScalarMetric) else "distribution"
    return f"| `{metric.tag}` | {metric.unit} | {kind} | {metric.formula} | {metric.prerequisite} |"


def test_the_table_of_metrics_is_the_catalogue():
    rows = [line for line in section("Metrics").splitlines() if line.startswith("| `")]
    assert rows == [row(metric) for metric in METRICS.values()]


def test_every_field_of_an_open_loops_queue_is_defined():
    rows = section("Open loop: offered, achieved, and the queue").splitlines()
    defined = [line.split("`")[1] for line in rows if line.startswith("| `")]
    assert defined == [field.name for field in fields(OfferedLoad)]


def test_the_constants_are_those_of_the_code():
    assert f"by more than {GROWTH_SIGMAS:.0f} x sqrt(smaller of the first and the window's arrivals)" in PAGE
    assert f"at least {KNEE_FRACTION:.0%} of the sweep's best" in " ".join(PAGE.split())
    assert f"at least {MIN_REQUESTS} requests" in PAGE


def test_the_servers_metrics_are_listed_for_who_runs_it():
    page = (Path(__file__).parents[2] / "docs" / "deploy.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `puzzle_")]
    described = triton_metrics._GAUGES | triton_metrics._COUNTERS
    assert rows[:-1] == [f"| `{name}` | {text} |" for name, text in described.items()]
    assert rows[-1].startswith("| `puzzle_requests_total` |")
