"""MXFP4: 32 values that share one power of two (OCP Microscaling Formats 1.0, as gpt-oss stores its experts).

A value is a 4-bit float e2m1 (sign, 2 exponent bits, 1 mantissa bit: 0, 0.5, 1, 1.5, 2, 3, 4, 6) times the block's
scale 2^(byte - 127) (e8m0). Two values share a byte, the even one in the low nibble: 17 bytes for 32 values.

Rules for what the format cannot say:
- quantize: shared exponent floor(log2(amax)) - 2; round to nearest, ties to even; saturate at 6; a block of zeros
  gets the scale 1 (byte 127); a sign is kept on zero; NaN and infinities are refused, because a silent 0 or 6 in
  their place would hide a broken tensor.
- dequantize: the scale byte 255 is the format's NaN and makes the whole block NaN.
- `dequantize_to_bf16` gives the same values as BF16 bit patterns through a table, ten times as fast.
Results are exact in float32 and in bfloat16: e2m1 has two significant bits, and both types reach 2^-128. Only 4 and 6
at the scale 2^126 and everything from 2 on at 2^127 (bytes 253 and 254) lie beyond both types and become infinite.
"""

from __future__ import annotations

from functools import cache

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

_ROUNDING_BOUNDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Midpoints between neighbouring magnitudes; of the two codes beside a midpoint the even one wins the tie."""


def quantize(values: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Round float32 `[..., K]` (K a multiple of 32) to `(blocks uint8 [..., K/32, 16], scales uint8 [..., K/32])`.

    Raises ValueError when K is no multiple of 32 or a value is NaN or infinite.
    """
    values = np.asarray(values, dtype=np.float32)
    if values.shape[-1] % BLOCK_SIZE:
        raise ValueError(f"the last dimension must be a multiple of {BLOCK_SIZE}, found {values.shape[-1]}")
    grouped = values.reshape(*values.shape[:-1], -1, BLOCK_SIZE)
    scales = shared_scales(values)
    scaled = np.ldexp(grouped, SCALE_BIAS - scales.astype(np.int32)[..., None])
    nibbles = _nearest_code(np.abs(scaled)) | (np.signbit(scaled).view(np.uint8) << 3)
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4), scales


def shared_scales(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Only the scales of `quantize`, uint8 `[..., K/32]`, in a fraction of its time. Raises as `quantize` does."""
    if values.shape[-1] % BLOCK_SIZE:
        raise ValueError(f"the last dimension must be a multiple of {BLOCK_SIZE}, found {values.shape[-1]}")
    amax = np.abs(values.reshape(*values.shape[:-1], -1, BLOCK_SIZE)).max(axis=-1)
    if not np.isfinite(amax).all():
        raise ValueError("NaN or infinity cannot be stored in MXFP4")
    exponent = np.where(amax > 0, np.frexp(amax)[1] - 1 - 2, 0)
    # The largest float32 needs 2^125: no scale reaches the byte of the NaN.
    return (np.maximum(exponent, -SCALE_BIAS) + SCALE_BIAS).astype(np.uint8)


def _nearest_code(magnitude: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Index of the nearest e2m1 magnitude: how many midpoints lie below; at a midpoint the even index."""
    code = np.zeros(magnitude.shape, dtype=np.uint8)
    for below, bound in enumerate(np.array(_ROUNDING_BOUNDS, dtype=np.float32)):
        passed = magnitude > bound if below % 2 == 0 else magnitude >= bound
        code += passed.view(np.uint8)
    return code


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


def dequantize_to_bf16(blocks: NDArray[np.uint8], scales: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """As `dequantize`, but to BF16 bit patterns, uint16 `[..., G * 32]`; equal to rounding its result to bfloat16."""
    if blocks.shape[:-1] != scales.shape or blocks.shape[-1] != BLOCK_SIZE // 2:
        raise ValueError(f"blocks {blocks.shape} and scales {scales.shape} do not belong together")
    rows = scales.astype(np.uint16)[..., None] << 8
    pairs: NDArray[np.uint32] = _bf16_pairs()[rows | blocks]
    return pairs.view(np.uint16).reshape(*scales.shape[:-1], -1)


@cache
def _bf16_pairs() -> NDArray[np.uint32]:
    """uint32 [256 scales * 256 bytes]: the two BF16 values of a packed byte at a scale, the low nibble's first."""
    packed = np.arange(256, dtype=np.uint8).reshape(16, 16)
    blocks = np.broadcast_to(packed, (256, 16, 16))
    scales = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None], (256, 16))
    bits = dequantize(blocks, scales).view(np.uint32) >> 16  # exact: bfloat16 is float32's upper half
    return np.ascontiguousarray(bits.astype(np.uint16)).view(np.uint32).reshape(-1)
