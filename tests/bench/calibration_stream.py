"""What calibration costs: time over a plain forward pass, and the stream's peak memory against the model's size.

    .venv/bin/python tests/bench/calibration_stream.py                    # 4 layers, 1 GB dequantized in bfloat16
    .venv/bin/python tests/bench/calibration_stream.py --hidden 256 --experts 4 --rounds 1

It writes a synthetic MXFP4 checkpoint (random weights, tests/toys.py). Every run is a process of its own, in turns:
`nothing` imports and opens the checkpoint, which is the memory that the others are measured above; `forward` loads the
model and runs the decoder stack over the data; `kv` and `experts` are `calibrate kv` and `calibrate experts`, whole and
streamed. Seconds are those of the call, without imports; for the whole runs they include loading the model. The results
of whole and stream are compared. Peak memory is VmHWM: the process's pages and those of files it has mapped. (Not
ru_maxrss, which a new process takes over from the one that started it.)
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
KINDS = ("nothing", "forward", "kv", "kv --stream", "experts", "experts --stream")

PROGRAM = """
import json, sys, time
import torch
from pathlib import Path
from puzzle_trtllm.calibration.dataset import load_dataset
from puzzle_trtllm.calibration.experts import calibrate_experts
from puzzle_trtllm.calibration.forward import run_dataset
from puzzle_trtllm.calibration.kv import calibrate_kv
from puzzle_trtllm.calibration.kv_quantizers import hushed
from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.models.huggingface.loading import load_causal_lm

with hushed():
    import modelopt.torch.quantization
kind, folder, out = sys.argv[1:]
source = Checkpoint.open(folder)
data = load_dataset(None, source)
start = time.perf_counter()
loaded = start
options = {"dtype": torch.bfloat16, "stream": kind.endswith("--stream")}
if kind == "forward":
    model = load_causal_lm(source, dtype=torch.bfloat16)
    loaded = time.perf_counter()
    run_dataset(model, data, what="forward")
elif kind.startswith("kv"):
    calibrate_kv(folder, out, **options)
elif kind.startswith("experts"):
    calibrate_experts(folder, out, **options)
end = time.perf_counter()
status = Path("/proc/self/status").read_text().splitlines()
peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
print(json.dumps({"seconds": end - start, "load_seconds": loaded - start, "peak_bytes": peak}))
"""


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = _write_model(Path(scratch) / "model", options)
        sizes = _sizes(folder)
        print(
            json.dumps({"machine": platform.processor() or platform.machine(), **vars(options), **sizes}, default=str)
        )
        runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
        for round_ in range(options.rounds):
            for kind in KINDS:
                run = _run(kind, folder, Path(scratch) / f"{kind} {round_}")
                runs[kind].append(run)
                print(f"round {round_}: {kind}: {json.dumps(run)}", file=sys.stderr)
        _compare(Path(scratch))
    _print_table(runs, sizes["model_bytes"])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=40)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512, help="tokens a sequence")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", type=Path, default=None)
    return parser.parse_args()


def _write_model(folder: Path, options: argparse.Namespace) -> Path:
    sys.path.insert(0, str(ROOT))
    import numpy as np

    from tests.toys import VOCAB_SIZE, toy_architecture, write_toy_checkpoint

    blocks = [(options.experts, 128 if i % 2 == 0 else None) for i in range(options.layers)]
    dims: dict[str, Any] = {"hidden_size": options.hidden, "intermediate_size": options.hidden}
    dims |= {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64, "experts_per_token": 4}
    write_toy_checkpoint(folder, toy_architecture(blocks, **dims))
    rng = np.random.default_rng(0)
    rows = [rng.integers(7, VOCAB_SIZE, options.tokens).tolist() for _ in range(options.sequences)]
    (folder / "calibration.jsonl").write_text("\n".join(json.dumps({"input_ids": row}) for row in rows))
    return folder


def _sizes(folder: Path) -> dict[str, int]:
    from puzzle_trtllm.checkpoint import Checkpoint
    from puzzle_trtllm.tensors import count_parameters

    source = Checkpoint.open(folder)
    return {"model_bytes": 2 * count_parameters(source.architecture), "checkpoint_bytes": source.weight_bytes}


def _run(kind: str, folder: Path, out: Path) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, kind, folder, out], check=True, stdout=subprocess.PIPE, cwd=ROOT
    )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _compare(scratch: Path) -> None:
    for whole, streamed in (
        ("kv 0/kv_calibration.safetensors", "kv --stream 0/kv_calibration.safetensors"),
        ("experts 0", "experts --stream 0"),
    ):
        if (scratch / whole).read_bytes() != (scratch / streamed).read_bytes():
            raise SystemExit(f"{whole} and {streamed} differ")


def _print_table(runs: dict[str, list[dict[str, float]]], model_bytes: int) -> None:
    def median(kind: str, key: str) -> float:
        return statistics.median(run[key] for run in runs[kind])

    idle, forward = median("nothing", "peak_bytes"), median("forward", "seconds")
    print("| | seconds (range) | over load + forward | peak RSS, MiB | above nothing, of the model |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for kind in KINDS:
        seconds = [run["seconds"] for run in runs[kind]]
        peak: Any = median(kind, "peak_bytes")
        print(
            f"| {kind} | {median(kind, 'seconds'):.1f} ({min(seconds):.1f} to {max(seconds):.1f}) "
            f"| {median(kind, 'seconds') / forward:.2f} | {peak / 2**20:,.0f} | {(peak - idle) / model_bytes:.0%} |"
        )
    load = median("forward", "load_seconds")
    print(f"model {model_bytes / 1e9:.2f} GB; loading it is {load:.1f} s of the forward run")


if __name__ == "__main__":
    main()
