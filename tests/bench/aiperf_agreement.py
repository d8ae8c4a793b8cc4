"""Does another public client measure the same? `bench` against NVIDIA's AIPerf, on one server with one load.

    python3 -m venv /tmp/aiperf && /tmp/aiperf/bin/pip install aiperf==0.13.0
    .venv/bin/python tests/bench/aiperf_agreement.py /tmp/aiperf/bin/aiperf [--rounds 3] [--servers paced engine]

Two servers, both real tritonservers. *paced*: a model that computes nothing and answers at set times (first response
after 200 ms, then 10 tokens every 50 ms), so the truth is known and no client takes CPU time from what it measures.
*engine*: the demo's model on the reference runtime (BF16 KV, no memory cap). Both clients send the same prompts as the
same closed loop in turn, rounds in alternating order, after one round that does not count. AIPerf has no type for
Triton; its `template` endpoint posts to generate_stream, over HTTP where bench uses gRPC. Both ignore the end of
sequence and stop at the same length.

What can be compared: requests/s over the whole run (AIPerf has no steady window, so bench's number here is completed
requests / wall time too), time to first token, and end-to-end latency. Not tokens: AIPerf encodes the text again.

AIPerf is about ten processes. On a small machine they take from the engine the CPU time that it needs, so there its
requests/s compare two machines as much as two clients; --concurrency 1 keeps that small.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from null_engine import null_server

from puzzle_trtllm.build.engine_build import build_engine
from puzzle_trtllm.engine import load_engine_config
from puzzle_trtllm.scenario import Scenario
from puzzle_trtllm.serve.bench.runner import run_bench
from puzzle_trtllm.serve.triton.server import TritonServer
from puzzle_trtllm.trace import read_trace

ABACUS = Path(__file__).parents[2] / "puzzle_trtllm" / "demo" / "abacus"
METRICS = {"requests/s": 0.03, "TTFT ms, mean": 0.10, "E2E ms, mean": 0.10}
"""What is compared, and the disagreement allowed."""
NO_REUSE = {"enable_block_reuse": False}
"""Both send the same prompts: with reuse the second client of a round would find the first one's in the cache."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running server, and the folder whose tokenizer goes with it."""

    grpc_url: str
    http_url: str
    tokenizer: Path


def of_bench(server: Server, load: Scenario, prompts: Path) -> dict[str, float]:
    """One run of ours."""
    result = run_bench(
        server.grpc_url,
        scenario=load,
        trace=read_trace(prompts),
        tokenizer_folder=server.tokenizer,
        workers=1,
        quiet=True,
    )
    if result.requests.completed != load.num_requests:
        raise SystemExit(f"bench: {result.requests}")
    values = (
        result.requests.completed / result.wall_s,
        result.distributions["ttft_ms"].mean,
        result.distributions["e2e_ms"].mean,
    )
    return dict(zip(METRICS, values, strict=True))


