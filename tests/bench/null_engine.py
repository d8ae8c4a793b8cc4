"""What the load generator can do: the real `bench` against a real tritonserver whose model answers at once.

    .venv/bin/python tests/bench/null_engine.py [--rounds 3] [--workers 1,2] [--concurrency 32]

The model is a decoupled Python model with the tensors that bench uses. It computes nothing: as soon as a request is
there it sends `output_tokens / interval` responses of `interval` tokens. The client, Triton and its Python stub share
the machine's cores, so the figures are a floor for the client alone. Rounds alternate; medians and ranges are printed,
and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from puzzle_trtllm.scenario import Scenario
from puzzle_trtllm.serve.bench.result import BenchResult
from puzzle_trtllm.serve.bench.runner import run_bench
from puzzle_trtllm.serve.triton.contract import INPUTS, OUTPUTS
from puzzle_trtllm.serve.triton.install import find_triton
from puzzle_trtllm.serve.triton.ports import choose_ports
from puzzle_trtllm.serve.triton.probe import http_status

ABACUS = Path(__file__).parents[2] / "puzzle_trtllm" / "demo" / "abacus"
INTERVALS = (10, 1)
MODEL = """
import threading
import time

import numpy as np
import triton_python_backend_utils as pb_utils

INTERVAL, FIRST_S, STEP_S = {interval}, {first_s}, {step_s}
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


def text(value):
    return np.array([value], dtype=np.object_)


class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            left = int(pb_utils.get_input_tensor_by_name(request, "sampling_param_max_tokens").as_numpy()[0])
            sender = request.get_response_sender()
            if FIRST_S or STEP_S:
                threading.Thread(target=answer, args=(sender, left, time.monotonic() + FIRST_S)).start()
            else:
                answer(sender, left, 0.0)


def answer(sender, left, due):
    while left > 0:
        if due:
            time.sleep(max(0.0, due - time.monotonic()))
            due += STEP_S
        ids = np.full(min(INTERVAL, left), 7, dtype=np.int32)
        left -= len(ids)
        tensors = [pb_utils.Tensor("text_output", text(b"x")), pb_utils.Tensor("output_ids", ids)]
        if not left:
            tensors.append(pb_utils.Tensor("finish_reason", text(b"length")))
        sender.send(pb_utils.InferenceResponse(tensors), flags=0 if left else FINAL)
"""


def config() -> str:
    """config.pbtxt with our contract's tensors."""
    lines = [
        'name: "tensorrt_llm"',
        'backend: "python"',
        "model_transaction_policy { decoupled: true }",
        "instance_group [{ count: 1, kind: KIND_CPU }]",
    ]
    for kind, specs in (("input", INPUTS), ("output", OUTPUTS)):
        for spec in specs:
            dims = ", ".join(map(str, spec.dims))
            optional = ", optional: true" if kind == "input" and spec.optional else ""
            lines.append(
                f'{kind} [{{ name: "{spec.name}", data_type: TYPE_{spec.dtype}, dims: [ {dims} ]{optional} }}]'
            )
    return "\n".join(lines) + "\n"


@contextmanager
def null_server(interval: int, *, first_s: float = 0.0, step_s: float = 0.0) -> Iterator[tuple[str, str]]:
    """A running server; gives its gRPC and HTTP addresses. First responses take `first_s`, others `step_s`."""
    install = find_triton()
    ports = choose_ports("127.0.0.1", {"HTTP": 0, "gRPC": 0, "metrics": 0})
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "models" / "tensorrt_llm"
        (model / "1").mkdir(parents=True)
        (model / "config.pbtxt").write_text(config())
        pace = {"{interval}": interval, "{first_s}": first_s, "{step_s}": step_s}
        source = MODEL
        for word, value in pace.items():
            source = source.replace(word, str(value))
        (model / "1" / "model.py").write_text(source)
        command = [str(install.server), "--model-repository", str(model.parent), *install.arguments(Path(scratch))]
        for name, key in (("http", "HTTP"), ("grpc", "gRPC"), ("metrics", "metrics")):
            command += [f"--{name}-address=127.0.0.1", f"--{name}-port={ports[key]}"]
        command += [
            "--allow-gpu-metrics=false",
            f"--backend-config=python,shm-region-prefix-name=null{os.getpid()}_{interval}",
        ]
        log = Path(scratch) / "log"
        with log.open("wb") as out:
            process = subprocess.Popen(command, env={**os.environ, **install.environment}, stdout=out, stderr=out)
        try:
            deadline_s = time.monotonic() + 120
            while http_status(f"http://127.0.0.1:{ports['HTTP']}/v2/models/tensorrt_llm/ready") != 200:
                if process.poll() is not None or time.monotonic() > deadline_s:
                    raise SystemExit(f"tritonserver did not start:\n{log.read_text()[-2000:]}")
                time.sleep(0.1)
            yield f"127.0.0.1:{ports['gRPC']}", f"127.0.0.1:{ports['HTTP']}"
        finally:
            process.terminate()
            process.wait(60)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=1000)
    options = parser.parse_args()
    load = Scenario(
        name="null",
        input_tokens=16,
        output_tokens=options.output_tokens,
        concurrency=options.concurrency,
        num_requests=4 * options.concurrency,
        warmup_requests=8,
    )
    workers = [int(word) for word in options.workers.split(",")]
    samples: dict[tuple[int, int], list[BenchResult]] = {(i, w): [] for i in INTERVALS for w in workers}
    with null_server(INTERVALS[0]) as slow, null_server(INTERVALS[1]) as fast:
        urls = dict(zip(INTERVALS, (slow[0], fast[0]), strict=True))
        for round_ in range(options.rounds):
            for interval, count in list(samples) if round_ % 2 == 0 else list(samples)[::-1]:
                scale = 1 if interval > 1 else 4  # responses cost, not tokens
                scenario = load.model_copy(update={"num_requests": load.num_requests // scale})
                result = run_bench(
                    urls[interval], scenario=scenario, seed=round_, tokenizer_folder=ABACUS, workers=count, quiet=True
                )
                if result.requests.completed != result.requests.total:
                    raise SystemExit(f"not all requests were answered: {result.requests}")
                samples[interval, count].append(result)
    rows = []
    for (interval, count), results in samples.items():
        rates = [result.output_tokens_per_s for result in results]
        busy = statistics.median(result.client.busiest_cpu for result in results if result.client)
        row = {"interval": interval, "workers": count, "tokens_per_s": statistics.median(rates)}
        rows.append(row | {"responses_per_s": row["tokens_per_s"] / interval, "busiest_cpu": busy})
        spread = f"({min(rates):,.0f} to {max(rates):,.0f})"
        print(
            f"interval {interval:2}, {count} workers: {row['tokens_per_s']:9,.0f} tok/s {spread:20} "
            f"{row['tokens_per_s'] / interval:7,.0f} responses/s, busiest client {busy:.0%} of a core"
        )
    print(json.dumps({"rounds": options.rounds, "concurrency": options.concurrency, "runs": rows}))


if __name__ == "__main__":
    main()
