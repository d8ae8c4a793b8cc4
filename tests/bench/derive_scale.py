"""Derive and verify at the size of gpt-oss-120b: peak memory, speed against `cp`, time to verify.

    .venv/bin/python tests/bench/derive_scale.py --scratch /tmp/derive-scale            # 8 layers, about 40 GB of disk
    .venv/bin/python tests/bench/derive_scale.py --scratch /tmp/derive-scale --layers 1 --hidden 256 --rounds 1
    .venv/bin/python tests/bench/derive_scale.py --scratch /tmp/derive-scale --layers 1 --experts bf16 --rounds 1

It writes a synthetic MXFP4 parent with the true geometry of the 120B model (only the number of layers is smaller) and
random bytes, then runs the real commands as processes of their own. `cp --reflink=never` copies the derived child, so
that both write the same number of bytes to the same disk. Both start with their source evicted from the page cache and
their target absent, in turns, in one run; a round is timed until the process ends, and again until its output is on
disk (fsync of every file), because a page cache can take gigabytes before the disk sees one.

Peak memory is ru_maxrss: pages of the process itself, and of files it has memory-mapped. The page cache that reads and
writes fill is not part of it; the kernel gives that back when anyone needs it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from puzzle_trtllm.architecture import BlockConfig, PuzzleArchitecture
from puzzle_trtllm.checkpoint import INDEX_NAME
from puzzle_trtllm.safetensors_file import encode_header
from puzzle_trtllm.tensors import TensorSpec, is_expert_tensor, tensor_table

CONFIG_120B = Path(__file__).parents[1] / "data" / "gpt-oss-120b.config.json"
CHILD_COUNTS = (128, 128, 100, 96, 64, 77, 64, 64)
"""Experts that the child keeps, in turn; about the released child's share, and not only powers of two."""

CHILD_WINDOWS = (128, None, 128, 8192)
SHARD_BYTES = 4_800_000_000
POOL_BYTES = 64 * 2**20

LAUNCHER = """
import json, os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stderr=subprocess.STDOUT)
_, status, usage = os.wait4(process.pid, 0)
print(json.dumps({"exit_code": os.waitstatus_to_exitcode(status), "max_rss_kib": usage.ru_maxrss}))
"""
"""A small process between us and the command: a new process starts with the peak memory of the one that forked it, and
ours holds numpy and the pool of random bytes."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One process, measured."""

    seconds: float
    """Until it ended."""
    seconds_synced: float
    """Until what it wrote was on disk."""
    peak_rss_bytes: int


def main() -> None:
    options = parse_arguments()
    scratch = Path(options.scratch)
    if scratch.exists():
        sys.exit(f"{scratch}: exists; name a folder that this script may create and delete")
    check_disk(scratch.parent, options)
    scratch.mkdir(parents=True)
    try:
        report = measure(scratch, options)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print_report(report)
    print(json.dumps(report))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", required=True, help="folder to create, fill and delete")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parent-experts", choices=("mxfp4", "bf16"), default="mxfp4", help="format of the parent's")
    parser.add_argument("--experts", choices=("mxfp4", "bf16", "keep"), default="keep", help="as derive's --experts")
    parser.add_argument("--hidden", type=int, default=2880, help="hidden and intermediate size (smaller: a dry run)")
    return parser.parse_args()


# -- the synthetic parent ------------------------------------------------------------------------------------------


def parent_config(options: argparse.Namespace) -> dict[str, Any]:
    """The 120B config.json with fewer layers (and, for a dry run, a smaller hidden size and vocabulary)."""
    config = json.loads(CONFIG_120B.read_text())
    config.update(num_hidden_layers=options.layers, layer_types=config["layer_types"][: options.layers])
    if options.parent_experts == "bf16":
        del config["quantization_config"]
    if options.hidden != 2880:
        config.update(hidden_size=options.hidden, intermediate_size=options.hidden, vocab_size=1024)
    return config


