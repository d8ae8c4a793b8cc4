"""The layerwise stream: the plain path's results to the bit, less memory, and going on after a kill."""

from __future__ import annotations

import gc
import json
import shutil
import signal
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from puzzle_trtllm import demo
from puzzle_trtllm.calibration import layer_stream, memory
from puzzle_trtllm.calibration.experts import calibrate_experts
from puzzle_trtllm.calibration.kv import calibrate_kv
from puzzle_trtllm.calibration.memory import dequantized_bytes, should_stream
from puzzle_trtllm.calibration.one_layer import embed, load_layer
from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.errors import CalibrationError, PuzzleError
from puzzle_trtllm.models.huggingface.loading import load_causal_lm
from tests.calibration.fork_server import FORK_SERVER, stream_until_killed
from tests.toys import write_overrides_by_layer

CHILD = [(6, 5), (4, None), (3, 17), (4, 5)]
PARENT = [(4, 6), (4, None), (4, 6)]
ABACUS = Path(demo.__file__).parent / "abacus"
DTYPES = [torch.float32, torch.bfloat16]


def with_data(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    lines = [json.dumps({"input_ids": rng.integers(7, 90, 20 + i % 5).tolist()}) for i in range(12)]
    (folder / "calibration.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module", params=[CHILD, PARENT], ids=["child", "parent"])
def folder(request, make_checkpoint) -> Path:
    return with_data(make_checkpoint(request.param, seed=2))


@pytest.fixture(scope="module")
def overridden(make_checkpoint) -> Path:
    folder = make_checkpoint(CHILD, seed=2)
    write_overrides_by_layer(folder)
    return folder


@pytest.fixture(scope="module")
def child(make_checkpoint) -> Path:
    return with_data(make_checkpoint(CHILD, seed=2))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's bytes; the report without the name of the folder that it is in."""
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert "kv_report.html" in files
    report = json.loads(files.pop("kv_report.json"))
    assert report.pop("out") == str(folder)
    return {**files, "kv_report.json": json.dumps(report).encode()}


# -- the same values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_one_by_one_are_the_model(folder, dtype):
    check_layers_one_by_one(Checkpoint.open(folder), dtype)


def test_layers_with_overrides_of_their_own_are_the_model(overridden):
    check_layers_one_by_one(Checkpoint.open(overridden), torch.float32)


@torch.no_grad()
def check_layers_one_by_one(source: Checkpoint, dtype: torch.dtype) -> None:
    model, ids = load_causal_lm(source, dtype=dtype), torch.randint(7, 90, (2, 40))
    hidden, outputs = embed(source, ids, dtype=dtype), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, arguments, output: outputs.append(output))
    model.model(input_ids=ids, use_cache=False)
    for i, expected in enumerate(outputs):
        hidden = load_layer(source, i, dtype=dtype).model(inputs_embeds=hidden, use_cache=False).last_hidden_state
        assert hidden.dtype == dtype
        assert torch.equal(hidden, expected), i


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_calibrated_checkpoint_is_the_plain_runs_byte_for_byte(folder, tmp_path, dtype, exact):
    calibrate_kv(folder, tmp_path / "plain", dtype=dtype, exact=exact, stream=False)
    calibrate_kv(folder, tmp_path / "stream", dtype=dtype, exact=exact, stream=True)
    assert contents(tmp_path / "stream") == contents(tmp_path / "plain")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["plain", "stream"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_micro_batches(folder, tmp_path, dtype, monkeypatch):
    """Sequences of five lengths in batches of at most 50 tokens: hidden states of many shapes in one file."""
    monkeypatch.setattr("puzzle_trtllm.calibration.forward.MAX_TOKENS_PER_BATCH", 50)
    monkeypatch.setattr(layer_stream, "MAX_TOKENS_PER_BATCH", 50)
    calibrate_kv(folder, tmp_path / "plain", dtype=dtype, stream=False)
    calibrate_kv(folder, tmp_path / "stream", dtype=dtype, stream=True)
    assert contents(tmp_path / "stream") == contents(tmp_path / "plain")


@pytest.mark.parametrize("removal", ["one-shot", "iterative"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expert_importance_is_the_plain_runs_byte_for_byte(folder, tmp_path, dtype, removal):
    """All scores are in the file, so all are compared."""
    for name, stream in (("plain", False), ("stream", True)):
        calibrate_experts(folder, tmp_path / name, score="output-error", removal=removal, dtype=dtype, stream=stream)
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "stream").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["plain", "stream"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_abacus(tmp_path, dtype):
    for name, stream in (("plain", False), ("stream", True)):
        calibrate_kv(ABACUS, tmp_path / name, max_samples=24, dtype=dtype, stream=stream)
        calibrate_experts(ABACUS, tmp_path / f"{name}.st", max_samples=24, dtype=dtype, stream=stream)
    assert contents(tmp_path / "stream") == contents(tmp_path / "plain")
    assert (tmp_path / "plain.st").read_bytes() == (tmp_path / "stream.st").read_bytes()


def test_a_source_that_has_scales_streams_too(make_checkpoint, tmp_path):
    folder = with_data(make_checkpoint(CHILD, seed=2, kv_scales=[(8.0, 4.0)] * 4))
    for name, stream in (("plain", False), ("stream", True)):
        calibrate_kv(folder, tmp_path / name, stream=stream, overwrite=True)
    assert contents(tmp_path / "stream") == contents(tmp_path / "plain")


# -- memory ------------------------------------------------------------------------------------------------------------


def test_one_layer_is_held_at_a_time(child, tmp_path, monkeypatch):
    """Models hold themselves in cycles, which only the collector ends; and it is as it was afterwards."""
    layers: list[weakref.ref] = []

    def load(*arguments, **options):
        assert [layer for layer in layers if layer() is not None] == []
        model = load_layer(*arguments, **options)
        layers.append(weakref.ref(model))
        return model

    monkeypatch.setattr(layer_stream, "load_layer", load)
    frozen = gc.get_freeze_count()
    calibrate_kv(child, tmp_path / "out", stream=True)
    assert len(layers) == len(CHILD)
    assert gc.get_freeze_count() == frozen


# -- after a kill ------------------------------------------------------------------------------------------------------

STORES = ("bf16", "unit", "calibrated", "channel")


def kill(child: Path, out: Path, file: str, batch: int, *, stage: str = "kv") -> set[str]:
    """What a process leaves that is killed as it reads this micro-batch."""
    process = FORK_SERVER.Process(target=stream_until_killed, args=(stage, child, out, file, batch))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not out.exists()
    return {file.name for file in (out.parent / f".{out.name}.stream.partial-resumable").iterdir()}


@pytest.fixture(scope="module")
def plain(child, tmp_path_factory) -> dict[str, bytes]:
    """What nobody disturbs, with all layers in memory."""
    out = tmp_path_factory.mktemp("plain") / "out"
    calibrate_kv(child, out, stream=False)
    return contents(out)


@pytest.fixture(scope="module")
def killed_once(child, tmp_path_factory) -> Path:
    """What is left of a process that died in layer 2, after its first micro-batch."""
    out = tmp_path_factory.mktemp("killed") / "out"
    left = kill(child, out, "hidden-002", 1)
    inputs = {"hidden-002", *(f"hidden-002-{store}" for store in STORES)}
    assert left == {"job.json", "layer-000.st", "layer-001.st", "hidden-003.partial", *inputs}
    return out.parent / ".out.stream.partial-resumable"


@pytest.fixture
def killed(killed_once, tmp_path) -> Path:
    """`tmp_path / "out"`, beside which it died."""
    shutil.copytree(killed_once, tmp_path / killed_once.name)
    return tmp_path / "out"


@pytest.fixture
def visited(monkeypatch) -> list[int]:
    """The layers that were read."""
    layers: list[int] = []

    def load(source, layer, *, dtype, device):
        layers.append(layer)
        return load_layer(source, layer, dtype=dtype, device=device)

    monkeypatch.setattr(layer_stream, "load_layer", load)
    return layers


def test_the_same_job_goes_on_where_it_was(child, plain, killed, visited):
    calibrate_kv(child, killed, stream=True)
    assert visited == [2, 3]
    assert contents(killed) == plain
    assert [file.name for file in killed.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(("file", "resumed"), [("hidden-001-calibrated", [1, 2, 3]), ("hidden-004-bf16", [])])
def test_killed_in_held_out_text_it_goes_on_too(child, plain, tmp_path, visited, file, resumed):
    kill(child, tmp_path / "out", file, 0)
    calibrate_kv(child, tmp_path / "out", stream=True)
    assert visited == resumed
    assert contents(tmp_path / "out") == plain


@pytest.mark.parametrize("options", [{"exact": True}, {"held_out": 2}, {"quality": False}], ids=str)
def test_other_scales_or_other_held_out_text_is_another_job(child, killed, visited, options):
    calibrate_kv(child, killed, stream=True, **options)
    assert visited == [0, 1, 2, 3]


def test_another_job_starts_over(child, killed, visited):
    calibrate_kv(child, killed, stream=True, max_samples=5)
    assert visited == [0, 1, 2, 3]
    calibrate_kv(child, killed.with_name("plain"), stream=False, max_samples=5)
    assert contents(killed) == contents(killed.with_name("plain"))


def test_results_without_the_next_input_start_over(child, killed, visited):
    (killed.parent / ".out.stream.partial-resumable" / "hidden-002").unlink()
    calibrate_kv(child, killed, stream=True)
    assert visited == [0, 1, 2, 3]


def test_expert_importance_goes_on_too(child, tmp_path, visited):
    kill(child, tmp_path / "i.st", "hidden-002", 1, stage="experts")
    assert [file.name for file in tmp_path.iterdir()] == [".i.st.stream.partial-resumable"]
    calibrate_experts(child, tmp_path / "i.st", stream=True)
    assert visited == [2, 3]
    calibrate_experts(child, tmp_path / "plain", stream=False)
    assert (tmp_path / "i.st").read_bytes() == (tmp_path / "plain").read_bytes()


def test_importance_by_another_score_starts_over(child, tmp_path, visited, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)  # as if killed: nothing is tidied up
    monkeypatch.setattr("puzzle_trtllm.calibration.experts._write", interrupted)
    for score in ("votes", "reap"):
        with pytest.raises(KeyboardInterrupt):
            calibrate_experts(child, tmp_path / "i.st", score=score, stream=True)
    assert visited == [0, 1, 2, 3] * 2


# -- failures that the process lives to see ----------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_the_layer(make_checkpoint, tmp_path, value):
    folder = with_data(make_checkpoint(CHILD, seed=2))
    bias = Checkpoint.open(folder).entry("model.layers.2.self_attn.v_proj.bias")
    with bias.file.open("r+b") as stream:
        stream.seek(bias.offset)
        stream.write((np.array([value], dtype=np.float32).view(np.uint32) >> 16).astype("<u2").tobytes())
    with pytest.raises(CalibrationError, match=r"model\.layers\.2\.self_attn \(V\): activations are not finite"):
        calibrate_kv(folder, tmp_path / "out", stream=True)
    with pytest.raises(CalibrationError, match=r"model\.layers\.2"):
        calibrate_experts(folder, tmp_path / "out.st", stream=True)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line_and_leaves_nothing(child, tmp_path, monkeypatch):
    def full(self, model, name, output):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(layer_stream._LayerPass, "_run", full)
    with pytest.raises(PuzzleError, match="No space left on device"):
        calibrate_kv(child, tmp_path / "out", stream=True)
    assert not list(tmp_path.iterdir())


def test_progress_is_on_stderr(child, tmp_path, capfd):
    calibrate_kv(child, tmp_path / "out", stream=True, quiet=False)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "layer by layer" in printed.err


# -- which path --------------------------------------------------------------------------------------------------------


def test_the_dequantized_size_is_the_loaded_models(folder):
    source = Checkpoint.open(folder)
    for dtype in DTYPES:
        model = load_causal_lm(source, dtype=dtype)
        assert dequantized_bytes(source, dtype) == sum(p.numel() * p.itemsize for p in model.parameters())


def test_a_model_above_its_share_of_free_memory_is_streamed(child, monkeypatch, tmp_path, visited):
    source = Checkpoint.open(child)
    size = dequantized_bytes(source, torch.float32)
    monkeypatch.setattr(memory, "free_memory_bytes", lambda: int(size / 0.6) + 2)
    assert not should_stream(source, torch.float32, wanted=None)
    assert should_stream(source, torch.float32, wanted=True)
    calibrate_kv(child, tmp_path / "fits")
    assert not visited
    monkeypatch.setattr(memory, "free_memory_bytes", lambda: int(size / 0.6) - 2)
    assert should_stream(source, torch.float32, wanted=None)
    assert not should_stream(source, torch.bfloat16, wanted=None)
    assert not should_stream(source, torch.float32, wanted=False)
    calibrate_kv(child, tmp_path / "streamed")
    assert visited == [0, 1, 2, 3]
