"""lm-evaluation-harness against `serve --openai-port`, beside our own `evaluate` on the same problems.

    python3 -m venv /tmp/lm-eval && /tmp/lm-eval/bin/pip install 'lm_eval[api]'
    .venv/bin/python tests/bench/lm_eval_front.py --lm-eval /tmp/lm-eval/bin/lm_eval --engine runs/demo/engines/child

Two tasks of its own, made from the demo's problems: one through /v1/chat/completions, at each reasoning effort, one
through /v1/completions with the rendered prompt as text, at high effort. Both decode greedily, so the accuracies have
to equal those of `evaluate`; a difference is printed as one, and the exit code is 1. Tasks that need log-probabilities
(multiple choice) are not possible: the front refuses them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from puzzle_trtllm.chat import ChatTokenizer
from puzzle_trtllm.demo.story import ABACUS
from puzzle_trtllm.engine import Engine
from puzzle_trtllm.serve.evaluate.runner import evaluate
from puzzle_trtllm.serve.openai.process import OpenAiFront
from puzzle_trtllm.serve.triton.server import TritonServer

EFFORTS = ("low", "medium", "high")
MAX_TOKENS = 200


def write_tasks(folder: Path, problems: Path, chat: ChatTokenizer, limit: int) -> None:
    """A data file with the rendered prompt beside each problem, and a task for each endpoint."""
    records = [json.loads(line) for line in problems.read_text().splitlines()[:limit]]
    for record in records:
        user = [{"role": "user", "content": record["prompt"]}]
        record["rendered"] = chat.render_chat(user, reasoning_effort="high")
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    common: dict[str, Any] = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": MAX_TOKENS, "do_sample": False, "temperature": 0},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    chat_task = {"task": "abacus_chat", "doc_to_text": "{{prompt}}"}
    # Text of /v1/completions has lost its special tokens: the answer stands behind the word `final`.
    steps = [{"function": "regex", "regex_pattern": r"final(\d+)"}, {"function": "take_first"}]
    last = {"name": "final", "filter": steps}
    text_task = {"task": "abacus_text", "doc_to_text": "{{rendered}}", "filter_list": [last]}
    for task in (chat_task, text_task):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(common | task, sort_keys=False))


def run_lm_eval(command: Path, folder: Path, task: str, url: str, model: str, effort: str) -> float:
    """exact_match of one task."""
    chat = task == "abacus_chat"
    endpoint = "chat/completions" if chat else "completions"
    arguments = f"model={model},base_url={url}/{endpoint},num_concurrent=8,max_retries=1,"
    arguments += "tokenized_requests=False,tokenizer_backend=None"
    out = folder / f"out-{task}-{effort}"
    line = [
        str(command),
        "--model",
        "local-chat-completions" if chat else "local-completions",
        "--model_args",
        arguments,
    ]
    line += ["--tasks", task, "--include_path", str(folder), "--output_path", str(out), "--batch_size", "1"]
    line += ["--apply_chat_template", "--gen_kwargs", f"reasoning_effort={effort}"] if chat else []
    environment = {**os.environ, "OPENAI_API_KEY": "-", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    found = sorted(out.rglob("results_*.json"))
    if done.returncode or not found:
        sys.exit(f"{' '.join(line)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    results = json.loads(found[-1].read_text())["results"][task]
    return float(next(value for key, value in results.items() if key.startswith("exact_match,")))


def main() -> int:
    """Print one row a task and effort."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm-eval", type=Path, required=True, help="the lm_eval command of another environment")
    parser.add_argument("--engine", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=64, help="problems")
    options = parser.parse_args()
    engine = Engine.open(options.engine)
    chat = ChatTokenizer.from_folder(engine.model_path)
    differences = 0
    with tempfile.TemporaryDirectory() as scratch, TritonServer(engine) as server:
        front = OpenAiFront()
        front.start(server)
        try:
            folder = Path(scratch)
            write_tasks(folder, ABACUS / "problems.jsonl", chat, options.limit)
            ours = evaluate(
                server.grpc_url, problems=ABACUS / "problems.jsonl", tokenizer_folder=engine.model_path,
                concurrency=8, max_tokens=MAX_TOKENS, limit=options.limit, quiet=True,
            )  # fmt: skip
            print(f"{options.limit} problems: task, effort, lm_eval, evaluate")
            for task, effort in [*(("abacus_chat", effort) for effort in EFFORTS), ("abacus_text", "high")]:
                theirs = run_lm_eval(options.lm_eval, folder, task, front.url, engine.path.name, effort)
                own = ours.efforts[effort].accuracy
                same = abs(theirs - own) < 1e-9
                differences += not same
                print(f"{task}  {effort:6}  {theirs:.4f}  {own:.4f}{'' if same else '  DIFFERENT'}", flush=True)
        finally:
            front.stop()
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
