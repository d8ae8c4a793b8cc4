"""Whatever a user does wrong ends in one line that names the place, exit code 2, and nothing half-written."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest

from puzzle_trtllm.calibration.tensor_file import write_tensors
from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.commands.clients import show_result
from puzzle_trtllm.commands.engines import next_steps
from puzzle_trtllm.engine import Engine
from puzzle_trtllm.errors import PuzzleError
from puzzle_trtllm.scenario import SCENARIO_FOLDER, load_scenario
from puzzle_trtllm.serve.evaluate import runner
from puzzle_trtllm.serve.evaluate.result import EvaluationResult
from puzzle_trtllm.serve.triton.security import GrpcTls
from tests.front_door.cli import ROOT, assert_user_error, invoke, last_json, run
from tests.serve.measurements import EMPTY_EVALUATION, family

MakeCheckpoint = Callable[..., Path]
BLOCKS = [(8, 16), (8, None)]
FREE_PORTS = ("--grpc-port", "0", "--http-port", "0", "--metrics-port", "0")


@pytest.fixture
def parent(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint(BLOCKS)


@pytest.fixture
def importance(parent: Path, tmp_path: Path) -> Path:
    return write_importance(parent, tmp_path / "importance.safetensors")


def write_importance(parent: Path, file: Path) -> Path:
    import numpy as np

    scores = {
        f"model.layers.{i}.mlp.experts.importance": np.arange(n, dtype=np.float32) for i, (n, _) in enumerate(BLOCKS)
    }
    write_tensors(file, scores, {"method": "test", "parent_fingerprint": Checkpoint.open(parent).fingerprint()})
    return file


def derive(parent: Path, importance: Path, out: Path, blocks: object) -> object:
    architecture = importance.with_name("architecture.json")
    architecture.write_text(json.dumps({"block_configs": blocks}), encoding="utf-8")
    return invoke("derive", parent, out, "--architecture", architecture, "--importance", importance)


def test_a_good_child_is_derived_and_verified(parent: Path, importance: Path, tmp_path: Path) -> None:
    """The counterpart of every failure below."""
    blocks = [{"num_local_experts": 4, "sliding_window": 16}, {"num_local_experts": 2, "sliding_window": 64}]
    derived = derive(parent, importance, tmp_path / "child", blocks)
    assert derived.exit_code == 0
    assert "next" in derived.stdout and "puzzle-trtllm calibrate kv" in derived.stdout
    result = invoke("verify", tmp_path / "child", "--against", parent, "--json")
    assert result.exit_code == 0
    assert last_json(result.stdout)["identical"] is True


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        ([(4, 16)], ("block_configs", "found 1, expected 2")),
        ([(0, 16), (4, None)], ("block_configs[0].num_local_experts", "found 0")),
        ([(4, 16), (9, None)], ("block_configs[1].num_local_experts", "found 9", "2 (top-k) to 8")),
        ([(1, 16), (4, None)], ("block_configs[0].num_local_experts", "found 1", "2 (top-k) to 8")),
        ([(4, 0), (4, None)], ("block_configs[0].sliding_window", "found 0")),
        ([(4, -5), (4, None)], ("block_configs[0].sliding_window", "found -5")),
        ([(4, "all"), (4, None)], ("block_configs[0].sliding_window", '"all"')),
    ],
)
def test_impossible_architectures(
    blocks: list[tuple[object, object]], words: tuple[str, ...], parent: Path, importance: Path, tmp_path: Path
) -> None:
    entries = [{"num_local_experts": experts, "sliding_window": window} for experts, window in blocks]
    before = set(tmp_path.iterdir())
    assert_user_error(derive(parent, importance, tmp_path / "child", entries), "architecture.json", *words)
    assert {path.name for path in set(tmp_path.iterdir()) - before} == {"architecture.json"}


def test_importance_of_another_model(parent: Path, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    other = write_importance(make_checkpoint(BLOCKS, seed=1), tmp_path / "other.safetensors")
    blocks = [{"num_local_experts": 4, "sliding_window": 16}] * 2
    assert_user_error(derive(parent, other, tmp_path / "child", blocks), "other.safetensors")
    assert not (tmp_path / "child").exists()


def truncate(folder: Path) -> None:
    shard = max(folder.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    os.truncate(shard, shard.stat().st_size - 100)


def remove_a_shard(folder: Path) -> None:
    max(folder.glob("*.safetensors")).unlink()


def rename_a_tensor(folder: Path) -> None:
    edit_header(folder, b"model.layers.0.self_attn.sinks", b"model.layers.0.self_attn.stink")


def change_a_shape(folder: Path) -> None:
    edit_header(folder, b'"shape":[8,64]', b'"shape":[64,8]')


def edit_header(folder: Path, old: bytes, new: bytes) -> None:
    """Replace equally long bytes in the header that holds `old`, and drop the index, which would notice first."""
    (folder / "model.safetensors.index.json").unlink()
    for shard in folder.glob("*.safetensors"):
        content = shard.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        if old in content[: 8 + length]:
            shard.write_bytes(content[: 8 + length].replace(old, new) + content[8 + length :])
            return
    raise AssertionError(f"no shard has {old!r}")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, (".safetensors", "truncated")),
        (remove_a_shard, ("missing shard",)),
        (rename_a_tensor, ("model.layers.0.self_attn.sinks", "missing tensor")),
        (change_a_shape, ("model.layers.0.mlp.router.weight", "BF16 [64, 8]", "BF16 [8, 64]")),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "build"])
def test_damaged_checkpoints(
    command: str, damage: Callable[[Path], None], words: tuple[str, ...], parent: Path, tmp_path: Path
) -> None:
    damage(parent)
    arguments = ["inspect", parent] if command == "inspect" else build_arguments(parent, tmp_path)
    assert_user_error(invoke(*arguments), *words)
    assert not (tmp_path / "engine").exists()


def build_arguments(checkpoint: Path, tmp_path: Path, **settings: object) -> list[str | Path]:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"runtime": "reference", **settings}), encoding="utf-8")
    return ["build", checkpoint, tmp_path / "engine", "--config", config]


def test_engine_configs_that_cannot_be(parent: Path, tmp_path: Path) -> None:
    assert_user_error(invoke("build", parent, tmp_path / "engine", "--config", "nope"), "nope", "cpu-demo")
    unknown = invoke(*build_arguments(parent, tmp_path, kv_type="fp8"))
    assert_user_error(unknown, "config.yaml: kv_type: unknown key", "kv_dtype")
    assert_user_error(invoke(*build_arguments(parent, tmp_path, kv_dtype="fp8")), "no KV scales")
    assert_user_error(invoke(*build_arguments(parent, tmp_path)[:2], "--config", "cpu-demo"), "OUT")
    assert not (tmp_path / "engine").exists()


def test_explain_needs_no_weights(parent: Path) -> None:
    result = invoke("build", parent / "config.json", "--config", "cpu-demo", "--explain", "--json")
    assert result.exit_code == 0, result.stderr
    value = last_json(result.stdout)
    assert value["llm_args"]["kv_cache_config"]["dtype"] == "fp8"  # as cpu-demo.yaml says
    assert "fp8" in value["reasons"]["kv_cache_config.dtype"]


def test_explain_takes_a_fold_as_build_does(tmp_path: Path) -> None:
    config = ROOT / "tests" / "data" / "gpt-oss-puzzle-88b.config.json"
    explain = ("build", config, "--explain", "--config")
    folded = invoke(*explain, "h100x1-long", "--fold", "none", "--allow-unit-scale")
    assert folded.exit_code == 0 and "runs at unit scale" in folded.stderr
    assert_user_error(invoke(*explain, "h100x1-long", "--fold", "none"), "h100x1-long: fold: ", "--allow-unit-scale")
    bf16 = tmp_path / "bf16.yaml"
    bf16.write_text("runtime: reference\n", encoding="utf-8")
    assert_user_error(invoke(*explain, bf16, "--fold", "tensor"), "bf16.yaml: kv_dtype: --fold needs an FP8 KV cache")


def test_explain_warns_as_build_does() -> None:
    config = ROOT / "tests" / "data" / "gpt-oss-puzzle-88b.config.json"
    result = invoke("build", config, "--config", "h100x1-long", "--explain")
    assert "warning: FP8 KV with attention sinks on Hopper is unverified" in result.stderr


@pytest.fixture
def engine(parent: Path, tmp_path: Path) -> Path:
    assert invoke(*build_arguments(parent, tmp_path)).exit_code == 0
    return tmp_path / "engine"


def test_what_is_there_is_not_replaced_unasked(engine: Path, parent: Path, tmp_path: Path) -> None:
    before = (engine / "engine.json").read_bytes()
    assert_user_error(invoke(*build_arguments(parent, tmp_path)), "not empty", "--overwrite")
    assert (engine / "engine.json").read_bytes() == before
    assert invoke(*build_arguments(parent, tmp_path), "--overwrite").exit_code == 0


def test_build_shows_the_limits_of_the_engine_and_the_next_step(parent: Path, tmp_path: Path) -> None:
    built = " ".join(invoke(*build_arguments(parent, tmp_path)).stdout.split())
    assert "max_batch_size" in built and "max_seq_len" in built
    assert "next │ puzzle-trtllm serve" in built


def test_serve_shows_how_to_try_and_to_measure_the_engine(engine: Path) -> None:
    (_, generate), (_, bench) = next_steps(Engine.open(engine), "h:1", tls=None, has_secret=False)
    assert generate == f"puzzle-trtllm generate PROMPT --url h:1 --tokenizer {engine}/model"
    assert bench == f"puzzle-trtllm bench --url h:1 --engine {engine} --scenario cpu-demo"
    secured = next_steps(Engine.open(engine), "h:1", tls=GrpcTls(cert=Path("c"), key=Path("k")), has_secret=True)
    assert all(command.endswith(" --ca-cert CA --secret FILE") for _, command in secured)


def test_what_is_shown_to_be_typed_can_be(parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path with a space in quotes, and a scenario's file by a path that holds in every folder."""
    folder = tmp_path / "a b"
    folder.mkdir()
    monkeypatch.chdir(folder)
    shutil.copy(SCENARIO_FOLDER / "cpu-short.yaml", "own.yaml")
    assert invoke(*build_arguments(parent, folder, scenario="own.yaml")).exit_code == 0
    monkeypatch.chdir("/")
    engine = Engine.open(folder / "engine")
    (_, generate), (_, bench) = next_steps(engine, "h:1", tls=None, has_secret=False)
    assert shlex.split(generate)[-1] == f"{folder}/engine/model"
    *_, measured, _, scenario = shlex.split(bench)
    assert measured == f"{folder}/engine" and load_scenario(scenario) == load_scenario("cpu-short")


