"""MXFP4: every value the format can say survives, everything else rounds as IEEE would, nonsense is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzle_trtllm import mxfp4

MAGNITUDES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def nearest_even(value: float) -> float:
    """Oracle by exhaustive search: the nearest magnitude, and of two equally near ones the even index."""
    distances = [abs(abs(value) - m) for m in MAGNITUDES]
    best = min(distances)
    candidates = [i for i, d in enumerate(distances) if d == best]
    index = candidates[0] if len(candidates) == 1 else next(i for i in candidates if i % 2 == 0)
    return float(np.copysign(MAGNITUDES[index], value))


def round_trip(values: np.ndarray) -> np.ndarray:
    return mxfp4.dequantize(*mxfp4.quantize(values))


@given(st.binary(min_size=64, max_size=64), st.lists(st.integers(0, 252), min_size=4, max_size=4))
def test_dequantize_quantize_is_the_identity_on_values(packed, scales):
    blocks = np.frombuffer(packed, dtype=np.uint8).reshape(2, 2, 16)
    values = mxfp4.dequantize(blocks, np.array(scales, dtype=np.uint8).reshape(2, 2))
    np.testing.assert_array_equal(round_trip(values), values)
    np.testing.assert_array_equal(np.signbit(round_trip(values)), np.signbit(values))


def test_every_code_at_every_scale_round_trips():
    codes = np.arange(16, dtype=np.uint8)
    block = np.concatenate([codes[0::2] | (codes[1::2] << 4)] * 2)  # 32 nibbles: all 16 codes twice
    scales = np.arange(253, dtype=np.uint8)  # 6 x 2^126 and above are beyond float32
    values = mxfp4.dequantize(np.tile(block, (253, 1, 1)), scales[:, None])
    blocks, new_scales = mxfp4.quantize(values)
    np.testing.assert_array_equal(blocks, np.tile(block, (253, 1, 1)))
    np.testing.assert_array_equal(new_scales[:, 0], scales)


@pytest.mark.parametrize(("scale", "largest_finite"), [(252, 6.0), (253, 3.0), (254, 1.5)])
def test_what_lies_beyond_float32_is_infinite(scale, largest_finite):
    block = np.array([[0x10, 0x32, 0x54, 0x76] * 4], dtype=np.uint8)  # 0, 0.5, ... 6
    values = mxfp4.dequantize(block, np.array([scale], dtype=np.uint8))[:8]
    assert [m for m, v in zip(MAGNITUDES, values, strict=True) if np.isfinite(v)][-1] == largest_finite


def test_dequantize_is_transformers_bit_for_bit():
    torch = pytest.importorskip("torch")
    convert = pytest.importorskip("transformers.integrations.mxfp4").convert_moe_packed_tensors
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (3, 8, 2, 16), dtype=np.uint8)
    scales = rng.integers(2, 250, (3, 8, 2), dtype=np.uint8)
    theirs = convert(torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.bfloat16)
    ours = torch.from_numpy(mxfp4.dequantize(blocks, scales)).bfloat16().transpose(1, 2)  # theirs is [E, in, out]
    assert torch.equal(ours.contiguous().view(torch.int16), theirs.contiguous().view(torch.int16))


def every_code_at_every_scale() -> tuple[np.ndarray, np.ndarray]:
    """blocks uint8 [256, 16, 16] with every packed byte, scales uint8 [256, 16] with every scale."""
    blocks = np.tile(np.arange(256, dtype=np.uint8).reshape(16, 16), (256, 1, 1))
    return blocks, np.repeat(np.arange(256, dtype=np.uint8)[:, None], 16, axis=1)


def test_every_code_at_every_scale_is_transformers_bit_for_bit():
    """But for scale 255, the format's NaN, which transformers takes for 2^128."""
    torch = pytest.importorskip("torch")
    convert = pytest.importorskip("transformers.integrations.mxfp4").convert_moe_packed_tensors
    blocks, scales = every_code_at_every_scale()
    theirs = convert(torch.from_numpy(blocks[None]), torch.from_numpy(scales[None]), dtype=torch.bfloat16)
    theirs = theirs[0].T.contiguous().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(mxfp4.dequantize_to_bf16(blocks, scales)[:255], theirs[:255])


