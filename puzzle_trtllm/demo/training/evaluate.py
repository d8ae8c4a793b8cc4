"""Measure abacus: accuracy and tokens per effort for the parent and for children chosen in several ways.

    python -m puzzle_trtllm.demo.training.evaluate FOLDER [--problems N] [--json]

Every number of the model card comes from here. Decoding is greedy; computing is float32 on the stored values.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from puzzle_trtllm.demo.problems import EFFORTS
from puzzle_trtllm.demo.training import checkpoint, vocabulary
from puzzle_trtllm.demo.training.generate import generate
from puzzle_trtllm.demo.training.model import Abacus, Conditions
from puzzle_trtllm.demo.training.pruning import choose_dropped, first_votes
from puzzle_trtllm.serve.evaluate.answers import final_answer
from puzzle_trtllm.serve.evaluate.graders import grade_numeric
from puzzle_trtllm.serve.evaluate.problems import Problem, load_problems


@dataclass(frozen=True, kw_only=True)
class Score:
    """One effort's result over a problem set."""

    accuracy: float
    mean_output_tokens: float


def score(model: Abacus, problems: Sequence[Problem], effort: str, conditions: Conditions) -> Score:
    """Decode every problem at one effort and grade it."""
    prompts = [vocabulary.encode(vocabulary.prompt(problem.prompt, effort)) for problem in problems]
    outputs = generate(model, prompts, conditions)
    finals = [final_answer(vocabulary.decode(ids)) for ids in outputs]
    correct = sum(f is not None and grade_numeric(f, p.answer) for p, f in zip(problems, finals, strict=True))
    tokens = sum(len(ids) for ids in outputs)
    return Score(accuracy=correct / len(problems), mean_output_tokens=tokens / len(problems))


@torch.inference_mode()
def collect_routing(model: Abacus, records: Sequence[dict[str, object]]) -> list[Tensor]:
    """Router logits `[N, E]` of each layer over whole conversations (the calibration file's records)."""
    layers: list[list[Tensor]] = [[] for _ in range(model.dims.num_layers)]
    for record in records:
        routing: list[Tensor] = []
        tokens = torch.tensor([vocabulary.encode(conversation(record))])
        model(tokens, Conditions(windows=model.dims.windows, routing=routing))
        for layer, logits in zip(layers, routing, strict=True):
            layer.append(logits)
    return [torch.cat(parts) for parts in layers]


def conversation(record: dict[str, object]) -> str:
    """The text of one calibration record, as the chat template renders it."""
    user, assistant = record["messages"]  # type: ignore[misc]
    text = vocabulary.prompt(user["content"], str(record["reasoning_effort"]))  # type: ignore[has-type]
    return text + vocabulary.completion(assistant.get("thinking"), assistant["content"])  # type: ignore[has-type]


def variants(model: Abacus, routing: list[Tensor]) -> dict[str, Conditions]:
    """The parent, the child, its windows and experts alone, and what carelessness would give."""
    dims = model.dims
    parent = Conditions(windows=dims.windows)

    def without(how: str, seed: int = 0) -> Conditions:
        dropped = choose_dropped(how, routing, dims.child_experts, dims.top_k, seed)
        bias = torch.zeros(dropped.shape).masked_fill(dropped, float("-inf")).unsqueeze(1)
        return Conditions(windows=dims.child_windows, expert_bias=bias)

    no_full = tuple(dims.long_window if w is None else w for w in dims.windows)
    all_short = (dims.short_window,) * dims.num_layers
    return {
        "parent": parent,
        "child windows only": replace(parent, windows=dims.child_windows),
        "child (careful)": without("careful"),
        "random experts, seed 0": without("random", 0),
        "random experts, seed 1": without("random", 1),
        "random experts, seed 2": without("random", 2),
        "most used dropped": without("most_used"),
        "no full layer": replace(parent, windows=no_full),
        "all windows short": replace(parent, windows=all_short),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one row a variant, or with --json one object."""
    parser = argparse.ArgumentParser(prog="python -m puzzle_trtllm.demo.training.evaluate", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--problems", type=int, default=None, help="use only the first N problems")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(2)
    model = checkpoint.load(options.folder)
    problems = load_problems(options.folder / "problems.jsonl", limit=options.problems).problems
    lines = (options.folder / "calibration.jsonl").read_text(encoding="utf-8").splitlines()
    routing = collect_routing(model, [json.loads(line) for line in lines])
    results = {}
    for name, conditions in variants(model, routing).items():
        results[name] = {effort: vars(score(model, problems, effort, conditions)) for effort in EFFORTS}
        if not options.json:
            cells = (f"{s['accuracy']:7.1%} {s['mean_output_tokens']:6.1f} tok" for s in results[name].values())
            print(f"{name:24}", "  ".join(cells), flush=True)
    votes = [first_votes(logits, model.dims.top_k).tolist() for logits in routing]
    if options.json:
        print(json.dumps({"results": results, "votes": votes}))
    else:
        print("votes by layer:", *votes, sep="\n  ")


if __name__ == "__main__":
    main()