def of_aiperf(aiperf: Path, server: Server, load: Scenario, prompts: Path, scratch: Path) -> dict[str, float]:
    """One run of theirs."""
    template = scratch / "template.json"
    fields = {
        "streaming": True,
        "stream_delta": True,
        "sampling_param_max_tokens": load.output_tokens,
        "sampling_param_ignore_eos": True,
    }
    template.write_text('{"text_input": {{ text|tojson }}, ' + json.dumps(fields)[1:])
    texts = scratch / "texts.jsonl"
    lines = [json.dumps({"text": json.loads(line)["text_input"]}) for line in prompts.read_text().splitlines()]
    texts.write_text("\n".join(lines) + "\n")
    out = scratch / f"aiperf-{prompts.stem}"
    command = [
        *(str(aiperf), "profile", "--model", "tensorrt_llm", "--url", server.http_url),
        *("--endpoint-type", "template", "--custom-endpoint", "/v2/models/tensorrt_llm/generate_stream", "--streaming"),
        *("--extra-inputs", f"payload_template:{template}", "--extra-inputs", "response_field:text_output"),
        *("--tokenizer", str(server.tokenizer), "--ui", "none"),
        *("--input-file", str(texts), "--custom-dataset-type", "single_turn"),
        *("--concurrency", str(load.concurrency), "--request-count", str(load.num_requests)),
        *("--artifact-dir", str(out)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    files = sorted(out.rglob("profile_export_aiperf.json"))
    if done.returncode or not files:
        raise SystemExit(f"aiperf failed ({done.returncode}):\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    report = json.loads(files[0].read_text())
    values = (
        report["request_throughput"]["avg"],
        report["time_to_first_token"]["avg"],
        report["request_latency"]["avg"],
    )
    return dict(zip(METRICS, map(float, values), strict=True))


def write_prompts(file: Path, load: Scenario, seed: int) -> Path:
    """Sums as text: the model goes on with digits, and every token shows as text, which AIPerf times."""
    source = random.Random(seed)
    with file.open("w") as out:
        for _ in range(load.num_requests):
            text = " ".join(f"{source.randint(10, 99)}+{source.randint(10, 99)}=" for _ in range(8))
            out.write(json.dumps({"text_input": text, "output_length": load.output_tokens}) + "\n")
    return file


@contextmanager
def paced(_: argparse.Namespace) -> Iterator[Server]:
    """Answers at set times."""
    with null_server(10, first_s=0.2, step_s=0.05) as (grpc_url, http_address):
        yield Server(grpc_url=grpc_url, http_url=f"http://{http_address}", tokenizer=ABACUS)


@contextmanager
def engine(options: argparse.Namespace) -> Iterator[Server]:
    """The demo's model on the reference runtime."""
    llm_args = {"stream_interval": options.stream_interval, "kv_cache_config": NO_REUSE}
    config = load_engine_config("cpu-demo").model_copy(
        update={"memory_bytes": None, "kv_dtype": "bf16", "llm_args": llm_args}
    )
    with tempfile.TemporaryDirectory() as folder:
        built = build_engine(ABACUS, Path(folder) / "engine", config=config)
        with TritonServer(built) as server:
            yield Server(grpc_url=server.grpc_url, http_url=server.http_url, tokenizer=built.model_path)


SERVERS = {"paced": (paced, 4), "engine": (engine, 1)}
"""Servers, and the requests in flight."""


def compare(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All rounds on one server; prints a row a metric."""
    start, concurrency = SERVERS[name]
    load = Scenario(
        name="agreement", input_tokens=64, output_tokens=100, concurrency=concurrency, num_requests=options.requests
    )
    rounds: list[tuple[dict[str, float], dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as folder, start(options) as server:
        scratch = Path(folder)
        for index in range(options.rounds + 1):
            prompts = write_prompts(scratch / f"round{index}.jsonl", load, index)
            if index % 2:
                theirs = of_aiperf(options.aiperf, server, load, prompts, scratch)
            ours = of_bench(server, load, prompts)
            if index % 2 == 0:
                theirs = of_aiperf(options.aiperf, server, load, prompts, scratch)
            if index:
                rounds.append((ours, theirs))
    rows = []
    for metric, allowed in METRICS.items():
        mine, other = ([pair[side][metric] for pair in rounds] for side in (0, 1))
        ratio = statistics.median(b / a for a, b in zip(mine, other, strict=True))
        rows.append({"metric": metric, "bench": statistics.median(mine), "aiperf": statistics.median(other)})
        rows[-1] |= {"aiperf_over_bench": ratio, "allowed": allowed, "agrees": abs(ratio - 1) <= allowed}
        shown = (
            f"{statistics.median(values):8.2f} ({min(values):.2f} to {max(values):.2f})" for values in (mine, other)
        )
        verdict = f"{'agrees' if rows[-1]['agrees'] else 'DIFFERS'} within {allowed:.0%}"
        print(f"{name:6} {metric:12} bench {next(shown)}  aiperf {next(shown)}  x{ratio:.3f}  {verdict}")
    return {"server": name, "concurrency": concurrency, "metrics": rows}


def main() -> None:
    """Measure both and print how far they are apart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("aiperf", type=Path, help="AIPerf's executable.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--stream-interval", type=int, default=10, help="Of the engine.")
    parser.add_argument("--servers", nargs="+", choices=list(SERVERS), default=list(SERVERS))
    options = parser.parse_args()
    runs = [compare(name, options) for name in options.servers]
    print(json.dumps({"rounds": options.rounds, "requests": options.requests, "runs": runs}))


if __name__ == "__main__":
    main()
