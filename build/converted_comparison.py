"""Comparing experts that were stored in the other format on the way: what the parent's bytes say, in the child's form.

MXFP4 to BF16 must be exact, value by value; BF16 to MXFP4 must be what rounding to nearest even gives. As in
`row_comparison`, only the codec is shared with the code that writes children, not the order of rows or axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puzzle_trtllm import mxfp4
from puzzle_trtllm.build.row_comparison import first_different_byte, read_span, row_of
from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.safetensors_file import TensorEntry

ROWS_AT_ONCE = 256


def sources_of(name: str, parent: Checkpoint) -> tuple[str, ...]:
    """The parent's tensors that the child's tensor `name` is made from; none if there is no such thing."""
    if name in parent.tensors:
        return (name,)
    packed = (f"{name}_blocks", f"{name}_scales")
    unpacked = name.removesuffix("_blocks").removesuffix("_scales")
    for sources in (packed, (unpacked,)):
        if all(source in parent.tensors for source in sources):
            return sources
    return ()


def converted_difference(child: TensorEntry, parent: Checkpoint, kept: Sequence[int]) -> str | None:
    """One line about the first kept expert that is not the parent's in the child's format, or None."""
    for row, expert in enumerate(kept):
        ours = read_span(row_of(child, row))
        theirs = _expected(child, parent, expert)
        if ours != theirs:
            where = f"differs at byte {first_different_byte(ours, theirs)}" if len(ours) == len(theirs) else "shape"
            return f"{child.name}[{row}], the parent's expert {expert} in the other format: {where}"
    return None


def _expected(child: TensorEntry, parent: Checkpoint, expert: int) -> bytes:
    if child.dtype == "BF16":
        blocks, scales = (_expert(parent.entry(f"{child.name}{part}"), expert) for part in ("_blocks", "_scales"))
        return mxfp4.dequantize_to_bf16(blocks, scales).transpose().tobytes()
    name, _, part = child.name.rpartition("_")
    values = _expert(parent.entry(name), expert).transpose()
    packed = (_packed(values[start : start + ROWS_AT_ONCE]) for start in range(0, len(values), ROWS_AT_ONCE))
    return b"".join((blocks if part == "blocks" else scales).tobytes() for blocks, scales in packed)


def _packed(bits: NDArray[np.uint16]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    widened = np.ascontiguousarray(bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return mxfp4.quantize(widened)


def _expert(entry: TensorEntry, expert: int) -> NDArray[Any]:
    dtype = np.uint16 if entry.dtype == "BF16" else np.uint8
    return np.frombuffer(read_span(row_of(entry, expert)), dtype=dtype).reshape(entry.shape[1:])
