"""Where a number was made: without it a result file is only a number.

Collected on the client's side: the machine, the versions, the commit, the command line, and, when the caller knows the
engine folder behind the URL, that engine's manifest and arguments. Nothing here may fail a measurement: what cannot be
found out is None.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

import puzzle_trtllm
from puzzle_trtllm.engine import Engine, EngineManifest

VERSIONED_PACKAGES = ("tritonclient", "grpcio", "nvidia-pytriton", "torch", "tensorrt-llm", "tokenizers", "numpy")


class Hardware(BaseModel):
    """The machine the client ran on; the server's too when the URL is a loopback address."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cpu_model: str | None
    cpu_cores: int
    """Logical cores this process may use."""
    memory_bytes: int | None
    gpus: list[str]
    """Names as nvidia-smi lists them."""
    gpu_driver: str | None = None
    """Version of NVIDIA's driver."""

    @classmethod
    def of_this_machine(cls) -> Hardware:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return cls(
            cpu_model=_cpu_model(),
            cpu_cores=cores,
            memory_bytes=_memory_bytes(),
            gpus=_ask_gpus("name"),
            gpu_driver=next(iter(_ask_gpus("driver_version")), None),
        )

    def __str__(self) -> str:
        memory = f", {self.memory_bytes / 2**30:.0f} GiB" if self.memory_bytes else ""
        gpus = f", {', '.join(self.gpus)}" if self.gpus else ""
        return f"{self.cpu_model or 'unknown CPU'}, {self.cpu_cores} cores{memory}{gpus}"


class EngineProvenance(BaseModel):
    """The engine behind the URL, as its folder describes it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    num_gpus: int
    """Of one engine; 0 if it runs on the CPU. A server may run several (LoadResult.num_instances)."""
    manifest: EngineManifest
    llm_args: dict[str, Any] | None = None
    """Batch and token limits, KV cache, kernels, streaming: what the runtime was started with. None in older files."""

    @classmethod
    def of(cls, engine: Engine) -> EngineProvenance:
        on_gpu = engine.manifest.runtime == "tensorrt_llm"
        num_gpus = int(engine.llm_args.get("tensor_parallel_size", 1)) if on_gpu else 0
        return cls(path=str(engine.path), num_gpus=num_gpus, manifest=engine.manifest, llm_args=engine.llm_args)

    def describes(self, engine: EngineProvenance) -> bool:
        """Whether what was measured here is `engine`, as far as older files tell."""
        return self.manifest == engine.manifest and self.llm_args in (None, engine.llm_args)


class Provenance(BaseModel):
    """How to find this measurement's origin again."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    created_at: str
    """ISO 8601, UTC."""
    command_line: str
    git_commit: str | None
    """Commit of the source tree the package runs from; None for an installed package."""
    versions: dict[str, str]
    hardware: Hardware
    engine: EngineProvenance | None = None

    @classmethod
    def collect(cls, *, engine: str | Path | None = None) -> Provenance:
        """`engine` is the engine folder behind the URL, when the caller knows it. Raises EngineError if it is none."""
        return cls(
            created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            command_line=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            git_commit=_git_commit(),
            versions=_versions(),
            hardware=Hardware.of_this_machine(),
            engine=EngineProvenance.of(Engine.open(engine)) if engine is not None else None,
        )


def differing_versions(runs: Iterable[Provenance]) -> list[str]:
    """`torch 2.9 and 2.10` for every package that several runs had in several versions, or not all of them had."""
    versions = [run.versions for run in runs]
    packages = dict.fromkeys(package for of_run in versions for package in of_run)
    found = {package: dict.fromkeys(of_run.get(package, "none") for of_run in versions) for package in packages}
    return [f"{package} {' and '.join(several)}" for package, several in found.items() if len(several) > 1]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "puzzle-trtllm": puzzle_trtllm.__version__}
    for package in VERSIONED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def _ask_gpus(field: str) -> list[str]:
    """What nvidia-smi says of each GPU."""
    return _output_of(["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]).splitlines()


def _git_commit() -> str | None:
    """The commit the package is checked out at, with `-dirty` when tracked files differ."""
    root = Path(puzzle_trtllm.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    return _output_of(["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]) or None


def _output_of(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
