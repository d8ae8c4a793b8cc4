"""FP8 scales of a KV cache: what calibration, building and reports must agree on.

E4M3 holds magnitudes up to 448. A cache stores x / s rounded to E4M3 and reads it back times s. Scales that are folded
into weights are powers of two, because only those leave the unquantized model the same to the bit.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

E4M3_MAX = 448.0
KV_CALIBRATION_NAME = "kv_calibration.safetensors"
"""Beside a calibrated checkpoint: the largest magnitudes per head and channel, float32 `[heads, head_dim]`."""


def ceil_log2(scale: float) -> int:
    """The smallest e with 2^e >= scale, exactly (no logarithm is taken). Scale must be positive and finite."""
    mantissa, exponent = math.frexp(scale)  # scale = mantissa * 2^exponent, 0.5 <= mantissa < 1
    return exponent - 1 if mantissa == 0.5 else exponent


def fold_exponent(scale: float) -> int:
    """log2 of the power of two that is folded for `scale`: rounded up; 0 for a scale of 0 (nothing was seen)."""
    return ceil_log2(scale) if scale > 0 else 0


def k_channel_exponents(amax_KDh: NDArray[np.float32], tensor_scale: float) -> NDArray[np.int32]:
    """log2 of the fold of every K channel, int32 `[num_key_value_heads, head_dim]`, equal within a rotary pair.

    RoPE turns channels i and i + head_dim / 2 (Hugging Face's half-split layout) into each other, so they share the
    larger one's scale. `amax_KDh` is taken after RoPE.
    """
    half = amax_KDh.shape[1] // 2
    pair_amax = np.maximum(amax_KDh[:, :half], amax_KDh[:, half:])
    return channel_exponents(np.concatenate([pair_amax, pair_amax], axis=1), tensor_scale)


def channel_exponents(amax_KDh: NDArray[np.float32], tensor_scale: float) -> NDArray[np.int32]:
    """ceil(log2(amax / 448)) of every channel, plus the spare bits that the whole tensor's scale has."""
    exponents = np.array([fold_exponent(float(a) / E4M3_MAX) for a in amax_KDh.reshape(-1)], dtype=np.int32)
    spare = max(fold_exponent(tensor_scale) - fold_exponent(float(amax_KDh.max()) / E4M3_MAX), 0)
    if tensor_scale > 0:
        exponents[amax_KDh.reshape(-1) > 0] += spare
    return exponents.reshape(amax_KDh.shape)
