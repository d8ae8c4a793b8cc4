"""`python -m puzzle_trtllm.serve.acceptance slice | record | compare`. Exit codes: 0 same, 1 not, 2 user's error."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from puzzle_trtllm.errors import PuzzleError
from puzzle_trtllm.folders import check_writable
from puzzle_trtllm.serve.acceptance.comparison import compare
from puzzle_trtllm.serve.acceptance.recording import Recording, record


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the commands and return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        return {"slice": _slice, "record": _record, "compare": _compare}[options.command](options)
    except PuzzleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _slice(options: argparse.Namespace) -> int:
    from puzzle_trtllm.serve.acceptance.slicing import read_layers, slice_layers

    made = slice_layers(options.checkpoint, options.out, read_layers(options.layers))
    blocks = made.architecture.blocks
    experts = ", ".join(str(block.num_local_experts) for block in blocks)
    print(f"{made.path}: {len(blocks)} layers of {experts} experts, {made.weight_bytes / 2**30:.2f} GiB")
    return 0


def _record(options: argparse.Namespace) -> int:
    check_writable(options.out)
    texts = None
    if options.problems is not None:
        from puzzle_trtllm.serve.evaluate.problems import load_problems

        texts = [problem.prompt for problem in load_problems(options.problems, limit=options.limit).problems]
    recording = record(options.engine, texts=texts, max_tokens=options.max_tokens)
    recording.save(options.out)
    print(f"{options.out}: {len(recording.continuations)} continuations by {recording.runtime}")
    return 0


def _compare(options: argparse.Namespace) -> int:
    result = compare(Recording.load(options.a), Recording.load(options.b))
    print("prompt tokens | prompts | same first token | same text | common tokens | first logprob apart, max")
    for name, found in result.items():
        apart = "-" if found.max_logprob_difference is None else f"{found.max_logprob_difference:.4f}"
        print(
            f"{name:>13} | {found.num_prompts:7} | {found.same_first_token:16.1%} | {found.same_text:9.1%} | "
            f"{found.mean_common_tokens:13.1f} | {apart}"
        )
    accepted = result["all"].accepted(
        min_first_token=options.min_first_token, max_logprob_difference=options.max_logprob_difference
    )
    bounds = (
        f"{options.min_first_token:.0%} equal first tokens, log-probabilities within {options.max_logprob_difference}"
    )
    print(f"{'accepted' if accepted else 'NOT accepted'} (asked for: {bounds})")
    return 0 if accepted else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m puzzle_trtllm.serve.acceptance", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    slicing = commands.add_parser("slice", help="a few layers of a checkpoint as a small checkpoint of its own")
    slicing.add_argument("checkpoint", help="checkpoint folder or hub id")
    slicing.add_argument("out", help="folder to be made")
    slicing.add_argument("--layers", default="0,3,15,22", help="numbers in the source, in order (default 0,3,15,22)")
    recording = commands.add_parser("record", help="greedy continuations of fixed prompts by one engine")
    recording.add_argument("engine", help="engine folder; it is loaded here, without a server")
    recording.add_argument("out", help="JSON file to write")
    recording.add_argument("--problems", help="problem set (.jsonl) to take texts from; default: random token ids")
    recording.add_argument("--limit", type=int, help="only so many problems")
    recording.add_argument("--max-tokens", type=int, default=32, help="to generate for each prompt (default 32)")
    comparing = commands.add_parser("compare", help="two recordings; exit code 0 when they agree, else 1")
    comparing.add_argument("a", help="a file that `record` wrote")
    comparing.add_argument("b", help="that of the other engine")
    comparing.add_argument(
        "--min-first-token", type=float, default=0.95, help="share of equal first tokens (default 0.95)"
    )
    comparing.add_argument(
        "--max-logprob-difference", type=float, default=0.25, help="of an equal first token, nats (default 0.25)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
