"""KV calibration: ModelOpt's own export is the oracle for scales, an independent rotation for the maxima."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from puzzle_trtllm.calibration.dataset import CalibrationDataset, load_dataset
from puzzle_trtllm.calibration.held_out import set_aside
from puzzle_trtllm.calibration.kv import calibrate_kv
from puzzle_trtllm.calibration.kv_quantizers import hushed
from puzzle_trtllm.calibration.kv_scales import modelopt_scale, power_of_two_scale, storage_quality, storage_sums
from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.errors import CalibrationError, PuzzleError
from puzzle_trtllm.models.huggingface.loading import load_causal_lm
from puzzle_trtllm.tensors import is_expert_tensor

CHILD = [(6, 5), (4, None), (3, 17)]
PARENT = [(4, 6), (4, None), (4, 6)]


def with_data(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    lines = [json.dumps({"input_ids": rng.integers(7, 90, 20 + i % 3).tolist()}) for i in range(12)]
    (folder / "calibration.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module", params=[CHILD, PARENT], ids=["child", "parent"])
def folder(request, make_checkpoint) -> Path:
    return with_data(make_checkpoint(request.param, seed=2))


@pytest.fixture(scope="module")
def calibrated(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("kv") / "calibrated"
    calibrate_kv(folder, out)
    return out


@pytest.fixture(scope="module")
def child(make_checkpoint) -> Path:
    return with_data(make_checkpoint(CHILD, seed=2))


def calibration_data(source: Checkpoint) -> CalibrationDataset:
    """What calibration sees by default: the sample without its held-out part."""
    return set_aside(load_dataset(None, source), None, source)[0]


def scales_of(folder: Path) -> dict[str, float]:
    source = Checkpoint.open(folder)
    return {entry.name: float(source.numpy(entry.name)) for entry in source.kv_scales.values()}


# -- scales ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported_by_modelopt(folder) -> dict[str, torch.Tensor]:
    """The scales and the quantization config that ModelOpt's own export gives for this model and data."""
    source = Checkpoint.open(folder)
    data, model = calibration_data(source), load_causal_lm(source)
    with hushed(), torch.no_grad():
        import modelopt.torch.quantization as mtq
        from modelopt.torch.export.quant_utils import postprocess_state_dict

        config = mtq.update_quant_cfg_with_kv_cache_quant(
            {"quant_cfg": None, "algorithm": None}, mtq.FP8_KV_CFG["quant_cfg"]
        )
        batches = [torch.from_numpy(ids) for ids in data.batches(8192)]
        model = mtq.quantize(model, config, lambda m: [m(ids, use_cache=False) for ids in batches])
        return postprocess_state_dict(model.state_dict(), 448.0, "FP8")


def test_exact_scales_are_modelopts(folder, exported_by_modelopt, tmp_path):
    calibrate_kv(folder, tmp_path / "exact", exact=True)
    found = scales_of(tmp_path / "exact")
    expected = {name: value for name, value in exported_by_modelopt.items() if name.endswith(("k_scale", "v_scale"))}
    assert set(found) == set(expected)
    assert len(found) == 6
    for name, value in expected.items():
        assert found[name] == float(value)


def test_default_scales_round_up_with_a_spare_bit(calibrated, exported_by_modelopt):
    for name, scale in scales_of(calibrated).items():
        amax_over_448 = float(exported_by_modelopt[name])
        assert scale == 2.0 * 2.0 ** math.ceil(math.log2(amax_over_448))


@settings(deadline=None)
@given(st.floats(2.0**-100, 2.0**100, width=32))
def test_a_scale_is_a_power_of_two_with_one_spare_bit(amax):
    scale = power_of_two_scale(amax)
    assert math.frexp(scale)[0] == 0.5
    assert 112 < amax / scale <= 224  # E4M3 ends at 448: one bit spare, never two


@pytest.mark.parametrize("exponent", range(-20, 20))
def test_scales_at_the_edge(exponent):
    edge = 448.0 * 2.0**exponent
    assert power_of_two_scale(edge) == 2.0 ** (exponent + 1)
    assert power_of_two_scale(float(np.nextafter(np.float32(edge), np.float32(np.inf)))) == 2.0 ** (exponent + 2)


def test_nothing_seen_means_scale_one():
    assert power_of_two_scale(0.0) == modelopt_scale(0.0) == 1.0


# -- what E4M3 does ----------------------------------------------------------------------------------------------------


