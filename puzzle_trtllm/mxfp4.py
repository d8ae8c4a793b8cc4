"""MXFP4: 32 values that share one power of two (OCP Microscaling Formats 1.0, as gpt-oss stores its experts).

A value is a 4-bit float e2m1 (sign, 2 exponent bits, 1 mantissa bit: 0, 0.5, 1, 1.5, 2, 3, 4, 6) times the block's
scale 2^(byte - 127) (e8m0). Two values share a byte, the even one in the low nibble: 17 bytes for 32 values.

Rules for what the format cannot say:
- quantize: shared exponent floor(log2(amax)) - 2; round to nearest, ties to even; saturate at 6; a block of zeros
  gets the scale 1 (byte 127); a sign is kept on zero; NaN and infinities are refused, because a silent 0 or 6 in
  their place would hide a broken tensor.
- dequantize: the scale byte 255 is the format's NaN and makes the whole block NaN.
Results are exact in float32 and in bfloat16: e2m1 has two significant bits, and both types reach 2^-128. Only 4 and 6
at the scale 2^126 and everything from 2 on at 2^127 (bytes 253 and 254) lie beyond both types and become infinite.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BLOCK_SIZE = 32
"""Values that share a scale."""

SCALE_BIAS = 127
SCALE_NAN = 255

E2M1_VALUES: NDArray[np.float32] = np.array(
    [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32
)
"""float32 [16]: the value of each nibble."""

_ROUNDING_BOUNDS = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=np.float32)
"""Midpoints between neighbouring magnitudes; the code below a midpoint with an even index wins the tie."""


def quantize(values: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Round float32 `[..., K]` (K a multiple of 32) to `(blocks uint8 [..., K/32, 16], scales uint8 [..., K/32])`.

    Raises ValueError when K is no multiple of 32 or a value is NaN or infinite.
    """
    values = np.asarray(values, dtype=np.float32)
    if values.shape[-1] % BLOCK_SIZE:
        raise ValueError(f"the last dimension must be a multiple of {BLOCK_SIZE}, found {values.shape[-1]}")
    grouped = values.reshape(*values.shape[:-1], -1, BLOCK_SIZE)
    amax = np.abs(grouped).max(axis=-1)
    if not np.isfinite(amax).all():
        raise ValueError("NaN or infinity cannot be stored in MXFP4")
    exponent = np.where(amax > 0, np.frexp(amax)[1] - 1 - 2, 0)
    exponent = np.clip(exponent, -SCALE_BIAS, SCALE_NAN - 1 - SCALE_BIAS)
    scaled = np.ldexp(grouped, -exponent[..., None])
    nibbles = _nearest_code(np.abs(scaled)) | (np.signbit(scaled).astype(np.uint8) << 3)
    blocks = nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)
    return blocks, (exponent + SCALE_BIAS).astype(np.uint8)


def _nearest_code(magnitude: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Index of the nearest e2m1 magnitude; at a midpoint the even index, which has the even mantissa."""
    below = np.searchsorted(_ROUNDING_BOUNDS, magnitude, side="left").astype(np.uint8)
    above = np.searchsorted(_ROUNDING_BOUNDS, magnitude, side="right").astype(np.uint8)
    return np.where(below % 2 == 0, below, above)


def dequantize(blocks: NDArray[np.uint8], scales: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Expand `(blocks uint8 [..., G, 16], scales uint8 [..., G])` to float32 `[..., G * 32]`.

    Raises ValueError when the shapes do not belong together.
    """
    if blocks.shape[:-1] != scales.shape or blocks.shape[-1] != BLOCK_SIZE // 2:
        raise ValueError(f"blocks {blocks.shape} and scales {scales.shape} do not belong together")
    codes = np.stack([blocks & 0x0F, blocks >> 4], axis=-1)
    values = E2M1_VALUES[codes].reshape(*scales.shape, BLOCK_SIZE)
    with np.errstate(over="ignore"):
        result = np.ldexp(values, scales.astype(np.int32)[..., None] - SCALE_BIAS)
    result[scales == SCALE_NAN] = np.nan
    return result.reshape(*scales.shape[:-1], -1)
