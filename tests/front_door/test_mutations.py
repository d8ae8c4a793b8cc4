"""Every key of every file that a user may have edited, turned into something else, is used or refused in one line.

A value may be as good as the one before (an unused key, another seed); what must not happen is a traceback, a line that
does not say which file, or a result that is half there.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from puzzle_trtllm.build.derive import derive
from puzzle_trtllm.build.engine_build import build_engine
from puzzle_trtllm.build.verify import verify
from puzzle_trtllm.calibration.tensor_file import write_tensors
from puzzle_trtllm.commands.front import explain
from puzzle_trtllm.engine import Engine, load_engine_config
from puzzle_trtllm.inspection import inspect
from puzzle_trtllm.scenario import load_any_scenario
from puzzle_trtllm.serve.evaluate.problems import load_problems
from puzzle_trtllm.serve.openai.model_card import ModelCard
from puzzle_trtllm.serve.report.files import load_measurement
from puzzle_trtllm.trace import read_trace
from tests.serve.measurements import family
from tests.toys import toy_architecture, write_toy_checkpoint

MISSING = object()
VALUES = (MISSING, None, "", "NaN", "x" * 1000, 0, -1, 10**30, 0.5, float("nan"), True, [], [None], {"a": 1})
DAMAGE = (b"", b"\xff\xfe{", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b"\0" * 9, b"null", b"[1]", b'"text"')
BLOCKS = [(4, 16), (4, None)]
CHILD_BLOCKS = [{"num_local_experts": 2, "sliding_window": 16}, {"num_local_experts": 3, "sliding_window": 64}]
SCENARIO = {"name": "s", "input_tokens": 8, "output_tokens": 8, "concurrency": 2, "num_requests": 4}
CONFIG = {"runtime": "reference", "kv_dtype": "fp8", "memory_bytes": 3_000_000, "llm_args": {"max_batch_size": 4}}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One valid file or folder of every kind."""
    import numpy as np

    folder = tmp_path_factory.mktemp("mutations")
    parent = write_toy_checkpoint(folder / "parent", toy_architecture(BLOCKS), kv_scales=[(0.5, 0.5)] * 2)
    scores = {f"model.layers.{i}.mlp.experts.importance": np.arange(4, dtype=np.float32) for i in range(2)}
    write_tensors(folder / "importance.safetensors", scores, {})
    write(folder / "architecture.json", {"block_configs": CHILD_BLOCKS})
    write(folder / "scenario.yaml", SCENARIO)
    write(folder / "config.yaml", {**CONFIG, "scenario": str(folder / "scenario.yaml")})
    write(folder / "trace.jsonl", {"timestamp": 1, "input_length": 3, "output_length": 2, "hash_ids": [7]})
    write(folder / "problems.jsonl", {"id": "a", "prompt": "1+1=", "answer": "2"})
    family()[0].save(folder / "measurement.json")
    make_child(folder).rename(folder / "child")
    build_engine(parent, folder / "engine", config=folder / "config.yaml")
    return folder


def write(file: Path, value: object) -> None:
    dump = yaml.safe_dump if file.suffix == ".yaml" else json.dumps
    file.write_text(dump(value), encoding="utf-8")


def make_child(stage: Path) -> Path:
    parent, importance = stage / "parent", stage / "importance.safetensors"
    derive(parent, stage / "out", architecture=stage / "architecture.json", importance=importance)
    return stage / "out"


def build(stage: Path) -> None:
    build_engine(stage / "parent", stage / "out", config=stage / "config.yaml")


def open_engine(stage: Path) -> None:
    card = ModelCard.of_engine(Engine.open(stage / "engine"))
    card.tokenizer.template_takes("reasoning_effort")


CASES: dict[str, Callable[[Path], object]] = {
    "parent/config.json": lambda stage: inspect(stage / "parent"),
    "parent/generation_config.json": build,
    "parent/model.safetensors.index.json": lambda stage: inspect(stage / "parent" / "config.json"),
    "architecture.json": make_child,
    "child/derivation.json": lambda stage: verify(stage / "child", against=stage / "parent"),
    "config.yaml": lambda stage: load_engine_config(stage / "config.yaml"),
    "scenario.yaml": lambda stage: load_any_scenario(stage / "scenario.yaml"),
    "engine/engine.json": lambda stage: Engine.open(stage / "engine"),
    "engine/llm_args.yaml": open_engine,
    "engine/model/generation_config.json": open_engine,
    "engine/model/tokenizer_config.json": open_engine,
    "trace.jsonl": lambda stage: read_trace(stage / "trace.jsonl"),
    "problems.jsonl": lambda stage: load_problems(stage / "problems.jsonl"),
    "measurement.json": lambda stage: load_measurement("toy", [stage / "measurement.json"]),
}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key at any depth; of a list the first entry."""
    inner = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, part in inner:
        yield (*path, key)
        yield from places(part, (*path, key))


def changed(value: Any, place: tuple[Any, ...], new: object) -> Any:
    value = copy.deepcopy(value)
    holder = value
    for key in place[:-1]:
        holder = holder[key]
    if new is MISSING:
        del holder[place[-1]]
    else:
        holder[place[-1]] = new
    return value


def attempt(stage: Path, file: Path, use: Callable[[Path], object], what: str) -> None:
    try:
        use(stage)
    except Exception as error:
        line = explain(error)
        assert line is not None, f"{what}: {error!r}"
        assert str(file.parent) in line, f"{what}: {line}"
        assert len(line) < 1500, f"{what}: {line}"
        assert not list(stage.glob("*out*")), f"{what}: left behind"
    finally:
        shutil.rmtree(stage / "out", ignore_errors=True)


@pytest.mark.parametrize("name", CASES)
def test_no_value_anywhere_is_a_traceback(stage: Path, name: str) -> None:
    file, use = stage / name, CASES[name]
    content = file.read_bytes()
    value = yaml.safe_load(content)
    try:
        for place in places(value):
            for new in VALUES:
                write(file, changed(value, place, new))
                attempt(stage, file, use, f"{'.'.join(map(str, place))} = {str(new)[:40]}")
        for damage in (*DAMAGE, content[: len(content) // 2], b"\xef\xbb\xbf" + content):
            file.write_bytes(damage)
            attempt(stage, file, use, f"damage {damage[:20]!r}")
    finally:
        file.write_bytes(content)
