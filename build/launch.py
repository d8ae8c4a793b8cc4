"""`<engine>/launch/`: the command lines that start or measure the engine on a GPU host, ready to run.

    trtllm-serve.sh     OpenAI-compatible server of TensorRT-LLM itself
    trtllm-bench.sh     its throughput benchmark, on bench-dataset.jsonl at the scenario's lengths
    tritonserver.sh     Triton with this project's model repository
    environment.sh      what the engine's processes need in their environment; the scripts above read it
    bench-dataset.jsonl random token ids: {"task_id", "input_ids", "output_tokens"} a line

`env_overrides` in llm_args.yaml reaches the workers that `LLM` starts. Ranks that Slurm or mpirun started are not its
children, and all but the first never run a script of ours: whoever starts ranks reads environment.sh first.
Scripts find the engine from their own place: the folder may be moved. Arguments after the script's name are passed on.
"""

from __future__ import annotations

import json
import random
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from puzzle_trtllm.architecture import PuzzleArchitecture
from puzzle_trtllm.engine import LLM_ARGS_NAME, PLUGIN_FOLDER, EngineConfig
from puzzle_trtllm.scenario import Scenario
from puzzle_trtllm.text_tokens import random_text_ids

LAUNCH_FOLDER = "launch"
DATASET_NAME = "bench-dataset.jsonl"
ENVIRONMENT_NAME = "environment.sh"
MODEL_NAME = "openai/gpt-oss-120b"
"""trtllm-bench wants a hub name beside --model_path; it names the report's rows."""

_YAML_WINS = "llm_args.yaml wins over flags"
_PRECEDENCE = {"late": "flags given here win over llm_args.yaml"}
"""By target: a change of autumn 2026 that nobody announces at run time."""

_HEAD = """\
#!/bin/sh
# {purpose}
# By puzzle-trtllm build; further arguments are passed on.
set -eu
ENGINE=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
"""


def launch_scripts(
    config: EngineConfig, llm_args: Mapping[str, Any], scenario: Scenario, *, plugin: bool
) -> dict[str, str]:
    """File name: text, for every way to start this engine."""
    modules = [f'--custom_module_dirs "$ENGINE/{PLUGIN_FOLDER.as_posix()}"'] if plugin else []
    options = [
        f'--extra_llm_api_options "$ENGINE/{LLM_ARGS_NAME}"'
        if config.target == "1.2"
        else f'--config "$ENGINE/{LLM_ARGS_NAME}"'
    ]
    return {
        ENVIRONMENT_NAME: _environment(llm_args.get("env_overrides") or {}),
        "trtllm-serve.sh": _script(
            f"OpenAI-compatible server of TensorRT-LLM; {_PRECEDENCE.get(config.target, _YAML_WINS)}",
            ['trtllm-serve serve "$ENGINE/model"', "--backend pytorch", *modules, *options],
        ),
        "trtllm-bench.sh": _script(
            f"Throughput at scenario {scenario.name}: {scenario.input_tokens} in, {scenario.output_tokens} out",
            [
                f'trtllm-bench --model {MODEL_NAME} --model_path "$ENGINE/model"',
                "throughput",
                *_bench(llm_args, scenario, modules, options),
            ],
        ),
        "tritonserver.sh": _script(
            "Triton: gRPC 8001, HTTP 8000, metrics 8002, on this machine only (--host 0.0.0.0 opens them)",
            ['python3 -m puzzle_trtllm serve "$ENGINE"'],
        ),
    }


def write_launch_folder(
    engine: Path,
    architecture: PuzzleArchitecture,
    config: EngineConfig,
    llm_args: Mapping[str, Any],
    scenario: Scenario,
    *,
    plugin: bool,
) -> None:
    """Write scripts and dataset into the engine folder."""
    folder = engine / LAUNCH_FOLDER
    folder.mkdir()
    for name, text in launch_scripts(config, llm_args, scenario, plugin=plugin).items():
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o644 if name == ENVIRONMENT_NAME else 0o755)
    write_dataset(folder / DATASET_NAME, scenario, vocab_size=architecture.vocab_size)


def write_dataset(file: Path, scenario: Scenario, *, vocab_size: int) -> None:
    """`num_requests` prompts of random text tokens, the same at every build; unlike each other from the first token.

    Lengths scatter as the scenario says.
    """
    source = random.Random(0)
    with file.open("w", encoding="utf-8") as out:
        for task in range(scenario.num_requests):
            ways = ((scenario.input_tokens, scenario.input_spread), (scenario.output_tokens, scenario.output_spread))
            num_in, num_out = (mean if spread is None else spread.draw(mean, source) for mean, spread in ways)
            ids = random_text_ids(num_in, vocab_size=vocab_size, source=source)
            line = {"task_id": task, "input_ids": ids, "output_tokens": num_out}
            out.write(json.dumps(line, separators=(",", ":")) + "\n")


def _bench(llm_args: Mapping[str, Any], scenario: Scenario, modules: list[str], options: list[str]) -> list[str]:
    ranks = [f"--tp {llm_args['tensor_parallel_size']}"]
    if llm_args.get("moe_expert_parallel_size"):
        ranks.append(f"--ep {llm_args['moe_expert_parallel_size']}")
    return [
        "--backend pytorch",
        *modules,
        *options,
        " ".join(ranks),
        f"--max_batch_size {llm_args['max_batch_size']} --max_num_tokens {llm_args['max_num_tokens']}",
        f'--dataset "$ENGINE/{LAUNCH_FOLDER}/{DATASET_NAME}"',
        f"--concurrency {scenario.concurrency} --streaming",
    ]


def _environment(variables: Mapping[str, str]) -> str:
    head = "# env_overrides of llm_args.yaml, for ranks that are started from outside. By puzzle-trtllm build.\n"
    return head + "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())


def _script(purpose: str, parts: list[str]) -> str:
    environment = f'. "$ENGINE/{LAUNCH_FOLDER}/{ENVIRONMENT_NAME}"\n'
    return _HEAD.format(purpose=purpose) + environment + "exec " + " \\\n  ".join([*parts, '"$@"']) + "\n"
