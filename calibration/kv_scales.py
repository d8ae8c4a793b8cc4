"""From the largest K or V of a layer to its FP8 scale, and what that scale does to the values.

E4M3 holds magnitudes up to 448; a cache stores x / s rounded to E4M3 and reads it back times s. ModelOpt's scale is
amax / 448. Ours is a power of two, so that it can be folded into the projection weights without changing a bit of the
unquantized model: s = 2 * 2^ceil(log2(amax / 448)), rounded up because rounding down saturates, and one bit spare
because other prompts reach further than the calibration set. E4M3 is a floating-point format: a spare bit costs no
precision but at its very floor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from puzzle_trtllm.kv_scales import E4M3_MAX


def modelopt_scale(amax: float) -> float:
    """amax / 448 in float32, as ModelOpt exports it; 1.0 if amax is 0."""
    return float(np.float32(amax) / np.float32(E4M3_MAX)) if amax else 1.0


def power_of_two_scale(amax: float) -> float:
    """2 * 2^ceil(log2(amax / 448)); 1.0 if amax is 0. Exact: log2 is never taken.

    amax = m * 2^e with 0.5 <= m < 1, and 448 = 0.875 * 2^9, so amax / 448 <= 2^(e - 9) exactly if m <= 0.875.
    """
    if amax == 0.0:
        return 1.0
    mantissa, exponent = math.frexp(amax)
    return math.ldexp(2.0, exponent - 9 if mantissa <= 0.875 else exponent - 8)


@dataclass(frozen=True, kw_only=True)
class StorageQuality:
    """What storing values at one scale does to them."""

    saturated_share: float
    """Values above 448 * scale, cut off."""
    flushed_share: float
    """Non-zero values that become zero."""
    snr_db: float | None
    """10 log10(signal power / error power); None where either is 0."""


def through_e4m3(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`values` as an FP8 cache at `scale` (float32, broadcast) gives them back; the store saturates at 448."""
    stored = (values.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return (stored.float() * scale).to(values.dtype)


def storage_sums(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What `StorageQuality` is made of, summed: float64 `[5]`, count, saturated, flushed, signal and error power."""
    exact, stored = values.double(), through_e4m3(values.float(), scale)
    saturated = ((values.float() / scale).abs() > E4M3_MAX).sum()
    flushed = ((stored == 0) & (values != 0)).sum()
    error = stored.double() - exact
    parts = [torch.tensor(values.numel()), saturated.cpu(), flushed.cpu(), exact.square().sum().cpu()]
    return torch.stack([part.double() for part in (*parts, error.square().sum().cpu())])


def storage_quality(sums: torch.Tensor) -> StorageQuality:
    """From the sums over all values."""
    count, saturated, flushed, signal, noise = sums.tolist()
    return StorageQuality(
        saturated_share=saturated / count,
        flushed_share=flushed / count,
        snr_db=10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None,
    )
