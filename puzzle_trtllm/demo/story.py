"""The main job, told as one story: a trained parent becomes a Puzzle child, and the child is measured against it.

    abacus ── calibrate experts ── derive ──▶ child ── calibrate kv ──▶ child + scales ── build ──▶ engine ┐
       └────────────────────────────────────── calibrate kv ──▶ parent + scales ── build ──▶ two engines ─┤
                                                                  report ◀── evaluate ◀── bench ◀── serve ─┘

Every step is the function behind the CLI command of the same name; nothing here does work of its own. What the demo
shows is the paper's one-GPU gain in small: active parameters are equal, so a child is not faster as such, but within
one memory budget for weights and KV cache it holds more sequences, and throughput grows with them. Each model is
therefore also measured without the cap.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from puzzle_trtllm.demo.serving import (
    EngineFolders,
    MeasurementPlan,
    assemble_measurements,
    bench_in_turn,
    evaluate_capped,
    running_servers,
    server_folders,
)
from puzzle_trtllm.engine import EngineConfig, load_engine_config
from puzzle_trtllm.folders import locked_folder
from puzzle_trtllm.serve.report.measurement import EngineMeasurement

ABACUS = Path(__file__).parent / "abacus"
"""The shipped parent checkpoint, with its problems, calibration records and child architecture."""

ENGINE_CONFIG = "cpu-demo"
FULL_PLAN = MeasurementPlan(rounds=3, num_requests=None, num_problems=128)
QUICK_PLAN = MeasurementPlan(rounds=1, num_requests=32, num_problems=12)
"""Every step for real, too few samples to mean much: for tests."""
FULL_RECORDS, QUICK_RECORDS = 512, 48
"""Calibration records at most, in the full and in the quick demo; the file has 256."""


def run_demo(out: str | Path = "runs/demo", *, quick: bool = False) -> dict[str, Any]:
    """Run the whole chain into `out`; prints the comparison and the path of the page.

    Returns the content of `out/report.json`. Raises PuzzleError when a step fails, or another demo is writing `out`; no
    performance figure fails it.
    """
    folder = Path(out)
    with locked_folder(folder):
        document = _tell(folder, QUICK_PLAN if quick else FULL_PLAN, quick=quick)
    print(f"report: {folder / 'report.html'}")
    return document


def _tell(folder: Path, plan: MeasurementPlan, *, quick: bool) -> dict[str, Any]:
    story = _Story()
    child, parent = _make_checkpoints(folder, story, max_samples=QUICK_RECORDS if quick else FULL_RECORDS)
    engines = _build_engines(folder, story, child=child, parent=parent)
    measurements = _measure(engines, plan, story, log_folder=folder / "logs")
    with story.chapter("report", "the child against its parent at BF16 and at FP8 KV cache"):
        from puzzle_trtllm.serve.report import make_report

        for measurement in measurements:
            measurement.save(folder / "measurements" / f"{measurement.name}.json")
        return make_report(
            measurements,
            baselines=["parent_bf16", "parent_fp8"],
            child="child",
            out=folder,
            title="abacus: a Puzzle child against its parent",
            extra={"rounds": plan.rounds, "quick": quick, "wall_s_of_each_step": story.seconds},
        )


def _make_checkpoints(folder: Path, story: _Story, *, max_samples: int) -> tuple[Path, Path]:
    """(calibrated child, calibrated parent)."""
    dataset = ABACUS / "calibration.jsonl"
    architecture = ABACUS / "child_architecture.json"
    importance = folder / "importance.safetensors"
    child, child_kv, parent_kv = (folder / "checkpoints" / name for name in ("child", "child-kv", "parent-kv"))
    with story.chapter("calibrate experts", "which experts of the parent its router really asks for"):
        from puzzle_trtllm.calibration.experts import calibrate_experts

        calibrate_experts(ABACUS, importance, dataset=dataset, max_samples=max_samples, overwrite=True)
    with story.chapter("derive", "keep those, byte for byte; narrow the windows"):
        from puzzle_trtllm.build.derive import derive

        derive(ABACUS, child, architecture=architecture, importance=importance, overwrite=True)
    with story.chapter("calibrate kv", "ModelOpt's FP8 KV cache ranges, for the child and for the parent"):
        from puzzle_trtllm.calibration.kv import calibrate_kv

        calibrate_kv(child, child_kv, dataset=dataset, max_samples=max_samples, overwrite=True)
        calibrate_kv(ABACUS, parent_kv, dataset=dataset, max_samples=max_samples, overwrite=True)
    return child_kv, parent_kv


def _build_engines(folder: Path, story: _Story, *, child: Path, parent: Path) -> dict[str, EngineFolders]:
    """By name: the engine with the memory cap, and the same one without."""
    from puzzle_trtllm.build.engine_build import build_engine

    config = load_engine_config(ENGINE_CONFIG)
    recipes = {
        "parent_bf16": (parent, config.model_copy(update={"kv_dtype": "bf16"})),
        "parent_fp8": (parent, config),
        "child": (child, config),
    }
    engines: dict[str, EngineFolders] = {}
    with story.chapter("build", "engine folders, scales folded into the weights, with and without the memory cap"):
        for name, (checkpoint, recipe) in recipes.items():
            capped, uncapped = folder / "engines" / name, folder / "engines" / f"{name}-uncapped"
            build_engine(checkpoint, capped, config=recipe, overwrite=True)
            build_engine(checkpoint, uncapped, config=_without_cap(recipe), overwrite=True)
            engines[name] = EngineFolders(capped=capped, uncapped=uncapped)
    return engines


def _measure(
    engines: dict[str, EngineFolders], plan: MeasurementPlan, story: _Story, *, log_folder: Path
) -> list[EngineMeasurement]:
    folders = server_folders(engines)
    with ExitStack() as running:
        with story.chapter("serve", f"{len(folders)} Triton servers, up together on free loopback ports"):
            urls = running.enter_context(running_servers(folders, log_folder))
            story.note(f"the engines compute in {_compute_dtype()}")
        with story.chapter("bench", "more requests at once than the parent has room for, each server in turn"):
            rounds = bench_in_turn(urls, folders, plan)
        with story.chapter("evaluate", "held-out problems at three reasoning efforts"):
            evaluations = evaluate_capped(urls, engines, plan, problems=ABACUS / "problems.jsonl")
        with story.chapter("stop", "the servers"):
            running.close()
    return assemble_measurements(engines, rounds, evaluations)


def _compute_dtype() -> str:
    import torch

    from puzzle_trtllm.models.reference.kernels.choice import explain_compute_dtype

    return explain_compute_dtype("auto", torch.device("cpu"))


def _without_cap(config: EngineConfig) -> EngineConfig:
    return config.model_copy(update={"memory_bytes": None})


class _Story:
    """Says on stderr which step runs and how long it took."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.seconds: dict[str, float] = {}
        self._started = time.monotonic()

    def note(self, text: str) -> None:
        self.console.print(f"  {text}", highlight=False)

    @contextmanager
    def chapter(self, command: str, purpose: str) -> Iterator[None]:
        self.console.print(f"[bold]{command}[/bold]: {purpose}", highlight=False)
        started = time.monotonic()
        yield
        now = time.monotonic()
        self.seconds[command] = round(now - started, 1)
        self.console.print(
            f"  [dim]{now - started:.1f} s, {now - self._started:.0f} s since the start[/dim]", highlight=False
        )
