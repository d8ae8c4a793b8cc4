"""`doctor`: can this machine serve a Puzzle child with TensorRT-LLM, and if not, what exactly is in the way?

It imports the installed TensorRT-LLM and checks every row of the plugin's table (models/trtllm/upstream.py), then GPU,
driver, NCCL, Triton and versions, and, given an engine, its arguments against the installed classes and its GPUs
against those that torch sees. Nothing is started and no GPU memory is taken beyond what importing costs.

A check has one of four outcomes: `ok`; `note`, worth knowing and no obstacle; `missing`, not there at all; `wrong`,
there and does not fit. The machine is ready when nothing is missing or wrong.
"""

from __future__ import annotations

import importlib
import importlib.util
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import puzzle_trtllm
from puzzle_trtllm.engine import Engine
from puzzle_trtllm.errors import PuzzleError
from puzzle_trtllm.models.trtllm.symbols import Finding, check
from puzzle_trtllm.models.trtllm.upstream import ALL_LINES, COMMAND_LINES, REQUIREMENTS, TRITON_EXPERTS, Line

Outcome = Literal["ok", "note", "missing", "wrong"]

OLDEST_SUPPORTED = (1, 2)
MIN_SHARED_MEMORY_BYTES = 2**30
GPUS_PER_NODE = 8
"""The most that one node has; an engine for more is served by several, unless it says otherwise (gpus_per_node)."""
_GPU_FIELDS = "name,memory.total,driver_version,compute_cap"
_PACKAGES = ("torch", "transformers", "numpy", "tritonclient")


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    group: str
    name: str
    outcome: Outcome
    found: str
    advice: str = ""
    """What to do about it, in plain words."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Everything that was looked at."""

    checks: tuple[Check, ...]

    @property
    def ready(self) -> bool:
        """True when a TensorRT-LLM engine can be expected to start here."""
        return all(item.outcome in ("ok", "note") for item in self.checks)

    def to_json(self) -> dict[str, Any]:
        return {"ready": self.ready, "checks": [asdict(item) for item in self.checks]}


def diagnose(engine: str | Path | None = None) -> Diagnosis:
    """Look at this machine and, with `engine`, at what it asks for. Raises EngineError when it is no engine folder."""
    opened = None if engine is None else Engine.open(engine)
    checks = [*_versions(), *_gpus(), *_tensorrt_llm(), *_triton(), *_shared_memory()]
    if opened is not None:
        checks += _engine(opened)
    return Diagnosis(checks=tuple(checks))


def release_line(version: str) -> Line | None:
    """The line of the table that a TensorRT-LLM version belongs to; None for one that is too old or unreadable."""
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None:
        return None
    release = int(match[1]), int(match[2])
    if release < OLDEST_SUPPORTED:
        return None
    return "1.2" if release == (1, 2) else "1.3" if release == (1, 3) else "late"


def _versions() -> Iterator[Check]:
    found = f"{puzzle_trtllm.__version__} in {Path(puzzle_trtllm.__file__).parent}"
    installed = _version("puzzle-trtllm")
    if installed is None:
        advice = "only on sys.path: workers and Triton's stub find it when it is installed (pip install puzzle-trtllm)"
        yield Check(group="versions", name="puzzle-trtllm", outcome="note", found=found, advice=advice)
    else:
        yield Check(group="versions", name="puzzle-trtllm", outcome="ok", found=found)
    yield Check(group="versions", name="python", outcome="ok", found=platform.python_version())
    for package in _PACKAGES:
        version = _version(package)
        outcome: Outcome = "note" if version is None else "ok"
        yield Check(group="versions", name=package, outcome=outcome, found=version or "not installed")


