"""Exact multiplication of BF16 tensors by powers of two, on their bit patterns.

A BF16 value is sign (1 bit), exponent (8, bias 127) and mantissa (7). Times 2^e means adding e to the exponent field:
exact, and undone by subtracting it again, as long as the field stays within 1..254. Zero stays zero. Everything else is
refused rather than rounded: a result that would overflow or become subnormal, a subnormal input (hardware may flush it,
and then the product is not what the model computed), NaN and infinity.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_EXPONENT_SHIFT = 7
_EXPONENT_MASK = 0xFF
_MAGNITUDE_MASK = 0x7FFF


class InexactFoldError(ValueError):
    """A product that BF16 cannot hold exactly."""


def times_power_of_two(bits: NDArray[np.uint16], exponents: NDArray[np.int32]) -> NDArray[np.uint16]:
    """BF16 bit patterns times 2^`exponents` (broadcast against `bits`), as bit patterns.

    Raises InexactFoldError naming the first element whose product, or who itself, is no normal number.
    """
    exponents = np.broadcast_to(exponents, bits.shape)
    field = ((bits >> _EXPONENT_SHIFT) & _EXPONENT_MASK).astype(np.int32)
    moved = field + exponents
    zero = (bits & _MAGNITUDE_MASK) == 0
    normal = (field >= 1) & (field <= 254) & (moved >= 1) & (moved <= 254)
    bad = ~(zero | normal | (exponents == 0))
    if bad.any():
        index = tuple(int(i) for i in np.unravel_index(int(bad.argmax()), bits.shape))
        raise InexactFoldError(
            f"{_value(int(bits[index])):g} at {list(index)} times 2^{int(exponents[index])} is no normal BF16 number"
        )
    shifted = bits.astype(np.int32) + (exponents << _EXPONENT_SHIFT)
    return np.where(zero, bits, shifted).astype(np.uint16)


def _value(bits: int) -> float:
    return float(np.array(bits << 16, dtype=np.uint32).view(np.float32))
