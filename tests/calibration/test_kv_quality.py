"""What the report says FP8 costs: an independent emulation is the oracle, on a model that is folded or is not."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers.models.gpt_oss import modeling_gpt_oss

from puzzle_trtllm.build.fold import fold_scales
from puzzle_trtllm.calibration.dataset import load_dataset
from puzzle_trtllm.calibration.held_out import set_aside
from puzzle_trtllm.calibration.kv import calibrate_kv
from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.checkpoint_writer import rewrite_checkpoint
from puzzle_trtllm.errors import CalibrationError
from puzzle_trtllm.models.huggingface.loading import load_causal_lm
from tests.toys import change_values

CHILD = [(6, 5), (4, None), (3, 17)]


def with_data(folder: Path, *, num_records: int = 24) -> Path:
    rng = np.random.default_rng(0)
    lines = [json.dumps({"input_ids": rng.integers(7, 90, 20 + i % 3).tolist()}) for i in range(num_records)]
    (folder / "calibration.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def folder(make_checkpoint) -> Path:
    """A child whose K reaches far beyond 448 in one channel of layer 1, and whose V is tiny in layer 2."""
    folder = with_data(make_checkpoint(CHILD, seed=2))
    source = Checkpoint.open(folder)
    change_values(source, "model.layers.1.self_attn.k_proj.bias", {0: 5000.0})
    for name in ("weight", "bias"):
        full = f"model.layers.2.self_attn.v_proj.{name}"
        change_values(source, full, dict(enumerate(source.float32(full).ravel() * 2.0**-12)))
    return folder


@pytest.fixture(scope="module")
def calibrated(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("kv") / "calibrated"
    calibrate_kv(folder, out)
    return out


@pytest.fixture(scope="module")
def report(calibrated) -> dict:
    return json.loads((calibrated / "kv_report.json").read_text())


@pytest.fixture(scope="module")
def held_out(folder) -> list[torch.Tensor]:
    source = Checkpoint.open(folder)
    return [torch.from_numpy(ids)[None] for ids in set_aside(load_dataset(None, source), None, source)[1].sequences]


def fold(calibrated: Path, out: Path, mode: str) -> Path:
    out.mkdir()
    source = Checkpoint.open(calibrated)
    scales = dict.fromkeys((entry.name for entry in source.kv_scales.values()), None)
    replace = {**scales, **fold_scales(source, mode).replace}
    rewrite_checkpoint(source, out, config=source.config, replace=replace)
    return out


@torch.no_grad()
def logits(folder: Path, texts: list[torch.Tensor], store) -> list[torch.Tensor]:
    """Logits with `store(values)` in place of K and V."""
    model, original = load_causal_lm(folder), modeling_gpt_oss.eager_attention_forward

    def attention(module, query, key, value, *args, **kwargs):
        return original(module, query, store(key), store(value), *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_gpt_oss, "eager_attention_forward", attention)
        return [model(ids, use_cache=False).logits[0].double() for ids in texts]


def to_bf16(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.bfloat16).to(values.dtype)


def to_e4m3(values: torch.Tensor) -> torch.Tensor:
    return values.clamp(-448, 448).to(torch.float8_e4m3fn).to(values.dtype)


@pytest.fixture(scope="module")
def reference(folder, held_out) -> list[torch.Tensor]:
    return logits(folder, held_out, to_bf16)


@pytest.mark.parametrize("store", ["unit", "calibrated", "channel"])
def test_end_to_end_is_what_an_engine_at_unit_scale_does_to_the_folded_model(
    folder, calibrated, report, held_out, reference, tmp_path, store
):
    mode = {"unit": "none", "calibrated": "tensor", "channel": "channel"}[store]
    found = logits(fold(calibrated, tmp_path / "folded", mode), held_out, to_e4m3)
    kl, same = [], []
    for ours, exact in zip(found, reference, strict=True):
        p, q = exact.softmax(-1), ours.softmax(-1)
        kl.append((p * (p / q).log()).sum(-1))
        same.append((exact.argmax(-1) == ours.argmax(-1)).double())
    written = report["held_out"]["stores"][store]
    assert written["kl"] == pytest.approx(float(torch.cat(kl).mean()), rel=1e-3)
    assert written["top1_agreement"] == float(torch.cat(same).mean())


def test_what_calibration_and_folding_are_worth_here(report):
    """K above 448 and V near E4M3's floor: unit scale loses, and the report says so with its uncertainty."""
    stores = report["held_out"]["stores"]
    assert stores["unit"]["kl"] > 4 * stores["calibrated"]["kl"] > 0
    assert stores["unit"]["kl_over_unit"] == 0
    assert stores["calibrated"]["kl_over_unit"] < -2 * stores["calibrated"]["kl_over_unit_standard_error"] < 0
    assert stores["channel"]["kl"] < stores["unit"]["kl"]


