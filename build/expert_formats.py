"""Experts from MXFP4 to BF16 and back, one expert at a time.

MXFP4 packs 32 values of the contracted axis: `NAME_blocks` [E, out, in/32, 16] and `NAME_scales` [E, out, in/32]. BF16
is stored as transformers multiplies it, transposed: `NAME` [E, in, out]. MXFP4 to BF16 is exact. BF16 to MXFP4 rounds
to nearest, ties to even, and gives values that came from MXFP4 back unchanged.

One expert of the 120B model is 33 MB in BF16 and 66 MB in float32, a layer is 128 times that: everything here works
on one expert, and on float32 for a few hundred of its rows, so memory does not grow with the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puzzle_trtllm import mxfp4
from puzzle_trtllm.architecture import ExpertsFormat
from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.checkpoint_writer import PlannedTensor
from puzzle_trtllm.errors import CheckpointError
from puzzle_trtllm.file_range import FileRange
from puzzle_trtllm.safetensors_file import TensorEntry
from puzzle_trtllm.tensors import TensorSpec

ROWS_AT_ONCE = 256
_NOT_CONVERTED = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
"""As in the released config.json."""


def config_with_format(config: Mapping[str, Any], experts_format: ExpertsFormat) -> dict[str, Any]:
    """config.json with the `quantization_config` that says how its experts are stored."""
    changed = {key: value for key, value in config.items() if key != "quantization_config"}
    if experts_format == "mxfp4":
        changed["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": _NOT_CONVERTED}
    return changed


def converted_experts(
    parent: Checkpoint, name: str, kept: Sequence[int], experts_format: ExpertsFormat
) -> list[PlannedTensor]:
    """The child's tensors that are made from the parent's expert tensor `name`, in the other format.

    `_scales` give nothing of their own: they are read with their `_blocks`.
    """
    if name.endswith("_scales"):
        return []
    if experts_format == "bf16":
        return [_to_bf16(parent, name.removesuffix("_blocks"), kept)]
    return list(_to_mxfp4(parent.entry(name), kept))


def _to_bf16(parent: Checkpoint, name: str, kept: Sequence[int]) -> PlannedTensor:
    blocks, scales = parent.entry(f"{name}_blocks"), parent.entry(f"{name}_scales")

    def chunks() -> Iterator[NDArray[np.uint8]]:
        for expert in kept:
            bits_OI = mxfp4.dequantize_to_bf16(_row(blocks, expert, np.uint8), _row(scales, expert, np.uint8))
            yield np.ascontiguousarray(bits_OI.T).reshape(-1).view(np.uint8)

    _, num_out, num_blocks, _ = blocks.shape
    shape = (len(kept), num_blocks * mxfp4.BLOCK_SIZE, num_out)
    return PlannedTensor(name=name, spec=TensorSpec(dtype="BF16", shape=shape), chunks=chunks)


def _to_mxfp4(entry: TensorEntry, kept: Sequence[int]) -> Iterator[PlannedTensor]:
    _, num_in, num_out = entry.shape
    shape = (len(kept), num_out, num_in // mxfp4.BLOCK_SIZE)

    def planned(part: str, shape: tuple[int, ...], encode: Callable[[NDArray[np.float32]], Any]) -> PlannedTensor:
        def chunks() -> Iterator[NDArray[np.uint8]]:
            for expert in kept:
                for values in _float32_rows(_row(entry, expert, np.uint16)):
                    yield _encoded(values, encode, entry, expert)

        return PlannedTensor(name=f"{entry.name}_{part}", spec=TensorSpec(dtype="U8", shape=shape), chunks=chunks)

    yield planned("blocks", (*shape, mxfp4.BLOCK_SIZE // 2), lambda values: mxfp4.quantize(values)[0])
    yield planned("scales", shape, mxfp4.shared_scales)


def _encoded(
    values: NDArray[np.float32], encode: Callable[[NDArray[np.float32]], Any], entry: TensorEntry, expert: int
) -> NDArray[np.uint8]:
    try:
        result: NDArray[np.uint8] = np.ascontiguousarray(encode(values)).reshape(-1)
    except ValueError as error:  # NaN or infinity
        raise CheckpointError(str(error), file=entry.file, key=f"{entry.name}[{expert}]") from None
    return result


def _float32_rows(bits_IO: NDArray[np.uint16]) -> Iterator[NDArray[np.float32]]:
    """float32 [some, in], the output rows of one BF16 expert [in, out] in turn."""
    for start in range(0, bits_IO.shape[1], ROWS_AT_ONCE):
        rows = np.ascontiguousarray(bits_IO[:, start : start + ROWS_AT_ONCE].T)
        yield (rows.astype(np.uint32) << 16).view(np.float32)


def _row(entry: TensorEntry, expert: int, dtype: type[Any]) -> NDArray[Any]:
    """One expert of a tensor, read and not mapped."""
    num_bytes = entry.num_bytes // entry.shape[0]
    data = FileRange(file=entry.file, offset=entry.offset + expert * num_bytes, num_bytes=num_bytes).tobytes()
    return np.frombuffer(data, dtype=dtype).reshape(entry.shape[1:])
