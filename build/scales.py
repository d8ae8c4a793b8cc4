"""From calibrated KV scales to the powers of two that are folded into the weights.

A scale s maps the range that calibration saw onto FP8's: stored = value / s. Folding needs a power of two to be exact,
so s becomes s' = 2^ceil(log2 s): rounded up, because rounding down would saturate. The spare bit for inputs outside the
calibration set is calibration's business and already in s.

- `tensor`: one s' for K and one for V a layer, from the checkpoint's scale tensors (under any of their names).
- `channel`: K per rotary pair (i, i + head_dim / 2 in the Hugging Face half-split layout: RoPE turns the two into each
  other, so they must share a scale), V per channel, from `kv_calibration.safetensors`. The checkpoint's own scale says
  how many spare bits calibration wanted; every channel gets as many.
A scale or amax of 0 means that nothing was ever seen there: s' = 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.config_values import section
from puzzle_trtllm.engine import LayerFold
from puzzle_trtllm.errors import ArchitectureError, CheckpointError
from puzzle_trtllm.json_files import read_json_object
from puzzle_trtllm.kv_scales import (
    KV_CALIBRATION_NAME,
    channel_exponents,
    fold_exponent,
    k_channel_exponents,
)
from puzzle_trtllm.safetensors_file import TensorEntry, read_header


@dataclass(frozen=True, kw_only=True)
class LayerScales:
    """One layer's scales and the exponents of their folds."""

    layer: int
    k_scale: float
    v_scale: float
    k_exponents: NDArray[np.int32]
    """int32 `[num_key_value_heads, head_dim]`: log2 of the fold of every K channel; equal within a rotary pair."""
    v_exponents: NDArray[np.int32]
    """The same for V."""

    def to_record(self) -> LayerFold:
        return LayerFold(
            layer=self.layer,
            k_scale=self.k_scale,
            v_scale=self.v_scale,
            k_fold=math.ldexp(1.0, int(self.k_exponents.max())),
            v_fold=math.ldexp(1.0, int(self.v_exponents.max())),
        )


def tensor_scales(checkpoint: Checkpoint) -> list[LayerScales]:
    """One fold a layer for K and one for V. Raises CheckpointError when a layer lacks a scale or has a broken one."""
    shape = (checkpoint.architecture.num_key_value_heads, checkpoint.architecture.head_dim)
    return [
        LayerScales(
            layer=layer,
            k_scale=k_scale,
            v_scale=v_scale,
            k_exponents=np.full(shape, fold_exponent(k_scale), dtype=np.int32),
            v_exponents=np.full(shape, fold_exponent(v_scale), dtype=np.int32),
        )
        for layer, (k_scale, v_scale) in enumerate(read_scales(checkpoint))
    ]


def channel_scales(checkpoint: Checkpoint) -> list[LayerScales]:
    """One fold a rotary pair of K and a channel of V.

    Raises CheckpointError when the scales or the KV calibration file are missing or do not fit the model.
    """
    file = checkpoint.path / KV_CALIBRATION_NAME
    if not file.is_file():
        raise CheckpointError("missing, and --fold channel needs it", file=file, expected="made by `calibrate kv`")
    amax = read_amax(file, checkpoint)
    result = []
    for layer, (k_scale, v_scale) in enumerate(read_scales(checkpoint)):
        result.append(
            LayerScales(
                layer=layer,
                k_scale=k_scale,
                v_scale=v_scale,
                k_exponents=k_channel_exponents(amax[layer, "k"], k_scale),
                v_exponents=channel_exponents(amax[layer, "v"], v_scale),
            )
        )
    return result


def read_scales(checkpoint: Checkpoint) -> list[tuple[float, float]]:
    """(k_scale, v_scale) of every layer, as calibrated. Raises CheckpointError naming what is missing or broken."""
    _check_algorithm(checkpoint.path / "hf_quant_config.json")
    result = []
    for layer in range(checkpoint.architecture.num_layers):
        pair = []
        for kind in ("k", "v"):
            entry = checkpoint.kv_scales.get((layer, kind))
            if entry is None:
                key = f"model.layers.{layer}.self_attn.{kind}_proj.{kind}_scale"
                raise CheckpointError("missing KV scale", file=checkpoint.path, key=key)
            pair.append(_read_scalar(checkpoint, entry))
        result.append((pair[0], pair[1]))
    return result


def _check_algorithm(file: Path) -> None:
    """Scales for another kind of cache have the same names and map onto another range."""
    try:
        config = read_json_object(file, CheckpointError) if file.is_file() else {}
        algorithm = section(config, "quantization", file).get("kv_cache_quant_algo")
    except ArchitectureError as error:
        raise CheckpointError(str(error)) from None
    if algorithm not in (None, "FP8"):
        key = "quantization.kv_cache_quant_algo"
        raise CheckpointError(
            "the KV scales are for another cache", file=file, key=key, found=algorithm, expected="FP8"
        )


def read_amax(file: Path, checkpoint: Checkpoint) -> dict[tuple[int, str], NDArray[np.float32]]:
    """Largest magnitudes by (layer, "k" | "v" | "q"): float32 `[heads, head_dim]`, K and Q after RoPE.

    Q may be absent from the file. Raises CheckpointError.
    """
    a = checkpoint.architecture
    entries, _ = read_header(file)
    result = {}
    for layer in range(a.num_layers):
        for kind, heads in (("k", a.num_key_value_heads), ("v", a.num_key_value_heads), ("q", a.num_attention_heads)):
            name = f"model.layers.{layer}.self_attn.{kind}_amax"
            if kind == "q" and name not in entries:
                continue
            result[layer, kind] = _read_amax(file, entries, name, (heads, a.head_dim))
    return result


def _read_amax(
    file: Path, entries: Mapping[str, TensorEntry], name: str, shape: tuple[int, int]
) -> NDArray[np.float32]:
    entry = entries.get(name)
    found = None if entry is None else f"{entry.dtype} {list(entry.shape)}"
    if entry is None or found != f"F32 {list(shape)}":
        raise CheckpointError(
            "missing or of another shape", file=file, key=name, found=found, expected=f"F32 {list(shape)}"
        )
    values = np.fromfile(file, dtype=np.float32, count=math.prod(shape), offset=entry.offset).reshape(shape)
    if not (np.isfinite(values) & (values >= 0)).all():
        raise CheckpointError("negative, NaN or infinite", file=file, key=name)
    return values


def _read_scalar(checkpoint: Checkpoint, entry: TensorEntry) -> float:
    if math.prod(entry.shape) != 1:
        raise CheckpointError(
            "a KV scale must be one number", file=entry.file, key=entry.name, found=f"shape {list(entry.shape)}"
        )
    scale = float(checkpoint.float32(entry.name).reshape(()))
    if not math.isfinite(scale) or scale < 0:
        raise CheckpointError(
            "no usable scale", file=entry.file, key=entry.name, found=scale, expected="a finite number, not negative"
        )
    return scale
