"""The shipped data: held-out problems, and held-out conversations of the training distribution for calibration."""

from __future__ import annotations

import json
import random
from pathlib import Path

from puzzle_trtllm.demo import problems

NUM_PROBLEMS = 256
NUM_CALIBRATION = 256


def _distinct_operands(split: str, count: int, seed: int) -> list[tuple[int, int]]:
    rng = random.Random(f"{split} {seed}")
    found: dict[tuple[int, int], None] = {}
    while len(found) < count:
        digits = rng.randint(problems.MIN_DIGITS, problems.MAX_DIGITS)
        found[problems.sample_operands(rng, split, digits)] = None
    return list(found)


def problem_records(seed: int) -> list[dict[str, str]]:
    """Lines of problems.jsonl: id, prompt, answer."""
    pairs = _distinct_operands("problems", NUM_PROBLEMS, seed)
    return [
        {"id": f"add-{number:03d}", "prompt": problems.prompt_text(a, b), "answer": str(a + b)}
        for number, (a, b) in enumerate(pairs)
    ]


def calibration_records(seed: int) -> list[dict[str, object]]:
    """Lines of calibration.jsonl: a conversation with its full trace, the efforts in turn."""
    records: list[dict[str, object]] = []
    for number, (a, b) in enumerate(_distinct_operands("calibration", NUM_CALIBRATION, seed)):
        effort = problems.EFFORTS[number % len(problems.EFFORTS)]
        thinking, answer = problems.reasoning_trace(a, b, effort)
        assistant = {"role": "assistant", "content": answer}
        if thinking is not None:
            assistant = {"role": "assistant", "thinking": thinking, "content": answer}
        messages = [{"role": "user", "content": problems.prompt_text(a, b)}, assistant]
        records.append({"messages": messages, "reasoning_effort": effort})
    return records


def write(folder: Path, seed: int) -> None:
    """Write problems.jsonl and calibration.jsonl."""
    for name, records in (("problems", problem_records(seed)), ("calibration", calibration_records(seed))):
        lines = (json.dumps(record) for record in records)
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