def e4m3_values() -> np.ndarray:
    """All finite E4M3 values, from the format's definition: bias 7, three mantissa bits, no infinity."""
    magnitudes = [m / 8 * 2.0**-6 for m in range(8)]
    magnitudes += [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
    return np.array(sorted({*magnitudes, *(-m for m in magnitudes)}))


def test_storage_quality_equals_a_table_lookup():
    values = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 4, 7)
    scale = 0.25
    table = e4m3_values()
    stored = np.array([table[np.abs(table - x / scale).argmin()] for x in values.double().numpy().ravel()]) * scale
    exact = values.double().numpy().ravel()
    quality = storage_quality(storage_sums(values, torch.tensor(scale)))
    assert quality.saturated_share == np.mean(np.abs(exact / scale) > 448) > 0
    assert quality.flushed_share == np.mean((stored == 0) & (exact != 0)) > 0
    expected_snr = 10 * math.log10((exact**2).sum() / ((stored - exact) ** 2).sum())
    assert quality.snr_db == pytest.approx(expected_snr, rel=1e-9)


def test_the_largest_value_is_not_cut_off_and_zero_is_not_flushed():
    values = torch.tensor([448.0, 449.0, -448.0, 0.0, 2.0**-11, -(2.0**-8)])  # half of the smallest, 2^-9, is 2^-10
    quality = storage_quality(storage_sums(values, torch.tensor(1.0)))
    assert (quality.saturated_share, quality.flushed_share) == (pytest.approx(1 / 6), pytest.approx(1 / 6))


def test_the_signal_to_noise_ratio_does_not_depend_on_the_unit():
    values = torch.randn(64, generator=torch.Generator().manual_seed(0))
    large, small = (storage_quality(storage_sums(values * unit, torch.tensor(unit))) for unit in (1.0, 2.0**-20))
    assert small.snr_db == pytest.approx(large.snr_db)


def test_storage_quality_without_signal_or_error():
    assert storage_quality(storage_sums(torch.zeros(4, 4), torch.tensor(1.0))).snr_db is None
    assert storage_quality(storage_sums(torch.ones(4, 4), torch.tensor(1.0))).snr_db is None


# -- the maxima per head and channel -----------------------------------------------------------------------------------


def rotate(x_BTHD: torch.Tensor, source: Checkpoint) -> torch.Tensor:
    """The rotary embedding written out with complex numbers: pair (i, i + d/2) turns by position * frequency."""
    rope, half = source.architecture.rope, x_BTHD.shape[-1] // 2
    frequencies = torch.from_numpy(rope.inverse_frequencies(2 * half)).double()
    angles = torch.arange(x_BTHD.shape[1], dtype=torch.float64)[:, None] * frequencies
    turns = torch.polar(torch.full_like(angles, rope.attention_scaling), angles)
    turned = torch.complex(x_BTHD[..., :half].double(), x_BTHD[..., half:].double()) * turns[None, :, None, :]
    return torch.cat([turned.real, turned.imag], dim=-1)


@pytest.fixture(scope="module")
def independent_maxima(folder) -> dict[str, torch.Tensor]:
    """Per head and channel, from the projections' outputs of the plain model, one sequence at a time."""
    source = Checkpoint.open(folder)
    model, a = load_causal_lm(source), source.architecture
    maxima: dict[str, torch.Tensor] = {}

    def watch(name: str, kind: str):
        def hook(module, arguments, output):
            heads = output.unflatten(-1, (-1, a.head_dim))
            values = heads.double() if kind == "v" else rotate(heads, source)
            amax = values.abs().amax(dim=(0, 1))
            maxima[name] = torch.maximum(maxima.get(name, amax), amax)

        return hook

    for i, layer in enumerate(model.model.layers):
        for kind in "qkv":
            name = f"model.layers.{i}.self_attn.{kind}_amax"
            getattr(layer.self_attn, f"{kind}_proj").register_forward_hook(watch(name, kind))
    with torch.no_grad():
        for sequence in calibration_data(source).sequences:
            model(torch.from_numpy(sequence)[None])
    return maxima


def test_the_maxima_file(folder, calibrated, independent_maxima):
    a = Checkpoint.open(folder).architecture
    found = load_file(calibrated / "kv_calibration.safetensors")
    assert set(found) == set(independent_maxima)
    for name, values in found.items():
        heads = a.num_attention_heads if name.endswith("q_amax") else a.num_key_value_heads
        assert values.dtype == np.float32
        assert values.shape == (heads, a.head_dim)
        np.testing.assert_allclose(values, independent_maxima[name].numpy(), rtol=1e-5, atol=1e-6)


