"""Multiplying BF16 by powers of two on the bits equals the arithmetic, and is refused where that is inexact."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from puzzle_trtllm.build.powers_of_two import InexactFoldError, times_power_of_two
from puzzle_trtllm.kv_scales import ceil_log2

SMALLEST_NORMAL = 2.0**-126
LARGEST = (2 - 2.0**-7) * 2.0**127


def value_of(bits: int) -> float:
    return float(np.array(bits << 16, dtype=np.uint32).view(np.float32))


def multiply(bits: list[int], exponent: int) -> list[int]:
    return times_power_of_two(np.array(bits, dtype=np.uint16), np.array(exponent, dtype=np.int32)).tolist()


@given(st.integers(0, 65535), st.integers(-300, 300))
def test_one_value(bits, exponent):
    value = value_of(bits)
    product = math.ldexp(value, exponent) if math.isfinite(value) else math.nan  # exact: a double has the room
    normal = abs(value) >= SMALLEST_NORMAL and SMALLEST_NORMAL <= abs(product) <= LARGEST
    if value == 0 or exponent == 0:
        assert multiply([bits], exponent) == [bits]
    elif normal:
        (result,) = multiply([bits], exponent)
        assert value_of(result) == product
        assert multiply([result], -exponent) == [bits], "a fold can be undone"
    else:
        with pytest.raises(InexactFoldError, match="no normal BF16 number"):
            multiply([bits], exponent)


def test_exponents_broadcast_over_rows_and_columns():
    torch = pytest.importorskip("torch")
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    bits = weight.view(torch.uint16).numpy()
    for exponents in (np.array([[1], [0], [-3], [5]]), np.array([[1, 2, 3, -1, -2, 0]])):
        expected = weight * torch.exp2(torch.from_numpy(exponents)).bfloat16()
        found = times_power_of_two(bits, exponents.astype(np.int32))
        np.testing.assert_array_equal(found, expected.view(torch.uint16).numpy())


def test_the_offender_is_named():
    bits = np.array([[0x3F80, 0x0000], [0x3F80, 0x7F00]], dtype=np.uint16)  # 1, 0; 1, 2^127
    with pytest.raises(InexactFoldError, match=r"1\.70141e\+38 at \[1, 1\] times 2\^1 "):
        times_power_of_two(bits, np.array([[1]], dtype=np.int32))


@given(st.floats(min_value=1e-300, max_value=1e300))
def test_ceil_log2_is_the_smallest_power_not_below(scale):
    exponent = ceil_log2(scale)
    assert math.ldexp(1, exponent) >= scale > math.ldexp(1, exponent - 1)


@pytest.mark.parametrize(
    ("scale", "exponent"), [(1.0, 0), (1.0000001, 1), (0.5, -1), (0.50001, 0), (3, 2), (4, 2), (2**-20, -20)]
)
def test_ceil_log2_by_hand(scale, exponent):
    assert ceil_log2(scale) == exponent
