"""The command line `puzzle-trtllm`: thin, every command is a documented Python function.

    inspect ─ plan ─ calibrate ─ derive ─ verify ─ build ─ repository ─ serve ─ generate ─ bench ─ evaluate ─
    report ─ doctor ─ demo

Results go to stdout, as tables or with `--json` as one JSON object on the last line; progress goes to stderr. The
commands live in `puzzle_trtllm.commands`; neither it nor this module imports anything heavy.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from puzzle_trtllm import __version__
from puzzle_trtllm.commands.benching import bench_command
from puzzle_trtllm.commands.calibrate import experts_command, kv_command
from puzzle_trtllm.commands.clients import evaluate_command, generate_command
from puzzle_trtllm.commands.doctor import doctor_command
from puzzle_trtllm.commands.engines import build_command, repository_command, serve_command
from puzzle_trtllm.commands.front import PuzzleCommand, PuzzleGroup
from puzzle_trtllm.commands.models import derive_command, inspect_command, verify_command
from puzzle_trtllm.commands.planning import plan_command
from puzzle_trtllm.commands.reporting import report_command
from puzzle_trtllm.commands.story import demo_command

app = typer.Typer(
    name="puzzle-trtllm",
    cls=PuzzleGroup,
    help="Take a Puzzle child architecture to a measured TensorRT-LLM deployment behind Triton Inference Server.",
    epilog="New here? `demo` runs everything on this machine, without a GPU; on a GPU host start with `doctor`. "
    "Exit codes: 0 done, 2 your error (one line; --debug shows the traceback), 1 ours (or `doctor`: not ready).",
    context_settings={"help_option_names": ["--help", "-h"]},
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
calibrate_app = typer.Typer(no_args_is_help=True, help="Learn from real prompts: expert importance, FP8 KV scales.")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"puzzle-trtllm {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere on the line.")
    ] = False,
) -> None:
    """Root options; `--debug` is taken out of the line by PuzzleGroup before it gets here."""


def _add(to: typer.Typer, name: str, command: Callable[..., None], example: str) -> None:
    to.command(name, cls=PuzzleCommand, epilog=f"Example: puzzle-trtllm {example}")(command)


_add(app, "inspect", inspect_command, "inspect openai/gpt-oss-120b --seq-len 8192 131072")
_add(app, "plan", plan_command, "plan CHILD --gpu h100-80gb --gpus 8 --isl 65536 --osl 65536")
_add(app, "derive", derive_command, "derive PARENT CHILD --architecture child.json --importance experts.safetensors")
_add(app, "verify", verify_command, "verify CHILD --against PARENT")
app.add_typer(calibrate_app, name="calibrate")
_add(calibrate_app, "experts", experts_command, "calibrate experts PARENT experts.safetensors --dataset chats.jsonl")
_add(calibrate_app, "kv", kv_command, "calibrate kv CHILD CHILD-FP8 --dataset chats.jsonl")
_add(app, "build", build_command, "build CHILD-FP8 ENGINE --config h100x1-long")
_add(app, "repository", repository_command, "repository ENGINE OUT --gpu-device-ids '0;1'")
_add(app, "serve", serve_command, "serve ENGINE")
_add(app, "generate", generate_command, "generate 12345+67890= --url localhost:8001 --tokenizer CHILD --effort high")
_add(app, "bench", bench_command, "bench --url localhost:8001 --scenario long --engine ENGINE --out child.json")
_add(app, "evaluate", evaluate_command, "evaluate --problems problems.jsonl --engine ENGINE --out child-eval.json")
_add(
    app,
    "report",
    report_command,
    "report --baseline parent=parent.json,parent-eval.json --child child.json,child-eval.json",
)
_add(app, "doctor", doctor_command, "doctor --engine ENGINE")
_add(app, "demo", demo_command, "demo --out runs/demo")


def main() -> None:
    """Run the command line of `sys.argv`."""
    # From Python 3.11 on, the processes that we start import nothing that happens to lie in the user's folder.
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    if isinstance(sys.stdout, io.TextIOWrapper):  # None where it is closed
        sys.stdout.reconfigure(errors="replace")  # a table with question marks is better than none
    app()