def test_the_maxima_are_modelopts_scalars_to_the_bit(calibrated, exported_by_modelopt):
    found = load_file(calibrated / "kv_calibration.safetensors")
    for layer in range(3):
        for kind in "kv":
            scale = float(exported_by_modelopt[f"model.layers.{layer}.self_attn.{kind}_proj.{kind}_scale"])
            amax = found[f"model.layers.{layer}.self_attn.{kind}_amax"].max()
            assert float(np.float32(amax) / np.float32(448)) == scale


def test_the_maxima_file_says_where_it_comes_from(folder, calibrated):
    source = Checkpoint.open(folder)
    with safe_open(calibrated / "kv_calibration.safetensors", "numpy") as file:
        assert file.metadata() == {
            "dataset_fingerprint": calibration_data(source).fingerprint,
            "checkpoint_fingerprint": source.fingerprint(),
            "dtype": "float32",
        }


# -- the calibrated checkpoint -----------------------------------------------------------------------------------------


def test_the_checkpoint_is_the_source_plus_scales(folder, calibrated):
    source, result = Checkpoint.open(folder), Checkpoint.open(calibrated)
    result.validate()
    assert result.config == source.config
    assert result.config["quantization_config"]["quant_method"] == "mxfp4"
    assert set(result.tensors) - set(source.tensors) == {
        f"model.layers.{i}.self_attn.{kind}_proj.{kind}_scale" for i in range(3) for kind in "kv"
    }
    for name in source.tensors:
        assert np.array_equal(source.raw(name), result.raw(name)), name
    assert all((entry.dtype, entry.shape) == ("F32", ()) for entry in result.kv_scales.values())
    for name, entry in source.tensors.items():
        if is_expert_tensor(name):  # hard-linked, not copied
            assert result.entry(name).file.samefile(entry.file)


def test_hf_quant_config_is_modelopts(calibrated):
    config = json.loads((calibrated / "hf_quant_config.json").read_text())
    assert config["producer"]["name"] == "modelopt"
    assert config["quantization"] == {"quant_algo": None, "kv_cache_quant_algo": "FP8", "quantized_layers": {}}


def test_the_calibrated_model_is_the_same_model(folder, calibrated):
    tokens = torch.randint(7, 90, (1, 40), generator=torch.Generator().manual_seed(1))
    assert torch.equal(load_causal_lm(folder)(tokens).logits, load_causal_lm(calibrated)(tokens).logits)


def test_the_report(folder, calibrated):
    report = json.loads((calibrated / "kv_report.json").read_text())
    assert report["scale_rule"] == "2 * 2^ceil(log2(amax / 448))"
    assert report["checkpoint_fingerprint"] == Checkpoint.open(folder).fingerprint()
    assert set(report["versions"]) == {"nvidia-modelopt", "torch", "transformers"}
    blocks = Checkpoint.open(folder).architecture.blocks
    maxima, scales = load_file(calibrated / "kv_calibration.safetensors"), scales_of(calibrated)
    for layer, block in zip(report["layers"], blocks, strict=True):
        prefix = f"model.layers.{layer['layer']}.self_attn"
        assert layer["sliding_window"] == block.sliding_window
        assert layer["q_amax"] == float(maxima[f"{prefix}.q_amax"].max())
        for kind in "kv":
            assert layer[kind]["amax"] == float(maxima[f"{prefix}.{kind}_amax"].max())
            assert layer[kind]["scale"] == scales[f"{prefix}.{kind}_proj.{kind}_scale"]
            assert layer[kind]["calibrated"]["saturated_share"] == 0
            assert 25 < layer[kind]["calibrated"]["snr_db"] < 40  # three mantissa bits: about 31.5 dB


