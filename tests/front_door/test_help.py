"""`--help` answers at once because it imports nothing heavy, and every command shows an example."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache

import pytest
from typer.main import get_command

from puzzle_trtllm import __version__
from puzzle_trtllm.cli import app
from puzzle_trtllm.commands.front import ORDER
from tests.front_door.cli import invoke, run

HEAVY = ("torch", "transformers", "modelopt", "numpy", "tokenizers", "huggingface_hub", "yaml", "grpc", "tritonclient")
"""pydantic is not among them: typer itself imports it for some kinds of options."""
CALIBRATE = (("calibrate", "experts"), ("calibrate", "kv"))
COMMANDS = [*((name,) for name in ORDER if name != "calibrate"), *CALIBRATE]


@cache
def shown(command: tuple[str, ...]) -> tuple[int, str]:
    """Exit code and help of a command; it takes a while to draw, and several tests read it."""
    result = invoke(*command, "--help")
    return result.exit_code, result.stdout


@pytest.mark.parametrize("arguments", [("--help",), ("inspect", "--help"), ("calibrate", "kv", "--help")])
def test_help_imports_nothing_heavy(arguments: tuple[str, ...]) -> None:
    program = (
        "import json, sys\n"
        f"sys.argv = ['puzzle-trtllm', *{list(arguments)!r}]\n"
        "from puzzle_trtllm.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    code = end.code\n"
        "print(json.dumps([code, sorted({name.partition('.')[0] for name in sys.modules})]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    code, modules = json.loads(done.stdout.splitlines()[-1])
    assert code == 0
    assert "Usage: puzzle-trtllm" in done.stdout
    assert "typer" in modules  # the list is that of the process that showed the help
    assert set(modules).isdisjoint(HEAVY)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_shows_an_example_of_itself(command: tuple[str, ...]) -> None:
    code, text = shown(command)
    assert code == 0
    assert f"Example: puzzle-trtllm {' '.join(command)}" in " ".join(text.split())


def test_commands_are_listed_in_the_order_in_which_a_child_is_made() -> None:
    lines = [line.strip("│ ").split(" ")[0] for line in invoke("--help").stdout.splitlines()]
    assert [word for word in lines if word in ORDER] == list(ORDER)


def test_a_stranger_is_told_where_to_begin() -> None:
    text = " ".join(invoke("--help").stdout.split())
    assert "New here? `demo` runs everything on this machine, without a GPU; on a GPU host start with `doctor`" in text


def test_help_has_its_short_name_everywhere() -> None:
    for command in ((), ("calibrate",), *COMMANDS):
        result = invoke(*command, "-h")
        assert result.exit_code == 0
        assert shown(command) == (0, result.stdout)


def test_arguments_are_named_in_capitals_as_in_the_examples() -> None:
    group = get_command(app)
    commands = [inner for c in group.commands.values() for inner in getattr(c, "commands", {"": c}).values()]
    names = {p.metavar or p.name for c in commands for p in c.params if p.param_type_name == "argument"}
    assert names == {"ARCHITECTURE", "CHECKPOINT", "CHILD", "ENGINE", "OUT", "PARENT", "PATH", "PROMPT"}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_speaks_no_python(command: tuple[str, ...]) -> None:
    assert "list[" not in shown(command)[1]


def test_the_flags_are_frozen() -> None:
    """Scripts of users depend on them: adding one means adding it here, dropping one means a new major version."""
    group = get_command(app)
    found = {}
    for name, command in group.commands.items():
        for inner_name, inner in getattr(command, "commands", {"": command}).items():
            flags = {option for parameter in inner.params for option in parameter.opts if option.startswith("--")}
            found[f"{name} {inner_name}".strip()] = " ".join(sorted(flags))
    assert found == {
        "inspect": "--gpu --gpus --json --kv --seq-len",
        "plan": "--allocator --batch --compare --explain --gpu --gpus --isl --json --kv --memory-rule --osl --out "
        "--parallel --parent-kv",
        "derive": "--architecture --experts --importance --json --max-shard-bytes --overwrite",
        "verify": "--against --json",
        "calibrate experts": "--architecture --choices --column --dataset --dataset-config --dtype --effort --json "
        "--max-samples --max-tokens --overwrite --pack --removal --score --seed --sequence-length --split --stream",
        "calibrate kv": "--column --dataset --dataset-config --device --dtype --effort --exact --held-out --json "
        "--max-samples --max-tokens --overwrite --pack --quality --ranks --seed --seq-len --sequence-length --split "
        "--stream",
        "build": "--allow-unit-scale --config --explain --fold --json --overwrite --target",
        "repository": "--decoupled --gpu-device-ids --json --max-open-requests --overwrite --step-timeout",
        "serve": "--engine-cores --gpu-device-ids --grpc-cert --grpc-key --grpc-port --grpc-root-cert --host "
        "--http-port --json --max-open-requests --metrics-port --openai-model --openai-port --restart --restricted "
        "--secret --startup-timeout --step-timeout",
        "generate": "--ca-cert --client-cert --client-key --effort --json --max-tokens --secret --seed --stop "
        "--temperature --tokenizer --top-k --top-p --url",
        "bench": "--arrival --ca-cert --client-cert --client-key --concurrency --csv --engine --json "
        "--max-itl-ms --max-seconds --max-tpot-ms --max-ttft-ms --name --num-requests --out --request-rate --scenario "
        "--secret --seed --speed --sweep --tokenizer --trace --trace-block-tokens --trace-time-unit --url "
        "--warmup-requests --workers",
        "evaluate": "--answer-key --ca-cert --client-cert --client-key --concurrency --effort --engine --grader --json "
        "--limit --max-tokens --name --out --problems --prompt-key --secret --seed --temperature --tokenizer --top-p "
        "--url",
        "report": "--baseline --child --json --out --title",
        "doctor": "--engine --json --line --source",
        "demo": "--json --out --quick",
    }


def test_version_from_a_shell() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"puzzle-trtllm {__version__}\n")


def test_a_mistyped_option_is_the_users_error() -> None:
    result = invoke("inspect", "--seqlen", "3", "model")
    assert result.exit_code == 2
    assert "--seqlen" in result.stderr
