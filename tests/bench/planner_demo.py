"""Predicted against measured speedup of the demo: `python tests/bench/planner_demo.py runs/demo/report.json`.

The parent with an FP8 cache gives two points: with its memory cap (as many sequences as it holds) and without (the
scenario's concurrency). They predict the child at the number that *it* holds; the report has what it reached.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from puzzle_trtllm.build.planner.two_points import Measured, fit_step_cost
from puzzle_trtllm.errors import PuzzleError


def predict(report: dict[str, dict[str, float]]) -> dict[str, float]:
    """Child over parent_fp8 in output tok/s, predicted and measured."""
    parent, child, concurrency = report["parent_fp8"], report["child"], int(report["scenario"]["concurrency"])
    held = [min(int(engine["sequences_held"]), concurrency) for engine in (parent, child)]
    cost = fit_step_cost(
        Measured(batch=held[0], tokens_per_s=parent["output_tokens_per_s"]),
        Measured(batch=concurrency, tokens_per_s=parent["uncapped_output_tokens_per_s"]),
    )
    predicted = cost.tokens_per_s(held[1]) / parent["output_tokens_per_s"]
    measured = child["output_tokens_per_s"] / parent["output_tokens_per_s"]
    return {
        "parent_sequences": held[0],
        "child_sequences": held[1],
        "fixed_ms": 1e3 * cost.fixed_s,
        "per_sequence_ms": 1e3 * cost.per_sequence_s,
        "predicted_speedup": predicted,
        "measured_speedup": measured,
        "error": predicted / measured - 1,
    }


if __name__ == "__main__":
    document = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    try:
        prediction = predict(document)
    except PuzzleError as error:
        sys.exit(f"{sys.argv[1]}: {error} (a busy machine?)")
    for name, value in prediction.items():
        print(f"{name:20} {value:.3g}")
