"""What calibration costs: time over a plain forward pass, and the stream's peak memory against the model's size.

    .venv/bin/python tests/bench/calibration_stream.py                    # 4 layers, 1 GB dequantized in bfloat16
    .venv/bin/python tests/bench/calibration_stream.py --hidden 256 --experts 4 --rounds 1
    .venv/bin/python tests/bench/calibration_stream.py --layers 16 --rounds 1 --kinds nothing forward "kv --stream"

It writes a synthetic MXFP4 checkpoint (random weights, tests/toys.py; `--model` keeps it and uses it again). Every run
is a process of its own, in turns:

    nothing              imports and opens the checkpoint: the memory that the others are measured above
    forward              loads the model and runs the decoder stack over the data, experts as transformers chooses
    forward --eager      the same with transformers' eager experts, the path that ModelOpt runs on
    kv [--stream]        `calibrate kv` without its quality report, whole and streamed
    kv [--stream] --quality   with the report: four passes over held-out text, an eighth of the data
    experts [--stream]   `calibrate experts`

Seconds are those of the call; loading is timed apart, and so is importing ModelOpt, which no run includes. Results of
whole and stream are compared. Peak memory is VmHWM: the process's pages and those of files it has mapped. (Not
ru_maxrss, which a new process takes over from the one that started it.)
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
KINDS = (
    "nothing",
    "forward",
    "forward --eager",
    "kv",
    "kv --stream",
    "kv --quality",
    "kv --stream --quality",
    "experts",
    "experts --stream",
)
DEFAULT_KINDS = KINDS[:6]

PROGRAM = """
import json, sys, time
if sys.argv[1].startswith(("kv", "experts")):
    from puzzle_trtllm.calibration.kernel_cache import limit_kernel_cache

    limit_kernel_cache()  # as the commands do
start = time.perf_counter()
import torch
from pathlib import Path
from puzzle_trtllm.calibration.dataset import load_dataset
from puzzle_trtllm.calibration.experts import calibrate_experts
from puzzle_trtllm.calibration.forward import run_dataset
from puzzle_trtllm.calibration.held_out import set_aside
from puzzle_trtllm.calibration import kv, layer_stream
from puzzle_trtllm.calibration.kv_quantizers import hushed
from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.models.huggingface.loading import load_causal_lm
imported = time.perf_counter()
with hushed():
    import modelopt.torch.quantization
    import modelopt.torch.export.quant_utils
times = {"import": imported - start, "import_modelopt": time.perf_counter() - imported, "load": 0.0}

def timed(load):
    def loading(*arguments, **options):
        before = time.perf_counter()
        model = load(*arguments, **options)
        times["load"] += time.perf_counter() - before
        return model
    return loading

kv.load_causal_lm, layer_stream.load_layer = timed(kv.load_causal_lm), timed(layer_stream.load_layer)
kind, folder, out = sys.argv[1:]
source = Checkpoint.open(folder)
start = time.perf_counter()
options = {"dtype": torch.bfloat16, "stream": "--stream" in kind}
if kind.startswith("forward"):
    model = timed(load_causal_lm)(source, dtype=torch.bfloat16)
    if "--eager" in kind:
        model.config._experts_implementation = "eager"
    data, _ = set_aside(load_dataset(None, source), None, source)
    run_dataset(model, data, what="forward")
elif kind.startswith("kv"):
    kv.calibrate_kv(folder, out, quality="--quality" in kind, **options)
elif kind.startswith("experts"):
    calibrate_experts(folder, out, **options)