def test_the_difference_and_its_standard_error(report, folder, calibrated, held_out, reference, tmp_path):
    unit = logits(fold(calibrated, tmp_path / "unit", "none"), held_out, to_e4m3)
    tensor = logits(fold(calibrated, tmp_path / "tensor", "tensor"), held_out, to_e4m3)

    def mean_kl(exact: torch.Tensor, found: torch.Tensor) -> float:
        p, q = exact.softmax(-1), found.softmax(-1)
        return float((p * (p / q).log()).sum(-1).mean())

    over = [mean_kl(e, t) - mean_kl(e, u) for e, t, u in zip(reference, tensor, unit, strict=True)]
    written = report["held_out"]["stores"]["calibrated"]
    assert written["kl_over_unit"] == pytest.approx(np.mean(over), rel=1e-3)
    assert written["kl_over_unit_standard_error"] == pytest.approx(np.std(over, ddof=1) / math.sqrt(3), rel=1e-3)


def test_each_layer_is_measured_on_the_held_out_text(folder, calibrated, report, held_out):
    """V of layer 0, taken from its projection: no earlier layer has touched it, and RoPE does not turn it."""
    model, seen = load_causal_lm(folder), []
    model.model.layers[0].self_attn.v_proj.register_forward_hook(lambda module, arguments, output: seen.append(output))
    with torch.no_grad():
        for ids in held_out:
            model(ids, use_cache=False)
    values = torch.cat([v.reshape(-1) for v in seen]).double()
    maxima = load_file(calibrated / "kv_calibration.safetensors")
    layer = report["layers"][0]["v"]
    for store, scale in (("unit", 1.0), ("calibrated", layer["scale"])):
        stored = to_e4m3(values / scale) * scale
        noise = float((stored - values).square().sum())
        expected = 10 * math.log10(float(values.square().sum()) / noise)
        assert layer[store]["snr_db"] == pytest.approx(expected, rel=1e-6)
        assert layer[store]["flushed_share"] == float(((stored == 0) & (values != 0)).double().mean())
    assert layer["amax"] == maxima["model.layers.0.self_attn.v_amax"].max()
    assert report["layers"][1]["k"]["unit"]["saturated_share"] > 0.01
    assert (
        report["layers"][2]["v"]["unit"]["flushed_share"] > 5 * report["layers"][2]["v"]["calibrated"]["flushed_share"]
    )


# -- held-out text -----------------------------------------------------------------------------------------------------


def test_calibration_does_not_see_what_is_set_aside(folder):
    source = Checkpoint.open(folder)
    sample = load_dataset(None, source)
    data, held_out = set_aside(sample, None, source)
    assert (len(data.sequences), len(held_out.sequences)) == (21, 3)  # one of eight
    assert data.sequences + held_out.sequences == sample.sequences
    assert len(set_aside(sample, 7, source)[1].sequences) == 7
    assert len(set_aside(sample, 0, source)[0].sequences) == 24


def test_a_sequence_on_both_sides_is_dropped(make_checkpoint):
    folder = make_checkpoint(CHILD)
    rows = [[7, 8, 9], [7, 8, 9], [10, 11, 12], [7, 8, 9]]
    (folder / "calibration.jsonl").write_text("\n".join(json.dumps({"input_ids": row}) for row in rows))
    source = Checkpoint.open(folder)
    data, held_out = set_aside(load_dataset(None, source), 2, source)
    assert not {s.tobytes() for s in data.sequences} & {s.tobytes() for s in held_out.sequences}


def write_jsonl(file: Path, *records: object) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def test_a_conversation_that_calibration_sees_at_another_effort_is_dropped(folder, tmp_path):
    def ask(text: str, **more: str) -> dict[str, object]:
        return {"messages": [{"role": "user", "content": text}], **more}

    source = Checkpoint.open(folder)
    sample = load_dataset(write_jsonl(tmp_path / "d.jsonl", ask("1+2=", reasoning_effort="high")), source)
    others = write_jsonl(tmp_path / "h.jsonl", ask("1+2=", reasoning_effort="low"), ask("1+2="), ask("5+6="))
    _, held_out = set_aside(sample, others, source)
    assert [ids.tolist() for ids in held_out.sequences] == [
        ids.tolist() for ids in load_dataset(write_jsonl(tmp_path / "e.jsonl", ask("5+6=")), source).sequences
    ]