def _gpus() -> Iterator[Check]:
    if shutil.which("nvidia-smi") is None:
        advice = "TensorRT-LLM needs an NVIDIA GPU; in a container start it with --gpus all"
        yield Check(group="GPU", name="driver", outcome="missing", found="no nvidia-smi", advice=advice)
        return
    command = ["nvidia-smi", f"--query-gpu={_GPU_FIELDS}", "--format=csv,noheader"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        yield Check(group="GPU", name="driver", outcome="wrong", found=str(error), advice="the driver does not answer")
        return
    rows = [line.split(", ") for line in ran.stdout.splitlines() if line.count(", ") == 3]
    if ran.returncode or not rows:
        found = " ".join((ran.stderr or ran.stdout).split())[:200] or "no GPU listed"
        advice = "driver and GPU do not work together; `nvidia-smi` shows it"
        yield Check(group="GPU", name="driver", outcome="wrong", found=found, advice=advice)
        return
    yield Check(group="GPU", name="driver", outcome="ok", found=rows[0][2])
    for index, (name, memory, _, capability) in enumerate(rows):
        known = float(capability) >= 9.0 if re.fullmatch(r"\d+\.\d+", capability) else False
        yield Check(
            group="GPU",
            name=f"GPU {index}",
            outcome="ok" if known else "note",
            found=f"{name}, {memory}, compute capability {capability}",
            advice="" if known else "engine configs are made for Hopper (9.0) and Blackwell (10.0)",
        )


def _tensorrt_llm() -> Iterator[Check]:
    version = _tensorrt_llm_version()
    if importlib.util.find_spec("tensorrt_llm") is None:
        yield Check(
            group="TensorRT-LLM",
            name="package",
            outcome="missing",
            found="not installed",
            advice="run in NVIDIA's container nvcr.io/nvidia/tritonserver:<YY.MM>-trtllm-python-py3 (docs/deploy.md)",
        )
        yield _not_checked()
        return
    line = release_line(version or "")
    if line is None:
        advice = "this project knows 1.2 and newer"
        yield Check(group="TensorRT-LLM", name="package", outcome="wrong", found=version or "unknown", advice=advice)
    else:
        advice = f"build engines with `--target {line}`"
        yield Check(group="TensorRT-LLM", name="package", outcome="ok", found=f"{version} (line {line})", advice=advice)
    for row in (*REQUIREMENTS, *COMMAND_LINES):
        if line in row.lines or line is None:
            yield check_of_row(check(row), group="TensorRT-LLM")
    yield from _nccl()


def check_of_row(finding: Finding, *, group: str) -> Check:
    """One row of the plugin's table as a line of the report."""
    row = finding.requirement
    # What the plugin replaces may be missing; there and called in another way, it would fail at the first step.
    harmless = row.optional and (row.may_have is None or finding.module is None)
    broken: Outcome = "note" if harmless else "wrong"
    return Check(
        group=group,
        name=row.key,
        outcome="ok" if finding.holds else broken,
        found=f"{finding.module}.{row.path}".rstrip(".") if finding.holds else "; ".join(finding.problems),
        advice="" if finding.holds else f"needed for: {row.needed_for}. Read in {row.source}",
    )


def _nccl() -> Iterator[Check]:
    try:
        import torch

        version = ".".join(str(part) for part in torch.cuda.nccl.version())  # type: ignore[no-untyped-call]
        num_gpus = torch.cuda.device_count()
    except Exception as error:
        found = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        advice = "torch cannot reach NCCL: this torch is a CPU build, or its CUDA libraries are not found"
        yield Check(group="GPU", name="NCCL", outcome="wrong", found=found, advice=advice)
        return
    yield Check(
        group="GPU",
        name="NCCL",
        outcome="ok" if num_gpus else "wrong",
        found=f"{version}; torch sees {num_gpus} GPUs",
        advice="" if num_gpus else "CUDA_VISIBLE_DEVICES hides them, or this torch and the driver do not go together",
    )


def _not_checked() -> Check:
    found = f"{len(REQUIREMENTS)} facts about TensorRT-LLM that the plugin relies on were not checked"
    return Check(
        group="TensorRT-LLM",
        name="table",
        outcome="missing",
        found=found,
        advice="come here with TensorRT-LLM, or check a checkout: --source",
    )


def _triton() -> Iterator[Check]:
    from puzzle_trtllm.serve.triton.install import find_triton

    try:
        triton = find_triton()
    except PuzzleError as error:
        yield Check(group="Triton", name="tritonserver", outcome="missing", found=str(error))
        return
    advice = "" if triton.source != "wheel" else "for CPU machines; NVIDIA's container brings its own"
    outcome: Outcome = "ok" if triton.source != "wheel" else "note"
    found = f"{triton.server} ({triton.source})"
    yield Check(group="Triton", name="tritonserver", outcome=outcome, found=found, advice=advice)


def _shared_memory() -> Iterator[Check]:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return
    free = shutil.disk_usage(folder).free
    enough = free >= MIN_SHARED_MEMORY_BYTES
    yield Check(
        group="host",
        name="/dev/shm",
        outcome="ok" if enough else "note",
        found=f"{free / 2**30:.2f} GiB free",
        advice="" if enough else "NCCL and Triton's stubs need more with several GPUs: docker run --shm-size=16g",
    )


def _engine(engine: Engine) -> Iterator[Check]:
    """Whether the installed argument classes take the engine's arguments, and the GPUs suffice."""
    name = engine.path.name
    if engine.manifest.runtime != "tensorrt_llm":
        yield Check(group="engine", name=name, outcome="note", found="made for the reference runtime")
        return
    if importlib.util.find_spec("tensorrt_llm") is None:
        advice = "its arguments were checked against the recorded classes when it was built"
        yield Check(
            group="engine", name=name, outcome="missing", found="no TensorRT-LLM to check it with", advice=advice
        )
        return
    try:
        from tensorrt_llm.llmapi.llm_args import TorchLlmArgs

        TorchLlmArgs(model=str(engine.model_path), **engine.llm_args)
    except Exception as error:
        found = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        advice = "build it again with the `--target` of the installed line"
        yield Check(group="engine", name=name, outcome="wrong", found=found, advice=advice)
        return
    yield Check(group="engine", name=name, outcome="ok", found="TorchLlmArgs takes its llm_args.yaml")
    yield from _line_of_engine(engine)
    yield from _experts_of_engine(engine)
    yield from _gpus_of_engine(engine)


def _line_of_engine(engine: Engine) -> Iterator[Check]:
    """Whether it was built for the installed line, which may compute wrongly what newer ones do not."""
    line, target = release_line(_tensorrt_llm_version() or ""), engine.config.get("target")
    if line is None or target not in ALL_LINES or target == line:
        return
    newer = ALL_LINES.index(target) > ALL_LINES.index(line)
    yield Check(
        group="engine",
        name="target",
        outcome="wrong" if newer else "note",
        found=f"built for line {target}, and {line} is installed",
        advice=f"build it again with `--target {line}`",
    )


def _experts_of_engine(engine: Engine) -> Iterator[Check]:
    """Whether the kernels of its experts are there, which TensorRT-LLM asks only while it loads the model."""
    if (engine.llm_args.get("moe_config") or {}).get("backend") != "TRITON":
        return
    row = TRITON_EXPERTS
    finding = check(row)
    problems = finding.problems
    module = None if finding.module is None else importlib.import_module(finding.module)  # one of two places
    if finding.holds and not getattr(module, "IS_TRITON_KERNELS_AVAILABLE", True):
        problems = ("the package triton_kernels cannot be imported",)
    yield Check(
        group="engine",
        name="experts",
        outcome="wrong" if problems else "ok",
        found="; ".join(problems) or "TRITON kernels",
        advice=f"another image, which brings them, or else: {row.needed_for}" if problems else "",
    )


def _gpus_of_engine(engine: Engine) -> Iterator[Check]:
    """Whether this node has the GPUs that it must bring: all of them, or a node's share of an engine of several."""
    try:
        import torch

        found = torch.cuda.device_count()
    except Exception:
        return  # already said beside NCCL
    needed = int(engine.llm_args.get("tensor_parallel_size") or 1)
    share = min(needed, int(engine.llm_args.get("gpus_per_node") or GPUS_PER_NODE))
    advice = f"build it with `num_gpus: {found}`; where nodes have fewer each, say so in `llm_args: gpus_per_node`"
    yield Check(
        group="engine",
        name="GPUs",
        outcome="ok" if share <= found else "wrong",
        found=f"{found} here, {share} needed" + (f" of {needed} in all" if share < needed else ""),
        advice="" if share <= found else advice,
    )


def _tensorrt_llm_version() -> str | None:
    return _version("tensorrt-llm") or _version("tensorrt_llm")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
