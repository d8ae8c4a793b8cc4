"""Folding is exact: the same model without FP8, and with FP8 the calibrated one at unit scale, to the last bit.

The oracle is transformers' GptOss. FP8 KV is emulated in its attention, where a cache would sit: K after RoPE and V are
divided by their scale, rounded to E4M3 (saturating at 448), and multiplied back.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from puzzle_trtllm.build.engine_build import build_engine
from puzzle_trtllm.build.fold import fold_scales
from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.checkpoint_writer import rewrite_checkpoint, tensor_of, write_shards
from puzzle_trtllm.engine import EngineConfig
from puzzle_trtllm.errors import CheckpointError
from puzzle_trtllm.kv_scales import channel_exponents
from tests.toys import VOCAB_SIZE, change_values

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
modeling = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")

BLOCKS = [(4, 16), (4, None), (4, 16)]
SCALES = [(0.037, 5.3), (1.0, 0.25), (300.0, 0.0)]
FOLDS = [(0.0625, 8.0), (1.0, 0.25), (512.0, 1.0)]
"""2^ceil(log2 s) by hand; a scale of 0 (nothing seen) folds nothing."""
NUM_KV_HEADS, HEAD_DIM = 2, 16


def calibration_file(
    folder: Path, *, layers: int = 3, q_amax: float | None = 1.0, v_amax: float = 0.0
) -> dict[str, np.ndarray]:
    """Write kv_calibration.safetensors with channels that differ by orders of magnitude, as outliers do.

    `q_amax` None leaves the queries out; `v_amax` is one channel's of V in layer 0.
    """
    rng = np.random.default_rng(0)
    amax = {}
    for layer in range(layers):
        for kind, heads in (("k", NUM_KV_HEADS), ("v", NUM_KV_HEADS), ("q", 4)):
            if kind == "q" and q_amax is None:
                continue
            values = (
                np.exp2(rng.uniform(-4, 14, (heads, HEAD_DIM))) if kind != "q" else np.full((heads, HEAD_DIM), q_amax)
            )
            amax[f"model.layers.{layer}.self_attn.{kind}_amax"] = values.astype(np.float32)
    amax["model.layers.0.self_attn.v_amax"][0, 3] = v_amax
    scratch = folder / "scratch"
    scratch.mkdir()
    write_shards(scratch, [tensor_of(name, "F32", values) for name, values in amax.items()])
    (scratch / "model-00001-of-00001.safetensors").rename(folder / "kv_calibration.safetensors")
    for file in scratch.iterdir():
        file.unlink()
    scratch.rmdir()
    return amax


def folded_copy(source: Checkpoint, out: Path, mode: str) -> Path:
    out.mkdir()
    folding = fold_scales(source, mode)
    scales = dict.fromkeys((entry.name for entry in source.kv_scales.values()), None)
    rewrite_checkpoint(source, out, config=source.config, replace={**scales, **folding.replace})
    return out


def load(folder: Path, dtype: torch.dtype):
    quantization = transformers.Mxfp4Config(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="eager", quantization_config=quantization
    )
    return model.to(dtype).eval()


def logits_of(model) -> list[torch.Tensor]:
    """Prefill of 40 tokens (beyond the window of 16), then 8 decode steps with a cache."""
    tokens = torch.randint(0, VOCAB_SIZE, (2, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        step = model(tokens[:, :40], use_cache=True)
        result = [step.logits]
        for position in range(40, 48):
            step = model(tokens[:, position : position + 1], past_key_values=step.past_key_values, use_cache=True)
            result.append(step.logits)
    return result


def through_e4m3(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    stored = (values / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return stored.to(values.dtype) * scale


@pytest.fixture
def fp8_kv(monkeypatch):
    """`fp8_kv(k_scales, v_scales)` makes attention see K and V as an FP8 cache at these scales (one entry a layer)."""
    original = modeling.eager_attention_forward

    def install(k_scales, v_scales):
        def attention(module, query, key, value, *args, **kwargs):
            k_scale = torch.as_tensor(k_scales[module.layer_idx]).to(key.dtype)
            v_scale = torch.as_tensor(v_scales[module.layer_idx]).to(value.dtype)
            key, value = through_e4m3(key, k_scale), through_e4m3(value, v_scale)
            return original(module, query, key, value, *args, **kwargs)

        monkeypatch.setattr(modeling, "eager_attention_forward", attention)

    return install


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected) == 9
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(ours, theirs), f"step {step}: differs by {(ours - theirs).abs().max()}"


@pytest.fixture(scope="class")
def case(make_checkpoint, tmp_path_factory, mode, dtype, outliers):
    source = Checkpoint.open(make_checkpoint(BLOCKS, kv_scales=SCALES))
    if outliers:  # K beyond 448 in one channel, V near E4M3's floor in a whole layer
        change_values(source, "model.layers.2.self_attn.k_proj.bias", {3: 5000.0})
        for name in ("model.layers.1.self_attn.v_proj.weight", "model.layers.1.self_attn.v_proj.bias"):
            change_values(source, name, dict(enumerate(source.float32(name).ravel() * 2.0**-12)))
    amax = calibration_file(source.path)
    folded = folded_copy(source, tmp_path_factory.mktemp("fold") / "folded", mode)
    return load(source.path, dtype), load(folded, dtype), amax


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "float32"], scope="class")
@pytest.mark.parametrize("mode", ["tensor", "channel"], scope="class")
@pytest.mark.parametrize("outliers", [False, True], ids=["plain", "outliers"], scope="class")
class TestTheModelIsTheSame:
    def scales_by_hand(self, mode, amax):
        """Oracle: the folds as FP8 scales for the original, from the definition rather than from the code."""
        if mode == "tensor":
            return [k for k, _ in FOLDS], [v for _, v in FOLDS]
        k_scales, v_scales = [], []
        for layer, (k_scale, v_scale) in enumerate(SCALES):
            for kind, scale, scales in (("k", k_scale, k_scales), ("v", v_scale, v_scales)):
                values = amax[f"model.layers.{layer}.self_attn.{kind}_amax"].astype(np.float64)
                if kind == "k":
                    values = np.tile(np.maximum(values[:, : HEAD_DIM // 2], values[:, HEAD_DIM // 2 :]), 2)
                exponents = np.ceil(np.log2(np.where(values > 0, values, 448.0) / 448.0))
                whole = np.ceil(np.log2(values.max() / 448.0))
                spare = max(np.ceil(np.log2(scale)) - whole, 0.0) if scale > 0 else 0.0
                powers = np.exp2(exponents + np.where(values > 0, spare, 0.0))
                scales.append(powers[None, :, None, :].astype(np.float32))  # [1, K, 1, Dh] against [B, K, T, Dh]
        return k_scales, v_scales

    def test_without_fp8_bit_for_bit(self, case):
        original, folded, _ = case
        changed = folded.model.layers[0].self_attn.k_proj.weight
        assert not torch.equal(changed, original.model.layers[0].self_attn.k_proj.weight)
        assert_equal(logits_of(folded), logits_of(original))

    def test_fp8_at_unit_scale_is_fp8_with_the_scales(self, case, fp8_kv, mode):
        original, folded, amax = case
        exact = logits_of(original)
        ones = [1.0] * len(BLOCKS)
        fp8_kv(ones, ones)
        at_unit_scale = logits_of(folded)
        uncalibrated = logits_of(original)
        fp8_kv(*self.scales_by_hand(mode, amax))
        with_scales = logits_of(original)
        assert_equal(at_unit_scale, with_scales)
        assert not torch.equal(with_scales[0], exact[0]), "FP8 did round"
        assert not torch.equal(with_scales[0], uncalibrated[0]), "the scales did matter"


class TestWhatIsFolded:
    def test_the_record_has_scales_and_folds(self, make_checkpoint):
        folding = fold_scales(Checkpoint.open(make_checkpoint(BLOCKS, kv_scales=SCALES)), "tensor")
        assert folding.record.mode == "tensor"
        found = [(layer.k_fold, layer.v_fold) for layer in folding.record.layers]
        assert found == FOLDS
        assert [layer.k_scale for layer in folding.record.layers] == pytest.approx([k for k, _ in SCALES], rel=1e-7)

    def test_only_projections_that_change_are_replaced(self, make_checkpoint):
        folding = fold_scales(Checkpoint.open(make_checkpoint(BLOCKS, kv_scales=SCALES)), "tensor")
        by_layer = [sorted(n.split("self_attn.")[1] for n in folding.replace if f".{i}." in n) for i in range(3)]
        k = ["k_proj.bias", "k_proj.weight"]
        q = ["q_proj.bias", "q_proj.weight"]
        v = ["v_proj.bias", "v_proj.weight"]
        assert by_layer == [[*k, "o_proj.weight", *q, *v], ["o_proj.weight", *v], [*k, *q]]

    def test_scales_under_their_other_names(self, make_checkpoint, tmp_path):
        source = Checkpoint.open(make_checkpoint(BLOCKS))
        scales = [
            tensor_of(f"model.layers.{i}.self_attn.{kind}_scale", "F32", np.array([scale], np.float32))
            for i, pair in enumerate(SCALES)
            for kind, scale in zip("kv", pair, strict=True)
        ]
        (tmp_path / "c").mkdir()
        rewrite_checkpoint(source, tmp_path / "c", config=source.config, replace={}, add=scales)
        folding = fold_scales(Checkpoint.open(tmp_path / "c"), "tensor")
        assert [(layer.k_fold, layer.v_fold) for layer in folding.record.layers] == FOLDS

    def test_none_folds_nothing(self, make_checkpoint):
        folding = fold_scales(Checkpoint.open(make_checkpoint(BLOCKS, kv_scales=SCALES)), "none")
        assert (folding.record.mode, folding.record.layers, dict(folding.replace)) == ("none", [], {})

    def test_warns_where_folded_queries_leave_fp8(self, make_checkpoint):
        source = Checkpoint.open(make_checkpoint(BLOCKS, kv_scales=SCALES))
        calibration_file(source.path, q_amax=0.9)  # x 512 in layer 2 is 460.8
        (warning,) = fold_scales(source, "tensor").warnings
        assert warning.startswith("layer 2: the folded queries reach 460.8")

    def test_refuses_those_where_the_engine_quantizes_q(self, make_checkpoint):
        source = Checkpoint.open(make_checkpoint(BLOCKS, kv_scales=SCALES))
        calibration_file(source.path, q_amax=0.9)
        message = r"layers\.2\.self_attn\.q_amax: .*FP8 cannot hold.* \(found 460\.8, expected below 448"
        with pytest.raises(CheckpointError, match=message):
            fold_scales(source, "tensor", quantized_q=True)
        assert fold_scales(source, "none", quantized_q=True).warnings == ()

    @pytest.mark.parametrize(
        ("settings", "refused"),
        [
            ({"runtime": "tensorrt_llm"}, True),  # its attention makes FP8 of Q beside an FP8 cache
            ({"runtime": "tensorrt_llm", "quantized_q": False}, False),
            ({"runtime": "reference"}, False),
            ({"runtime": "reference", "quantized_q": True}, True),
        ],
    )
    def test_an_engine_stores_queries_as_its_runtime_does_unless_its_config_says_otherwise(
        self, make_checkpoint, tmp_path, settings, refused
    ):
        source = make_checkpoint(BLOCKS, kv_scales=SCALES)
        calibration_file(source, q_amax=0.9)
        config = EngineConfig(kv_dtype="fp8", gpu="h100-80gb", scenario="cpu-demo", **settings)
        if refused:
            with pytest.raises(CheckpointError, match=r"q_amax: FP8 cannot hold the folded queries"):
                build_engine(source, tmp_path / "e", config=config)
            assert not (tmp_path / "e").exists()
        else:
            warnings = build_engine(source, tmp_path / "e", config=config).manifest.provenance["warnings"]
            assert any("the folded queries reach 460.8" in line for line in warnings)

    def test_warns_of_every_layer(self, make_checkpoint):
        source = Checkpoint.open(make_checkpoint(BLOCKS, kv_scales=SCALES))
        calibration_file(source.path, q_amax=1e6)
        warned = [warning.split(":")[0] for warning in fold_scales(source, "tensor").warnings]
        assert warned == ["layer 0", "layer 1", "layer 2"]

    def test_says_that_queries_cannot_be_checked_without_the_calibration_file(self, make_checkpoint):
        source = Checkpoint.open(make_checkpoint(BLOCKS, kv_scales=SCALES))
        assert fold_scales(source, "tensor").warnings == ()
        (warning,) = fold_scales(source, "tensor", quantized_q=True).warnings
        assert "cannot be checked" in warning
        calibration_file(source.path, q_amax=None)  # as a tool that looks at K and V alone would write it
        assert fold_scales(source, "channel").warnings == ()
        assert fold_scales(source, "channel", quantized_q=True).warnings == (warning,)

    def test_queries_that_no_fold_enlarges_need_no_check(self, make_checkpoint):
        """Without a calibration file, which a checkpoint by other tools does not bring."""
        source = Checkpoint.open(make_checkpoint(BLOCKS, kv_scales=[(0.037, 5.3), (1.0, 0.25), (0.5, 0.0)]))
        assert fold_scales(source, "tensor", quantized_q=True).warnings == ()

    def test_does_not_warn_below(self, make_checkpoint):
        source = Checkpoint.open(make_checkpoint(BLOCKS, kv_scales=SCALES))
        calibration_file(source.path, q_amax=0.8)  # x 512 is 409.6
        assert fold_scales(source, "tensor", quantized_q=True).warnings == ()

    def test_a_model_without_attention_bias(self, make_checkpoint, tmp_path):
        source = Checkpoint.open(make_checkpoint(BLOCKS, kv_scales=SCALES))
        biases = {n: None for n in source.tensors if "self_attn" in n and n.endswith("bias")}
        (tmp_path / "c").mkdir()
        rewrite_checkpoint(source, tmp_path / "c", config={**source.config, "attention_bias": False}, replace=biases)
        assert not [n for n in fold_scales(Checkpoint.open(tmp_path / "c"), "tensor").replace if n.endswith("bias")]


class TestRefusals:
    def refused(self, folder: Path, match: str, mode: str = "tensor") -> None:
        with pytest.raises(CheckpointError, match=match) as caught:
            folding = fold_scales(Checkpoint.open(folder), mode)
            for planned in folding.replace.values():
                list(planned.chunks())
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
    def test_a_scale_that_is_none(self, make_checkpoint, bad):
        folder = make_checkpoint(BLOCKS, kv_scales=[(1.0, 1.0), (1.0, bad), (1.0, 1.0)])
        self.refused(folder, r"layers\.1\.self_attn\.v_proj\.v_scale: no usable scale")

    def test_a_layer_without_scales(self, make_checkpoint):
        folder = make_checkpoint(BLOCKS, kv_scales=SCALES[:2])
        self.refused(folder, r"layers\.2\.self_attn\.k_proj\.k_scale: missing KV scale")

    def test_a_scale_a_head(self, make_checkpoint, tmp_path):
        source = Checkpoint.open(make_checkpoint(BLOCKS, kv_scales=SCALES))
        name = "model.layers.0.self_attn.k_proj.k_scale"
        (tmp_path / "c").mkdir()
        scale = tensor_of(name, "F32", np.ones(2, np.float32))
        rewrite_checkpoint(source, tmp_path / "c", config=source.config, replace={name: scale})
        self.refused(tmp_path / "c", r"k_scale: a KV scale must be one number .found shape \[2\]")

    @pytest.mark.parametrize(
        ("pair", "match"),
        [
            ((2.0**125, 1.0), r"layers\.1\.self_attn\.k_proj\.weight: .*cannot be folded exactly.*no normal BF16"),
            ((2.0**-126, 1.0), r"layers\.1\.self_attn\.\w+\.\w+: .*cannot be folded exactly"),
            ((1.0, 2.0**-126), r"layers\.1\.self_attn\.\w+\.\w+: .*cannot be folded exactly"),
        ],
    )
    def test_a_fold_that_bf16_cannot_hold(self, make_checkpoint, pair, match):
        self.refused(make_checkpoint(BLOCKS, kv_scales=[(1.0, 1.0), pair, (1.0, 1.0)]), match)

    def test_channel_without_its_file(self, make_checkpoint):
        folder = make_checkpoint(BLOCKS, kv_scales=SCALES)
        self.refused(folder, r"kv_calibration\.safetensors: missing, and --fold channel needs it", "channel")

    def test_channel_with_a_file_for_another_model(self, make_checkpoint):
        folder = make_checkpoint(BLOCKS, kv_scales=SCALES)
        calibration_file(folder, layers=2)
        self.refused(folder, r"layers\.2\.self_attn\.k_amax: missing or of another shape", "channel")

    @pytest.mark.parametrize("bad", [-0.5, float("nan"), float("inf")])
    def test_channel_with_a_maximum_that_is_none(self, make_checkpoint, bad):
        folder = make_checkpoint(BLOCKS, kv_scales=SCALES)
        calibration_file(folder, v_amax=bad)
        self.refused(folder, r"layers\.0\.self_attn\.v_amax: negative, NaN or infinite", "channel")

    def test_weights_that_are_not_bf16(self, make_checkpoint, tmp_path):
        source = Checkpoint.open(make_checkpoint(BLOCKS, kv_scales=SCALES))
        name = "model.layers.0.self_attn.k_proj.weight"
        (tmp_path / "c").mkdir()
        replace = {name: tensor_of(name, "F32", source.float32(name))}
        rewrite_checkpoint(source, tmp_path / "c", config=source.config, replace=replace)
        self.refused(tmp_path / "c", r"k_proj\.weight: cannot be folded .found F32, expected BF16")


@pytest.mark.parametrize(
    ("amax", "tensor_scale", "exponents"),
    [
        ([448.0, 449.0, 224.0, 1.0, 0.0], 2.0, [0, 1, -1, -8, 0]),  # the largest asks for 2 itself: no bit is spare
        ([448.0, 449.0, 224.0, 1.0, 0.0], 8.0, [2, 3, 1, -6, 0]),  # two are, of every channel that was seen
        ([448.0, 1.0], 0.5, [0, -8]),  # a scale too small for the largest takes no bit away
        ([100.0, 1.0], 0.0, [-2, -8]),
        ([0.0, 0.0], 2.0, [0, 0]),
    ],
)
def test_every_channel_gets_the_spare_bits_of_the_whole_tensors_scale(amax, tensor_scale, exponents):
    assert channel_exponents(np.array([amax], np.float32), tensor_scale).tolist() == [exponents]


def test_kv_calibration_is_no_shard(make_checkpoint):
    """The calibration file lies beside the shards; a checkpoint must not take its tensors for weights."""
    source = Checkpoint.open(make_checkpoint(BLOCKS, kv_scales=SCALES))
    calibration_file(source.path)
    assert set(Checkpoint.open(source.path).tensors) == set(source.tensors)
    assert json.loads((source.path / "hf_quant_config.json").read_text())