def test_a_held_out_file_is_read_with_the_options_of_the_sample(folder, tmp_path):
    """Its column and efforts are the sample's; its records are its own affair, and a file has no config."""
    source = Checkpoint.open(folder)
    options = {"column": "q", "efforts": ["high"], "sequence_length": 40, "max_samples": 1, "seed": 3}
    sample = load_dataset(write_jsonl(tmp_path / "d.jsonl", {"q": "1+2="}), source, **options)
    questions = [{"q": [{"role": "user", "content": text * 20}]} for text in ("3+4=", "5+6=")]
    file = write_jsonl(tmp_path / "h.jsonl", *questions)
    expected = load_dataset(file, source, column="q", efforts=["high"], sequence_length=40)
    _, held_out = set_aside(sample, file, source, {**options, "dataset": "a/b", "dataset_config": "c"})
    assert held_out.fingerprint == expected.fingerprint
    assert [len(ids) for ids in held_out.sequences] == [40, 40]


def test_records_are_set_aside_before_they_are_packed(folder, tmp_path):
    source = Checkpoint.open(folder)
    file = write_jsonl(tmp_path / "d.jsonl", *({"input_ids": [10 + i] * 5} for i in range(8)), {"input_ids": [10] * 5})
    options = {"sequence_length": 4, "pack": True}
    data, held_out = set_aside(load_dataset(file, source, **options, pack_later=True), 3, source, options)
    seen, measured = (np.concatenate(part.sequences) for part in (data, held_out))
    assert not set(seen) & set(measured)
    assert all(len(row) == 4 for row in data.sequences[:-1] + held_out.sequences[:-1])


def test_the_scales_do_not_depend_on_measuring(folder, calibrated, tmp_path):
    calibrate_kv(folder, tmp_path / "out", quality=False)
    report = json.loads((tmp_path / "out" / "kv_report.json").read_text())
    assert (report["held_out"], report["held_out_missing"]) == (None, "not asked for")
    assert report["layers"][0]["k"]["calibrated"] is None
    for name in ("kv_calibration.safetensors", "model-00001-of-00002.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (calibrated / name).read_bytes()


def test_another_file_to_measure_on(folder, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(json.dumps({"input_ids": [20 + i] * 9}) for i in range(5)))
    found = calibrate_kv(folder, tmp_path / "out", held_out=other)
    assert found.num_sequences == 24
    assert (found.held_out.num_sequences, found.held_out.num_tokens) == (5, 45)


def test_too_small_a_sample_says_that_nothing_was_measured(make_checkpoint, tmp_path):
    folder = with_data(make_checkpoint(CHILD, seed=2), num_records=7)
    found = calibrate_kv(folder, tmp_path / "out")
    assert found.num_sequences == 7
    assert "no held-out text" in found.held_out_missing


@pytest.mark.parametrize("count", [24, -1])
def test_more_set_aside_than_there_is(folder, tmp_path, count):
    with pytest.raises(CalibrationError, match=rf"held_out: impossible \(found {count}, expected 0 to 23"):
        calibrate_kv(folder, tmp_path / "out", held_out=count)
    assert not list(tmp_path.iterdir())


# -- bytes and page ----------------------------------------------------------------------------------------------------


def test_bytes_saved(folder, tmp_path):
    """2 KV heads x 16 channels x K and V x 1 byte a token that the window keeps."""
    found = calibrate_kv(folder, tmp_path / "out", quality=False, seq_lens=[10, 500, 9999])
    assert [layer.saved_bytes for layer in found.layers] == [
        {"10": 5 * 64, "500": 5 * 64, "512": 5 * 64},
        {"10": 10 * 64, "500": 500 * 64, "512": 512 * 64},  # 9999 is beyond the model's limit
        {"10": 10 * 64, "500": 17 * 64, "512": 17 * 64},
    ]
    assert found.saved_bytes == {"10": 25 * 64, "500": 522 * 64, "512": 534 * 64}


def test_the_page_is_self_contained_and_has_the_numbers(calibrated, report):
    page = (calibrated / "kv_report.html").read_text()
    for outside in ("http:", "https:", "<script", "src=", "@import", "url("):
        assert outside not in page
    assert page.count("<svg") == 4
    for store in report["held_out"]["stores"].values():
        assert f"{store['kl']:.4g}" in page
    assert f"{report['layers'][1]['k']['amax']:.5g}" in page


def test_the_page_without_held_out_text(folder, tmp_path):
    calibrate_kv(folder, tmp_path / "out", quality=False)
    page = (tmp_path / "out" / "kv_report.html").read_text()
    assert "Not measured: not asked for." in page
    assert page.count("<svg") == 2
