"""Which score picks the experts to keep: children of the demo's model, really derived, against their parent.

    .venv/bin/python tests/bench/expert_scores.py [--problems 128] [--random 5] [--out runs/expert_scores.json]

Every score, one-shot and iterative, and random choice decide at several budgets which experts of abacus a child keeps;
the attention windows stay the parent's, so that nothing but experts differs. Scores are learned from the model's
calibration conversations. Each child is derived by `derive`, loaded by the reference engine, and answers held-out
problems greedily at the three reasoning efforts (accuracy); transformers then computes KL(parent || child) of the next
token, in nats, over what a right answer to those problems says, at all efforts. Children that keep the same experts are
the same child and are measured once. Prints one table a budget and writes everything as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from puzzle_trtllm.build.derive import derive
from puzzle_trtllm.calibration.expert_scores import REMOVALS, SCORES
from puzzle_trtllm.calibration.experts import calibrate_experts
from puzzle_trtllm.calibration.forward import threads
from puzzle_trtllm.calibration.tensor_file import write_tensors
from puzzle_trtllm.chat import ChatTokenizer
from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.demo.problems import EFFORTS, reasoning_trace
from puzzle_trtllm.models.huggingface.loading import load_causal_lm
from puzzle_trtllm.serve.evaluate.answers import final_answer
from puzzle_trtllm.serve.evaluate.problems import Problem, load_problems
from puzzle_trtllm.serve.runtimes.api import KvCacheConfig
from puzzle_trtllm.serve.runtimes.reference.arguments import EngineArguments
from puzzle_trtllm.serve.runtimes.reference.engine import ReferenceEngine
from puzzle_trtllm.serve.runtimes.reference.loading import load_engine
from puzzle_trtllm.serve.runtimes.reference.messages import DecodingRule, Submit

ABACUS = Path(__file__).parents[2] / "puzzle_trtllm" / "demo" / "abacus"
CHILD = (8, 8, 6, 6, 5, 4)
BUDGETS = {
    "the demo's child": CHILD,
    "one fewer in layers 2 to 5": (8, 8, 5, 5, 4, 3),
    "two fewer in layers 2 to 5": (8, 8, 4, 4, 3, 2),
    "7 in every layer": (7,) * 6,
    "6 in every layer": (6,) * 6,
}
"""Experts kept by layer, of 8."""

MAX_NEW_TOKENS = 200

Kept = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Result:
    """One way to choose, at one budget."""

    budget: str
    method: str
    accuracy: dict[str, float]
    kl: float
    kept: Kept


@dataclass(frozen=True, kw_only=True)
class Exam:
    """What every child is asked."""

    problems: tuple[Problem, ...]
    tokenizer: ChatTokenizer

    def prompt(self, problem: Problem, effort: str) -> list[int]:
        question = [{"role": "user", "content": problem.prompt}]
        return self.tokenizer.encode(self.tokenizer.render_chat(question, reasoning_effort=effort))

    def conversations(self) -> Iterator[tuple[list[int], int]]:
        """Token ids of right answers, and where the answer begins."""
        for problem in self.problems:
            a, b = map(int, problem.prompt.removesuffix("=").split("+"))
            for effort in EFFORTS:
                thinking, answer = reasoning_trace(a, b, effort)
                said = {"role": "assistant", "content": answer} | ({"thinking": thinking} if thinking else {})
                chat = [{"role": "user", "content": problem.prompt}, said]
                text = self.tokenizer.render_chat(chat, reasoning_effort=effort, add_generation_prompt=False)
                yield self.tokenizer.encode(text), len(self.prompt(problem, effort))


def accuracy(folder: Path, exam: Exam) -> dict[str, float]:
    """Share of problems answered right, by effort."""
    engine, _ = load_engine(
        EngineArguments(
            model=str(folder), dtype="float32", max_seq_len=320, max_batch_size=128, kv_cache_config=KvCacheConfig()
        )
    )
    right = {}
    for effort in EFFORTS:
        answers = generate(engine, [exam.prompt(problem, effort) for problem in exam.problems])
        finals = [final_answer(exam.tokenizer.decode(ids)) for ids in answers]
        right[effort] = statistics.mean(
            final == problem.answer for final, problem in zip(finals, exam.problems, strict=True)
        )
    return right


def generate(engine: ReferenceEngine, prompts: Sequence[list[int]]) -> list[list[int]]:
    """Greedy answers."""
    rule = DecodingRule(max_tokens=MAX_NEW_TOKENS, end_ids=frozenset({1}), report_every=0)
    for i, prompt in enumerate(prompts):
        engine.submit(Submit(request_id=i, prompt_token_ids=prompt, rule=rule, arrival_ns=0))
    answers: list[list[int]] = [[] for _ in prompts]
    while engine.has_work:
        for update in engine.step():
            answers[update.request_id] += update.token_ids
    return answers


@torch.inference_mode()
def next_token_logprobs(folder: Path, exam: Exam) -> list[torch.Tensor]:
    """For each conversation, log-probabilities `[answer tokens, V]`."""
    model = load_causal_lm(folder)
    with threads(1):
        return [
            model(torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1) for ids, start in exam.conversations()
        ]


def divergence(parent: Sequence[torch.Tensor], child: Sequence[torch.Tensor]) -> float:
    """Mean over tokens of KL(parent || child), nats."""
    per_token = [(p.exp() * (p - c)).sum(-1) for p, c in zip(parent, child, strict=True)]
    return float(torch.cat(per_token).double().mean())


def write_importances(scratch: Path, num_random: int) -> dict[str, Path]:
    """An importance file for every method."""
    files = {}
    for score in SCORES:
        for removal in REMOVALS:
            name = f"{score}, {removal}"
            files[name] = calibrate_experts(
                ABACUS, scratch / f"{name}.safetensors", score=score, removal=removal, stream=False
            ).out
    exact = "output-error, iterative, all 8 choices"
    files[exact] = calibrate_experts(
        ABACUS, scratch / "exact.safetensors", score="output-error", removal="iterative", choices=8, stream=False
    ).out
    parent = Checkpoint.open(ABACUS)
    for seed in range(num_random):
        rng = np.random.default_rng(seed)
        tensors = {
            f"model.layers.{i}.mlp.experts.importance": rng.permutation(8).astype(np.float32) for i in range(len(CHILD))
        }
        files[f"random, seed {seed}"] = scratch / f"random-{seed}.safetensors"
        write_tensors(files[f"random, seed {seed}"], tensors, {"parent_fingerprint": parent.fingerprint()})
    return files


def measure(files: dict[str, Path], exam: Exam, scratch: Path) -> list[Result]:
    """Every method at every budget."""
    parent_logprobs = next_token_logprobs(ABACUS, exam)
    whole = Result(budget="parent", method="parent", accuracy=accuracy(ABACUS, exam), kl=0.0, kept=())
    results, seen = [whole], dict[Kept, Result]()
    windows = [block.sliding_window for block in Checkpoint.open(ABACUS).architecture.blocks]
    for budget, counts in BUDGETS.items():
        blocks = [{"num_local_experts": n, "sliding_window": w} for n, w in zip(counts, windows, strict=True)]
        architecture = scratch / "architecture.json"
        architecture.write_text(json.dumps({"block_configs": blocks}))
        for method, file in files.items():
            folder = scratch / "child"
            record = derive(ABACUS, folder, architecture=architecture, importance=file, overwrite=True)
            kept = tuple(map(tuple, record.kept_experts))
            if kept not in seen:
                kl = divergence(parent_logprobs, next_token_logprobs(folder, exam))
                seen[kept] = Result(budget=budget, method=method, accuracy=accuracy(folder, exam), kl=kl, kept=kept)
            results.append(Result(**{**vars(seen[kept]), "budget": budget, "method": method}))
            print(f"{budget}: {method}: {results[-1].accuracy} KL {results[-1].kl:.4f}", flush=True)
    return results


def print_tables(results: Sequence[Result]) -> None:
    """Markdown: accuracies and KL by budget, then the geometric mean of KL over all budgets."""
    print(f"\nparent: {show(results[0].accuracy)}\n")
    methods = {group(result.method): [] for result in results[1:]}  # type: dict[str, list[Result]]
    for result in results[1:]:
        methods[group(result.method)].append(result)
    for budget, counts in BUDGETS.items():
        print(f"| {budget} {counts} | KL, nats | accuracy low / medium / high |\n| --- | ---: | ---: |")
        for name, all_budgets in methods.items():
            here = [result for result in all_budgets if result.budget == budget]
            kls = sorted(result.kl for result in here)
            span = f" ({kls[0]:.4f} to {kls[-1]:.4f})" if len(kls) > 1 else ""
            middle = {effort: statistics.median(result.accuracy[effort] for result in here) for effort in EFFORTS}
            print(f"| {name} | {statistics.median(kls):.4f}{span} | {show(middle)} |")
        print()
    print("| all budgets | geometric mean of KL | mean accuracy low / medium / high |\n| --- | ---: | ---: |")
    for name, here in methods.items():
        mean = {effort: statistics.mean(result.accuracy[effort] for result in here) for effort in EFFORTS}
        print(f"| {name} | {statistics.geometric_mean(result.kl for result in here):.4f} | {show(mean)} |")


def group(method: str) -> str:
    """All seeds of random choice are one method."""
    return "random" if method.startswith("random") else method


def show(accuracies: dict[str, float]) -> str:
    return " / ".join(f"{accuracies[effort]:.1%}" for effort in EFFORTS)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--problems", type=int, default=128)
    parser.add_argument("--random", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/expert_scores.json"))
    options = parser.parse_args()
    problems = load_problems(ABACUS / "problems.jsonl", limit=options.problems).problems
    exam = Exam(problems=problems, tokenizer=ChatTokenizer.from_folder(ABACUS))
    with tempfile.TemporaryDirectory() as scratch:
        results = measure(write_importances(Path(scratch), options.random), exam, Path(scratch))
    print_tables(results)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {"problems": len(problems), "results": [asdict(result) for result in results]}
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