def test_bf16_from_the_table_is_bf16_from_float32():
    blocks, scales = every_code_at_every_scale()
    rounded = (mxfp4.dequantize(blocks, scales).view(np.uint32) >> 16).astype(np.uint16)
    np.testing.assert_array_equal(mxfp4.dequantize_to_bf16(blocks, scales), rounded)
    with pytest.raises(ValueError, match="do not belong together"):
        mxfp4.dequantize_to_bf16(blocks, scales[:, :3])


@settings(max_examples=50)
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=64, max_size=64))
def test_scales_alone_are_the_scales(floats):
    values = np.array(floats, dtype=np.float32).reshape(2, 32)
    np.testing.assert_array_equal(mxfp4.shared_scales(values), mxfp4.quantize(values)[1])


@settings(max_examples=200)
@given(st.lists(st.integers(-24, 24), min_size=31, max_size=31), st.integers(-60, 60))
def test_rounds_to_nearest_ties_to_even(quarters, exponent):
    # Quarter steps hit every midpoint of the grid; a leading 6 pins the block's scale to 1.
    values = np.array([6.0, *(q / 4 for q in quarters)], dtype=np.float32)
    expected = [6.0, *(nearest_even(q / 4) for q in quarters)]
    scaled = np.ldexp(values, exponent)
    np.testing.assert_array_equal(round_trip(scaled), np.ldexp(np.array(expected, dtype=np.float32), exponent))


@pytest.mark.parametrize(
    ("value", "rounded"),
    [(0.25, 0.0), (0.75, 1.0), (1.25, 1.0), (1.75, 2.0), (2.5, 2.0), (3.5, 4.0), (5.0, 4.0), (5.01, 6.0), (-2.5, -2.0)],
)
def test_ties_worked_out_by_hand(value, rounded):
    values = np.full(32, value, dtype=np.float32)
    values[0] = 6.0
    assert round_trip(values)[1] == rounded


def test_the_scale_comes_from_the_largest_magnitude_and_saturates_at_six():
    values = np.zeros(32, dtype=np.float32)
    values[3] = -7.9  # floor(log2 7.9) - 2 = 0: scale 1, and 7.9 saturates at 6
    blocks, scales = mxfp4.quantize(values)
    assert scales.tolist() == [127]
    assert mxfp4.dequantize(blocks, scales)[3] == -6.0


def test_a_block_of_zeros_has_scale_one():
    blocks, scales = mxfp4.quantize(np.zeros((2, 64), dtype=np.float32))
    assert scales.tolist() == [[127, 127], [127, 127]]
    assert not blocks.any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused(bad):
    values = np.ones(32, dtype=np.float32)
    values[17] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        mxfp4.quantize(values)


def test_scale_255_is_nan_for_its_block_only():
    blocks = np.full((2, 16), 0x22, dtype=np.uint8)
    values = mxfp4.dequantize(blocks, np.array([255, 127], dtype=np.uint8))
    assert np.isnan(values[:32]).all()
    assert (values[32:] == 1.0).all()


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="multiple of 32"):
        mxfp4.quantize(np.zeros(33, dtype=np.float32))
    with pytest.raises(ValueError, match="do not belong together"):
        mxfp4.dequantize(np.zeros((2, 16), dtype=np.uint8), np.zeros(3, dtype=np.uint8))


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=32, max_size=32))
def test_error_is_at_most_half_a_step_of_the_block(floats):
    values = np.array(floats, dtype=np.float32)
    _, scales = mxfp4.quantize(values)
    # The widest gap of the grid is 2 (4 to 6); above 6 values saturate, at most 8 - 6 = 2 away.
    limit = np.ldexp(2.0, int(scales[0]) - 127)
    assert (np.abs(round_trip(values).astype(np.float64) - values) <= limit).all()