def test_outliers_are_what_calibration_is_for(make_checkpoint, tmp_path):
    """K ten thousand times larger saturates at scale 1 and does not at the calibrated scale."""
    folder = with_data(make_checkpoint(PARENT, seed=2))
    bias = Checkpoint.open(folder).entry("model.layers.1.self_attn.k_proj.bias")
    with bias.file.open("r+b") as stream:
        stream.seek(bias.offset)
        stream.write((np.array([10000.0], dtype=np.float32).view(np.uint32) >> 16).astype("<u2").tobytes())
    layers = calibrate_kv(folder, tmp_path / "out").layers
    assert layers[1].k.amax > 9000
    assert layers[1].k.scale == 64.0  # 10000 / 448 = 22.3, up to 32, one spare bit
    assert layers[1].k.unit.saturated_share > 0.01
    assert layers[1].k.calibrated.saturated_share == 0
    assert layers[1].k.calibrated.snr_db > 25 > layers[1].k.unit.snr_db


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_existing_scales_need_overwrite(make_checkpoint, tmp_path):
    folder = with_data(make_checkpoint(CHILD, seed=2, kv_scales=[(8.0, 4.0)] * 3))
    (folder / "kv_report.json").write_text("the old report")
    with pytest.raises(CalibrationError, match="already has KV scales") as caught:
        calibrate_kv(folder, tmp_path / "out")
    assert "k_scale" in str(caught.value)
    assert not (tmp_path / "out").exists()
    calibrate_kv(folder, tmp_path / "out", overwrite=True)
    assert set(scales_of(folder).values()) == {8.0, 4.0}
    assert not set(scales_of(tmp_path / "out").values()) & {8.0, 4.0}
    assert len(scales_of(tmp_path / "out")) == 6
    assert (folder / "kv_report.json").read_text() == "the old report"  # not written through a hard link


def test_scales_under_other_names_are_replaced_not_doubled(child, tmp_path):
    from puzzle_trtllm.checkpoint_writer import rewrite_checkpoint, tensor_of

    source = Checkpoint.open(child)
    odd = tensor_of("model.layers.0.self_attn.k_scale", "F32", np.array(3.0, dtype=np.float32))
    (tmp_path / "odd").mkdir()
    rewrite_checkpoint(source, tmp_path / "odd", config=source.config, replace={}, add=[odd])
    calibrate_kv(tmp_path / "odd", tmp_path / "out", overwrite=True)
    assert "model.layers.0.self_attn.k_scale" not in Checkpoint.open(tmp_path / "out").tensors


def test_an_existing_output_folder_is_kept(child, tmp_path):
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(PuzzleError, match="not empty"):
        calibrate_kv(child, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("option", ["dataset", "held_out"])
def test_an_output_that_would_replace_its_data(make_checkpoint, tmp_path, option):
    folder = with_data(make_checkpoint(CHILD))
    (tmp_path / "out").mkdir()
    file = shutil.copyfile(folder / "calibration.jsonl", tmp_path / "out" / "mine.jsonl")
    with pytest.raises(PuzzleError, match=r"would replace a file it is made from \(found .*mine\.jsonl"):
        calibrate_kv(folder, tmp_path / "out", overwrite=True, **{option: file})
    assert file.is_file()


@pytest.mark.parametrize("place", ["models/child", "models"])
def test_an_output_that_would_replace_the_checkpoint(make_checkpoint, tmp_path, place):
    folder = tmp_path / "models" / "child"
    shutil.copytree(with_data(make_checkpoint(CHILD)), folder)
    with pytest.raises(PuzzleError, match="would replace the checkpoint it is made from"):
        calibrate_kv(folder, tmp_path / place, overwrite=True)
    assert not Checkpoint.open(folder).kv_scales


def test_a_disk_without_room_is_told_before_anything_is_calibrated(child, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(total=0, used=0, free=1000))
    monkeypatch.setattr("puzzle_trtllm.calibration.kv.observe", None)
    with pytest.raises(PuzzleError, match=r"out: not enough disk space \(found 0\.00 GiB, 1,000 bytes"):
        calibrate_kv(child, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("value", "found"), [(float("nan"), "NaN"), (float("inf"), "infinity")])
def test_activations_that_are_not_finite_name_the_layer(make_checkpoint, tmp_path, value, found):
    folder = with_data(make_checkpoint(CHILD, seed=2))
    bias = Checkpoint.open(folder).entry("model.layers.1.self_attn.v_proj.bias")
    with bias.file.open("r+b") as stream:
        stream.seek(bias.offset)
        stream.write((np.array([value], dtype=np.float32).view(np.uint32) >> 16).astype("<u2").tobytes())
    message = rf"model\.layers\.1\.self_attn \(V\): activations are not finite \(found {found}\)"
    with pytest.raises(CalibrationError, match=message):
        calibrate_kv(folder, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# -- manners -----------------------------------------------------------------------------------------------------------


def test_nothing_is_said_on_stdout(child, tmp_path, capfd):
    calibrate_kv(child, tmp_path / "quiet")
    assert capfd.readouterr().out == ""
    calibrate_kv(child, tmp_path / "loud", quiet=False)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "KV calibration" in printed.err


def test_the_thread_count_is_given_back(child, tmp_path):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        calibrate_kv(child, tmp_path / "out")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_stage_imports_without_torch():
    code = "import sys, puzzle_trtllm.calibration, puzzle_trtllm.calibration.dataset; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