def write_parent(folder: Path, config: dict[str, Any]) -> PuzzleArchitecture:
    """Random bytes in every tensor; BF16 tensors random but finite, as a router has to be."""
    architecture = PuzzleArchitecture.from_config(config)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    pool = np.random.default_rng(0).integers(0, 256, POOL_BYTES, dtype=np.uint8)
    finite = pool.view(np.uint16) & np.uint16(0xBFFF)  # the top exponent bit cleared: below 2 in magnitude
    weight_map: dict[str, str] = {}
    for number, group in enumerate(shard_groups(tensor_table(architecture)), start=1):
        name = f"model-{number:05d}.safetensors"
        weight_map.update(dict.fromkeys(group, name))
        with (folder / name).open("wb") as stream:
            stream.write(encode_header({n: (s.dtype, s.shape) for n, s in group.items()}, {"format": "pt"}))
            for i, spec in enumerate(group.values()):
                write_random(stream, spec, pool if spec.dtype == "U8" else finite.view(np.uint8), start=7919 * 64 * i)
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return architecture


def write_random(stream: Any, spec: TensorSpec, pool: np.ndarray, start: int) -> None:
    left, position = spec.num_bytes, start % (len(pool) // 2)
    while left > 0:
        part = pool[position : position + min(left, 2**20)]
        stream.write(part.data)
        left -= len(part)
        position = (position + len(part) + 64) % (len(pool) // 2)  # never the same megabyte in the same place


def shard_groups(table: dict[str, TensorSpec]) -> list[dict[str, TensorSpec]]:
    groups: list[dict[str, TensorSpec]] = []
    for wanted in (False, True):
        group: dict[str, TensorSpec] = {}
        for name, spec in table.items():
            if is_expert_tensor(name) is not wanted:
                continue
            if group and sum(s.num_bytes for s in group.values()) + spec.num_bytes > SHARD_BYTES:
                groups.append(group)
                group = {}
            group[name] = spec
        groups.append(group)
    return groups


def write_inputs(scratch: Path, architecture: PuzzleArchitecture) -> tuple[Path, Path]:
    """A child architecture and random importance."""
    blocks = [
        BlockConfig(
            num_local_experts=CHILD_COUNTS[i % len(CHILD_COUNTS)], sliding_window=CHILD_WINDOWS[i % len(CHILD_WINDOWS)]
        ).to_json()
        for i in range(architecture.num_layers)
    ]
    (scratch / "child.json").write_text(json.dumps({"block_configs": blocks}))
    scores = np.random.default_rng(1).random((architecture.num_layers, 128), dtype=np.float32)
    names = [f"model.layers.{i}.mlp.experts.importance" for i in range(len(scores))]
    header = encode_header(dict.fromkeys(names, ("F32", (128,))), {"method": "random"})
    (scratch / "importance.safetensors").write_bytes(header + scores.tobytes())
    return scratch / "child.json", scratch / "importance.safetensors"


# -- measuring -----------------------------------------------------------------------------------------------------


def measure(scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    parent, child, copy = scratch / "parent", scratch / "child", scratch / "copy"
    say("writing the parent")
    architecture = write_parent(parent, parent_config(options))
    file, importance = write_inputs(scratch, architecture)
    inputs = ["--architecture", str(file), "--importance", str(importance), "--experts", options.experts]
    say("deriving the child that cp will copy")
    run([*puzzle("derive", parent, child), *inputs], evict=parent, sync=child)
    derives, copies = [], []
    for number in range(1, options.rounds + 1):
        say(f"round {number} of {options.rounds}")
        derives.append(run([*puzzle("derive", parent, copy), *inputs], evict=parent, sync=copy))
        shutil.rmtree(copy)
        copies.append(run(["cp", "-r", "--reflink=never", str(child), str(copy)], evict=child, sync=copy))
        shutil.rmtree(copy)
    say("verify, inspect")
    verify = run([*puzzle("verify", child), "--against", str(parent)], evict=scratch)
    inspect = run(puzzle("inspect", parent), evict=parent)
    subset = None
    if options.experts in ("keep", options.parent_experts):
        (child / "derivation.json").unlink()
        subset = run([*puzzle("verify", child), "--against", str(parent)], evict=scratch)
    return summary(options, folder_bytes(parent), folder_bytes(child), derives, copies, verify, subset, inspect)


def puzzle(command: str, *paths: Path) -> list[str]:
    return [sys.executable, "-m", "puzzle_trtllm", command, *map(str, paths)]


def run(command: list[str], *, evict: Path, sync: Path | None = None) -> Run:
    """Run to its end, with nothing of `evict` in the page cache. Exits with the command's output if it fails."""
    for file in files_of(evict):
        evict_file(file)
    start = time.perf_counter()
    launcher = subprocess.run([sys.executable, "-S", "-c", LAUNCHER, *command], stdout=subprocess.PIPE, check=True)
    seconds = time.perf_counter() - start
    result = json.loads(launcher.stdout.splitlines()[-1])
    if result["exit_code"]:
        sys.exit(f"{' '.join(command)}\n{launcher.stdout.decode()}")
    for file in files_of(sync) if sync is not None else ():
        sync_file(file)
    return Run(
        seconds=seconds,
        seconds_synced=time.perf_counter() - start,
        peak_rss_bytes=result["max_rss_kib"] * 1024,
    )


def files_of(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.rglob("*")) if file.is_file()]


def sync_file(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def evict_file(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)  # dirty pages cannot be dropped
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in files_of(folder))


def check_disk(folder: Path, options: argparse.Namespace) -> None:
    architecture = PuzzleArchitecture.from_config(parent_config(options))
    parent = sum(spec.num_bytes for spec in tensor_table(architecture).values())
    growth = 4 if (options.parent_experts, options.experts) == ("mxfp4", "bf16") else 1
    needed, free = (1 + 2 * growth) * parent, shutil.disk_usage(folder).free
    say(f"the parent takes {parent / 1e9:.1f} GB; parent, child and one copy at most {needed / 1e9:.1f} GB")
    if free < needed:
        sys.exit(f"{folder}: {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed")


# -- reporting -----------------------------------------------------------------------------------------------------


def summary(
    options: argparse.Namespace,
    parent_bytes: int,
    child_bytes: int,
    derives: list[Run],
    copies: list[Run],
    verify: Run,
    subset: Run | None,
    inspect: Run,
) -> dict[str, Any]:
    ratios = [c.seconds / d.seconds for c, d in zip(copies, derives, strict=True)]
    synced = [c.seconds_synced / d.seconds_synced for c, d in zip(copies, derives, strict=True)]
    return {
        "layers": options.layers,
        "hidden": options.hidden,
        "parent_experts": options.parent_experts,
        "experts": options.experts,
        "parent_bytes": parent_bytes,
        "child_bytes": child_bytes,
        "derive": [asdict(run) for run in derives],
        "cp": [asdict(run) for run in copies],
        "verify": asdict(verify),
        "verify_without_record": None if subset is None else asdict(subset),
        "inspect": asdict(inspect),
        "speed_over_cp": statistics.median(ratios),
        "speed_over_cp_synced": statistics.median(synced),
        "peak_rss_bytes": max(run.peak_rss_bytes for run in derives),
        "machine": machine(),
    }


def machine() -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "kernel": platform.release(),
        "load_average": os.getloadavg()[0],
    }


def print_report(report: dict[str, Any]) -> None:
    gigabytes = report["child_bytes"] / 1e9
    print(f"parent {report['parent_bytes'] / 1e9:.2f} GB, child {gigabytes:.2f} GB, machine {report['machine']}")
    print(f"{'':24}{'seconds':>9}{'GB/s':>8}{'synced s':>10}{'GB/s':>8}{'peak RSS MiB':>14}")
    rows = [(f"derive {i}", r) for i, r in enumerate(report["derive"], 1)]
    rows += [(f"cp --reflink=never {i}", r) for i, r in enumerate(report["cp"], 1)]
    for name, row in rows:
        speed, synced = gigabytes / row["seconds"], gigabytes / row["seconds_synced"]
        print(
            f"{name:24}{row['seconds']:9.1f}{speed:8.2f}{row['seconds_synced']:10.1f}{synced:8.2f}"
            f"{row['peak_rss_bytes'] / 2**20:14.0f}"
        )
    for name in ("verify", "verify_without_record", "inspect"):
        row = report[name]
        if row is not None:
            print(f"{name:24}{row['seconds']:9.1f}{'':26}{row['peak_rss_bytes'] / 2**20:14.0f}")
    ratio, synced = report["speed_over_cp"], report["speed_over_cp_synced"]
    print(f"speed over cp, median of rounds: {ratio:.2f} to the end of the process, {synced:.2f} to the disk")


def say(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    main()
