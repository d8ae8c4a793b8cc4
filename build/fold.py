"""Fold calibrated KV scales into the weights, so that an engine that ignores scales still uses them.

FP8 attention stores K / s_k and V / s_v and multiplies back when it reads. TensorRT-LLM's PyTorch backend fixes both
scales at 1. But attention is linear in K and in V, and RoPE is linear too, so the division can live in the weights:

    k_proj.weight, k_proj.bias  / s_k      q_proj.weight, q_proj.bias  * s_k     (Q.K is unchanged)
    v_proj.weight, v_proj.bias  / s_v      o_proj.weight               * s_v     (its bias is not: it adds no V)

With powers of two every product is exact: without FP8 the folded model's logits are the original's bit for bit, and
FP8 KV at scale 1 on the folded model is FP8 KV at scale s on the original. A scale that is no power of two would drift,
so none is ever folded. Attention sinks are logits of their own and stay as they are.

Grouped queries: query head h reads KV head h // (H / K), so q_proj rows and o_proj columns repeat the exponents.

The trap: an attention that makes FP8 of Q too (TensorRT-LLM's does, beside an FP8 cache) sees s_k in Q. Where that
takes Q beyond 448 the fold would saturate what the scale was to keep whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from puzzle_trtllm.build.powers_of_two import InexactFoldError, times_power_of_two
from puzzle_trtllm.build.scales import LayerScales, channel_scales, read_amax, tensor_scales
from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.checkpoint_writer import PlannedTensor
from puzzle_trtllm.engine import FoldName, KvFold
from puzzle_trtllm.errors import CheckpointError
from puzzle_trtllm.kv_scales import E4M3_MAX, KV_CALIBRATION_NAME
from puzzle_trtllm.tensors import TensorSpec


@dataclass(frozen=True, kw_only=True)
class Folding:
    """What folding changes in a checkpoint."""

    record: KvFold
    replace: Mapping[str, PlannedTensor]
    """Projections with their new bytes; computed when they are written, so a refusal comes then."""
    warnings: tuple[str, ...] = ()


def fold_scales(checkpoint: Checkpoint, mode: FoldName, *, quantized_q: bool = False) -> Folding:
    """Plan the fold of `checkpoint`'s KV scales; mode "none" changes nothing.

    Queries that the fold takes beyond FP8 are a warning; where the engine stores Q in FP8 (`quantized_q`), an error.

    Raises CheckpointError when scales are missing or broken; writing the planned tensors raises it when a product is no
    normal BF16 number.
    """
    if mode == "none":
        return Folding(record=KvFold(mode="none"), replace={})
    scales = tensor_scales(checkpoint) if mode == "tensor" else channel_scales(checkpoint)
    return Folding(
        record=KvFold(mode=mode, layers=[layer.to_record() for layer in scales]),
        replace={t.name: t for layer in scales for t in _fold_layer(checkpoint, layer)},
        warnings=tuple(_query_warnings(checkpoint, scales, quantized_q=quantized_q)),
    )


def _fold_layer(checkpoint: Checkpoint, scales: LayerScales) -> Iterator[PlannedTensor]:
    a = checkpoint.architecture
    group = a.num_attention_heads // a.num_key_value_heads
    k_exponents, v_exponents = scales.k_exponents, scales.v_exponents
    q_rows = np.repeat(k_exponents, group, axis=0).reshape(-1)
    o_columns = np.repeat(v_exponents, group, axis=0).reshape(-1)
    by_row = {"k_proj": -k_exponents.reshape(-1), "v_proj": -v_exponents.reshape(-1), "q_proj": q_rows}
    prefix = f"model.layers.{scales.layer}.self_attn"
    for projection, exponents in by_row.items():
        yield from _scaled(checkpoint, f"{prefix}.{projection}.weight", exponents[:, None])
        if a.attention_bias:
            yield from _scaled(checkpoint, f"{prefix}.{projection}.bias", exponents)
    yield from _scaled(checkpoint, f"{prefix}.o_proj.weight", o_columns[None, :])


def _scaled(checkpoint: Checkpoint, name: str, exponents: NDArray[np.int32]) -> Iterator[PlannedTensor]:
    """The tensor times 2^exponents, or nothing if that changes nothing."""
    if not exponents.any():
        return
    entry = checkpoint.entry(name)
    if entry.dtype != "BF16":
        raise CheckpointError("cannot be folded", file=entry.file, key=name, found=entry.dtype, expected="BF16")

    def chunks() -> list[NDArray[np.uint8]]:
        try:
            bits = times_power_of_two(checkpoint.numpy(name), exponents)
        except InexactFoldError as error:
            raise CheckpointError(
                f"the KV scale cannot be folded exactly: {error}", file=entry.file, key=name
            ) from None
        return [bits.reshape(-1).view(np.uint8)]

    yield PlannedTensor(name=name, spec=TensorSpec(dtype=entry.dtype, shape=entry.shape), chunks=chunks)


def _query_warnings(checkpoint: Checkpoint, scales: list[LayerScales], *, quantized_q: bool) -> Iterator[str]:
    """Folding multiplies Q by s_k; an engine that quantizes Q to FP8 as well would saturate it at 448."""
    file = checkpoint.path / KV_CALIBRATION_NAME
    amax = read_amax(file, checkpoint) if file.is_file() else {}
    enlarges = any((layer.k_exponents > 0).any() for layer in scales)
    if quantized_q and enlarges and not any(kind == "q" for _, kind in amax):
        yield (
            "the fold enlarges Q, and whether FP8 can hold it cannot be checked: "
            f"no {KV_CALIBRATION_NAME} says how large it is (`calibrate kv` writes one)"
        )
    group = checkpoint.architecture.num_attention_heads // checkpoint.architecture.num_key_value_heads
    for layer in scales:
        q_amax = amax.get((layer.layer, "q"))
        if q_amax is None:
            continue
        largest = float((q_amax * np.exp2(np.repeat(layer.k_exponents, group, axis=0))).max())
        if math.isfinite(largest) and largest < E4M3_MAX:
            continue
        if quantized_q:
            raise CheckpointError(
                "FP8 cannot hold the folded queries, which the engine's attention quantizes",
                file=file,
                key=f"model.layers.{layer.layer}.self_attn.q_amax",
                found=f"{largest:g}",
                expected="below 448; or quantized_q: false, or fold: none",
            )
        yield (
            f"layer {layer.layer}: the folded queries reach {largest:g}, beyond FP8's 448; "
            "do not let an engine quantize Q"
        )