times["seconds"] = time.perf_counter() - start
status = Path("/proc/self/status").read_text().splitlines()
peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
print(json.dumps({**times, "peak_bytes": peak}))
"""


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = options.model or Path(scratch) / "model"
        if not (folder / "config.json").is_file():
            _write_model(folder, options)
        sizes = _sizes(folder)
        print(
            json.dumps({"machine": platform.processor() or platform.machine(), **vars(options), **sizes}, default=str)
        )
        runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in options.kinds}
        for round_ in range(options.rounds):
            for kind in options.kinds:
                out = Path(scratch) / f"{kind} {round_}"
                run = _run(kind, folder, out)
                runs[kind].append(run)
                print(f"round {round_}: {kind}: {json.dumps(run)}", file=sys.stderr)
                if round_ > 0 and out.is_dir():
                    shutil.rmtree(out)
        _compare(Path(scratch))
    _print_table(runs, sizes)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=40)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512, help="tokens a sequence")
    parser.add_argument("--sequences", type=int, default=16, help="an eighth of them held out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=DEFAULT_KINDS)
    parser.add_argument("--model", type=Path, default=None, help="folder of the synthetic checkpoint, made if missing")
    parser.add_argument("--scratch", type=Path, default=None)
    return parser.parse_args()


def _write_model(folder: Path, options: argparse.Namespace) -> None:
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


def _sizes(folder: Path) -> dict[str, int]:
    from puzzle_trtllm.checkpoint import Checkpoint
    from puzzle_trtllm.tensors import count_parameters

    source = Checkpoint.open(folder)
    model_bytes = 2 * count_parameters(source.architecture)
    a = source.architecture
    layer_bytes = (model_bytes - 4 * a.vocab_size * a.hidden_size) // a.num_layers
    return {"model_bytes": model_bytes, "layer_bytes": layer_bytes, "checkpoint_bytes": source.weight_bytes}


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
        both = scratch / whole, scratch / streamed
        if all(file.is_file() for file in both) and both[0].read_bytes() != both[1].read_bytes():
            raise SystemExit(f"{whole} and {streamed} differ")


def _print_table(runs: dict[str, list[dict[str, float]]], sizes: dict[str, int]) -> None:
    def median(kind: str, key: str) -> float:
        return statistics.median(run[key] for run in runs[kind])

    def rest(kind: str) -> float:
        return statistics.median(run["seconds"] - run["load"] for run in runs[kind])

    idle = median("nothing", "peak_bytes") if "nothing" in runs else 0.0
    forward = "forward --eager" if "forward --eager" in runs else "forward"
    print(f"| | seconds (range) | loading | the rest | over {forward} | with loading | peak above nothing, MB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for kind, of_kind in runs.items():
        seconds = [run["seconds"] for run in of_kind]
        ratios = "| - | - "
        if forward in runs and kind != "nothing":
            whole = median(kind, "seconds") / median(forward, "seconds")
            ratios = f"| {rest(kind) / rest(forward):.2f} | {whole:.2f} "
        print(
            f"| {kind} | {median(kind, 'seconds'):.1f} ({min(seconds):.1f} to {max(seconds):.1f}) "
            f"| {median(kind, 'load'):.1f} | {rest(kind):.1f} {ratios}"
            f"| {(median(kind, 'peak_bytes') - idle) / 1e6:,.0f} |"
        )
    every = [run for of_kind in runs.values() for run in of_kind]
    imports = [statistics.median(run[key] for run in every) for key in ("import", "import_modelopt")]
    print(f"imports: {imports[0]:.1f} s, and ModelOpt's {imports[1]:.1f} s; counted nowhere above")
    print(f"model {sizes['model_bytes'] / 1e6:,.0f} MB in bfloat16, one layer {sizes['layer_bytes'] / 1e6:,.0f} MB")
    streamed = [kind for kind in runs if "--stream" in kind]
    if streamed and {"nothing", "forward"} <= set(runs):
        micro_batch = median("forward", "peak_bytes") - idle - sizes["model_bytes"]
        bound = 2 * sizes["layer_bytes"] + micro_batch
        peak = max(median(kind, "peak_bytes") for kind in streamed) - idle
        print(
            f"stream's peak {peak / 1e6:,.0f} MB; two layers and a micro-batch {bound / 1e6:,.0f} MB "
            f"(the micro-batch is what `forward` takes beside the model: {micro_batch / 1e6:,.0f} MB)"
        )


if __name__ == "__main__":
    main()