@pytest.mark.parametrize(
    ("built_for", "asked", "measured"),
    [("cpu-short", (), "cpu-short"), ("cpu-short", ("--scenario", "cpu-long"), "cpu-long"), (None, (), "cpu-demo")],
)
def test_an_engine_is_measured_under_the_load_it_was_built_for(
    parent: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    built_for: str | None,
    asked: tuple[str, ...],
    measured: str,
) -> None:
    where = ("--tokenizer", parent)
    if built_for is not None:
        assert invoke(*build_arguments(parent, tmp_path, scenario=built_for)).exit_code == 0
        where = ("--engine", tmp_path / "engine")
    run_bench = Mock(side_effect=PuzzleError("no server"))
    monkeypatch.setattr("puzzle_trtllm.serve.bench.runner.run_bench", run_bench)
    assert_user_error(invoke("bench", *where, *asked), "no server")
    assert run_bench.call_args.kwargs["scenario"].name == measured


def test_a_port_in_use(engine: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert_user_error(run("serve", engine, *FREE_PORTS[2:], "--grpc-port", port), f"port {port} (gRPC) is in use")


def test_a_tritonserver_that_dies_at_start(engine: Path, tmp_path: Path) -> None:
    server = tmp_path / "bin" / "tritonserver"
    server.parent.mkdir()
    server.write_text("#!/bin/sh\necho the last words >&2\nexit 3\n", encoding="utf-8")
    server.chmod(server.stat().st_mode | stat.S_IXUSR)
    own = {"PATH": f"{server.parent}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}  # its log is kept there
    assert_user_error(run("serve", engine, *FREE_PORTS, env={**os.environ, **own}), "code 3", "the last words")


def test_no_engine_and_no_server(tmp_path: Path, engine: Path) -> None:
    assert_user_error(invoke("serve", tmp_path / "nothing"), "nothing/engine.json: missing")
    refused = run("generate", "hello", "--url", "127.0.0.1:1")
    assert_user_error(refused, "127.0.0.1:1", "Connection refused", "expected the gRPC host:port", "--ca-cert")
    assert_user_error(run("generate", "hello", "--url", "http://127.0.0.1:1"), "expected the gRPC host:port")
    assert_user_error(run("bench", "--url", "127.0.0.1:1", "--engine", engine), "127.0.0.1:1", "Connection refused")


def test_results_that_cannot_be_compared(tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text('{"kind": "shopping list"}', encoding="utf-8")
    assert_user_error(invoke("report", "--baseline", "parent", "--child", other), "--baseline", "found parent")
    assert_user_error(invoke("report", "--baseline", f"a={other}", "--child", other), "other.json", "shopping list")
    missing = tmp_path / "missing.json"
    assert_user_error(invoke("report", "--baseline", f"a={missing}", "--child", other), "missing.json")
    one = family()[0].save(tmp_path / "one.json")
    twice = invoke("report", "--baseline", f"a={one}", "--child", one, "--out", tmp_path / "report")
    assert_user_error(twice, "one.json: the same file for two engines (found a and child)")
    assert not (tmp_path / "report").exists()


def test_a_result_file_that_cannot_be_written_is_told_before_anything_is_measured(parent: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    out, measured = tmp_path / "file" / "out.json", ("--url", "127.0.0.1:1", "--tokenizer", parent)
    for command in (("evaluate", "--problems", "x.jsonl"), ("bench",)):
        assert_user_error(invoke(*command, *measured, "--out", out), "out.json: cannot be written: Not a directory")
    sweep = ("bench", "--sweep", "1", "--csv", tmp_path)
    assert_user_error(invoke(*sweep, *measured), "cannot be written: Is a directory")


def test_an_evaluation_that_fails_late_shows_and_saves_what_it_has(tmp_path: Path) -> None:
    out = tmp_path / "evaluation.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            runner, "evaluate", Mock(side_effect=runner.UnfinishedEvaluationError("the engine died", EMPTY_EVALUATION))
        )
        result = invoke("evaluate", "--problems", "x.jsonl", "--tokenizer", tmp_path, "--out", out)
    assert result.exit_code == 2
    assert "toy: accuracy by reasoning effort" in result.stdout
    assert result.stderr.splitlines()[-1] == "error: the engine died"
    assert EvaluationResult.load(out) == EMPTY_EVALUATION


def test_numbers_are_shown_even_if_their_file_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = Mock(model_dump=lambda mode: {"measured": 1}, save=Mock(side_effect=PuzzleError("disk full")))
    with pytest.raises(PuzzleError, match="disk full"):
        show_result(result, tmp_path / "out.json", as_json=True)
    assert capsys.readouterr().out == '{"measured": 1}\n'


def test_two_servers_at_one_port_are_told_before_the_engine_is_loaded(tmp_path: Path) -> None:
    ports = ("--http-port", "8123", "--openai-port", "8123")
    assert_user_error(invoke("serve", tmp_path, *ports), "--openai-port: the same as --http-port (found 8123")


def test_engine_cores_that_cannot_be_had_are_told_before_the_engine_is_loaded(engine: Path) -> None:
    for cores, words in (("x", "not a list of cores (found 'x'"), ("0-4095", "no such cores here")):
        assert_user_error(invoke("serve", engine, *FREE_PORTS, "--engine-cores", cores), words)
    ours = ",".join(map(str, os.sched_getaffinity(0)))
    assert_user_error(invoke("serve", engine, *FREE_PORTS, "--engine-cores", ours), "leaves no core to the server")


def test_an_empty_value_is_neither_one_that_was_left_out_nor_the_current_folder(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--gpu "$GPU"` with GPU unset would plan for the default one; OUT would replace the folder one stands in."""
    plan = ("plan", parent, "--isl", "64", "--osl", "64")
    assert_user_error(invoke(*plan, "--gpu", ""), "--gpu: is empty")
    assert_user_error(invoke(*plan, "--parallel="), "--parallel: is empty")
    build = build_arguments(parent, tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "notes.txt").touch()
    monkeypatch.chdir(tmp_path / "here")
    assert_user_error(invoke(*build[:2], "", *build[3:], "--overwrite"), "OUT: is empty")
    assert_user_error(invoke("report", "--baseline", "a=b,,c", "--child", "d"), "--baseline: names no file")
    assert_user_error(invoke("report", "--baseline", "a=b", "--child", "c", "--out", ""), "--out: is empty")
    assert_user_error(invoke("calibrate", "kv", "", tmp_path / "out"), "CHECKPOINT: is empty")
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["notes.txt"]


def test_a_trace_is_not_replaced_by_what_was_measured_with_it(parent: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"input_length": 3, "output_length": 1, "timestamp": 0}\n', encoding="utf-8")
    bench = ("bench", "--url", "127.0.0.1:1", "--tokenizer", parent, "--trace", trace, "--out", trace)
    assert_user_error(invoke(*bench), "--out: would replace the trace", "trace.jsonl")


def test_a_result_replaces_neither_the_scenario_nor_another_result(parent: Path, tmp_path: Path) -> None:
    scenario = tmp_path / "mine.yaml"
    scenario.write_text(
        "name: x\ninput_tokens: 1\noutput_tokens: 1\nconcurrency: 1\nnum_requests: 1\n", encoding="utf-8"
    )
    bench = ("bench", "--url", "127.0.0.1:1", "--tokenizer", parent, "--scenario", scenario)
    assert_user_error(invoke(*bench, "--out", scenario), "--out: would replace the scenario", "mine.yaml")
    one = tmp_path / "one"
    assert_user_error(invoke(*bench, "--sweep", "1", "--out", one, "--csv", one), "--csv: would replace --out")


def test_options_that_need_another() -> None:
    assert_user_error(invoke("generate", "hello", "--effort", "low"), "--effort", "--tokenizer")
    assert_user_error(invoke("evaluate", "--problems", "x.jsonl"), "--tokenizer", "--engine")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--temperature", "inf"), "decoding: temperature: "),
        (("--temperature", "1", "--top-p", "0"), "decoding: top_p: "),
        (("--top-p", "0.9"), "temperature 0 is greedy: top_p and seed would change nothing"),
        (("--seed", "3"), "temperature 0 is greedy"),
    ],
)
def test_a_decoding_that_is_none(tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    assert_user_error(invoke("evaluate", "--problems", "x.jsonl", "--tokenizer", tmp_path, *options), words)
