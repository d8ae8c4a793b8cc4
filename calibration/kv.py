"""`calibrate kv`: the FP8 scales of a model's KV cache, learned by ModelOpt from real prompts.

One forward pass of the exact model over the data; ModelOpt's max calibrator records the largest K and V of every layer.
A model that does not fit in memory goes layer by layer (layer_stream.py), with the same result to the bit.
The calibrated checkpoint is the source plus one scale for K and one for V a layer, under ModelOpt's names, with its
hf_quant_config.json; expert shards are hard links and config.json keeps its mxfp4 entry (ModelOpt's own export would
expand the experts to BF16 and drop it). Beside them: `kv_calibration.safetensors`, the maxima per head and channel that
a finer fold needs, and `kv_report.json`, what each scale does to K and V.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from puzzle_trtllm.calibration.dataset import CalibrationDataset, DataOptions, load_chosen
from puzzle_trtllm.calibration.forward import run_dataset
from puzzle_trtllm.calibration.kv_observer import KINDS, KvObserver
from puzzle_trtllm.calibration.kv_quantizers import calibrate_max, hf_quant_config, layer_amax
from puzzle_trtllm.calibration.kv_scales import StorageQuality, modelopt_scale, power_of_two_scale, storage_quality
from puzzle_trtllm.calibration.layer_stream import Observation, stream_layers
from puzzle_trtllm.calibration.memory import should_stream
from puzzle_trtllm.calibration.tensor_file import write_tensors
from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.checkpoint_writer import rewrite_checkpoint, tensor_of
from puzzle_trtllm.errors import CalibrationError
from puzzle_trtllm.folders import atomic_folder, write_atomically
from puzzle_trtllm.kv_scales import KV_CALIBRATION_NAME
from puzzle_trtllm.models.huggingface.loading import load_causal_lm

if TYPE_CHECKING:
    from typing_extensions import Unpack

REPORT_NAME = "kv_report.json"
WHAT = "KV calibration"
MAX_TOKENS = 262_144


@dataclass(frozen=True, kw_only=True)
class ScaleReport:
    """One scale: where it comes from and what it does, measured on a sample of the calibration tokens."""

    amax: float
    scale: float
    calibrated: StorageQuality
    unit: StorageQuality
    """The same values stored at scale 1.0, so that nobody has to believe that calibration helped."""


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One layer's K and V."""

    layer: int
    sliding_window: int | None
    k: ScaleReport
    v: ScaleReport
    q_amax: float


@dataclass(frozen=True, kw_only=True)
class KvCalibration:
    """What was learned, and from what; also the content of kv_report.json."""

    out: str
    scale_rule: str
    num_sequences: int
    num_tokens: int
    dtype: str
    dataset_fingerprint: str
    dataset_is_bundled: bool
    checkpoint_fingerprint: str
    """Of the source, before it had scales."""
    versions: dict[str, str]
    layers: tuple[LayerReport, ...]


def calibrate_kv(
    checkpoint: str | Path,
    out: str | Path,
    *,
    exact: bool = False,
    dtype: torch.dtype = torch.float32,
    stream: bool | None = None,
    overwrite: bool = False,
    quiet: bool = True,
    **data_options: Unpack[DataOptions],
) -> KvCalibration:
    """Write the calibrated checkpoint `out`; scales are powers of two, or amax / 448 if `exact`.

    What to calibrate on: `dataset` and the other keywords of DataOptions; at most 262,144 tokens unless they say so.
    `stream` holds one layer in memory at a time; None decides by the memory that is free. The result is the same.
    Raises CalibrationError (data, activations, a source that has scales without `overwrite`), CheckpointError, or
    PuzzleError when `out` holds something and `overwrite` is not given.
    """
    source = Checkpoint.open(checkpoint)
    if source.kv_scales and not overwrite:
        _, entry = next(iter(source.kv_scales.items()))
        raise CalibrationError("already has KV scales (--overwrite replaces them)", file=entry.file, key=entry.name)
    with atomic_folder(Path(out), overwrite=overwrite) as folder:
        data = load_chosen(source, data_options, max_tokens=MAX_TOKENS)
        streamed = should_stream(source, dtype, wanted=stream)
        seen = (
            _stream(source, data, Path(out), dtype, quiet) if streamed else _observe_whole(source, data, dtype, quiet)
        )
        report = _report(source, data, seen, out=str(out), exact=exact, dtype=dtype)
        _write_checkpoint(source, folder, report)
        _write_maxima(folder, seen, report)
        write_atomically(folder / "hf_quant_config.json", seen[0]["hf_quant_config"].numpy().tobytes())
        write_atomically(folder / REPORT_NAME, json.dumps(asdict(report), indent=2) + "\n")
    return report


def _observe_whole(source: Checkpoint, data: CalibrationDataset, dtype: torch.dtype, quiet: bool) -> list[Observation]:
    model = load_causal_lm(source, dtype=dtype)
    return observe(model, lambda prepared: run_dataset(prepared, data, what=WHAT, quiet=quiet), data.num_tokens)


def _stream(
    source: Checkpoint, data: CalibrationDataset, out: Path, dtype: torch.dtype, quiet: bool
) -> list[Observation]:
    def visit(model: Any, run: Callable[[Any], None], layer: int) -> Observation:
        return observe(model, run, data.num_tokens, first_layer=layer)[0]

    return stream_layers(source, data, visit, out=out, what=WHAT, dtype=dtype, quiet=quiet)


def observe(model: Any, run: Callable[[Any], None], num_tokens: int, *, first_layer: int = 0) -> list[Observation]:
    """Calibrate `model` with the pass `run`; by layer, what ModelOpt and the observer saw.

    `k_amax` and `v_amax` (0-d) are ModelOpt's; `q`, `k`, `v` `[heads, head_dim]` the finer maxima of the same pass;
    `k_sample` and `v_sample` `[tokens, heads * head_dim]` some of the values. All float32, but for
    `hf_quant_config`: that file's bytes, by ModelOpt's own export code.
    """
    observers: list[KvObserver] = []

    def forward_loop(prepared: Any) -> None:
        observers.append(KvObserver(prepared, num_tokens, first_layer=first_layer))
        try:
            run(prepared)
        finally:
            observers[0].close()

    calibrate_max(model, forward_loop)
    quant_config = torch.tensor(list(json.dumps(hf_quant_config(model), indent=4).encode()), dtype=torch.uint8)
    seen = []
    for i in range(len(model.model.layers)):
        k_amax, v_amax = layer_amax(model, i)
        layer = {"k_amax": torch.tensor(k_amax), "v_amax": torch.tensor(v_amax), "hf_quant_config": quant_config}
        layer |= {kind: observers[0].amax(first_layer + i, kind) for kind in KINDS}
        layer |= {f"{kind}_sample": observers[0].sample(first_layer + i, kind) for kind in ("k", "v")}
        seen.append(layer)
    return seen


def _report(
    source: Checkpoint,
    data: CalibrationDataset,
    seen: list[Observation],
    *,
    out: str,
    exact: bool,
    dtype: torch.dtype,
) -> KvCalibration:
    to_scale = modelopt_scale if exact else power_of_two_scale
    layers = []
    for i, (block, layer) in enumerate(zip(source.architecture.blocks, seen, strict=True)):
        k_amax, v_amax = float(layer["k_amax"]), float(layer["v_amax"])
        layers.append(
            LayerReport(
                layer=i,
                sliding_window=block.sliding_window,
                k=_scale_report(k_amax, to_scale(k_amax), layer["k_sample"]),
                v=_scale_report(v_amax, to_scale(v_amax), layer["v_sample"]),
                q_amax=float(layer["q"].max()),
            )
        )
    return KvCalibration(
        out=out,
        scale_rule="amax / 448" if exact else "2 * 2^ceil(log2(amax / 448))",
        num_sequences=len(data.sequences),
        num_tokens=data.num_tokens,
        dtype=str(dtype).removeprefix("torch."),
        dataset_fingerprint=data.fingerprint,
        dataset_is_bundled=data.is_bundled,
        checkpoint_fingerprint=source.fingerprint(),
        versions={name: version(name) for name in ("nvidia-modelopt", "torch", "transformers")},
        layers=tuple(layers),
    )


def _scale_report(amax: float, scale: float, values: torch.Tensor) -> ScaleReport:
    calibrated, unit = storage_quality(values, scale), storage_quality(values, 1.0)
    return ScaleReport(amax=amax, scale=scale, calibrated=calibrated, unit=unit)


def _write_checkpoint(source: Checkpoint, folder: Path, report: KvCalibration) -> None:
    """The source with its K and V scales replaced; everything else unchanged."""
    add = [
        tensor_of(f"model.layers.{layer.layer}.self_attn.{kind}_proj.{kind}_scale", "F32", np.array(scale.scale, "<f4"))
        for layer in report.layers
        for kind, scale in (("k", layer.k), ("v", layer.v))
    ]
    old = {entry.name: None for (_, kind), entry in source.kv_scales.items() if kind in ("k", "v")}
    rewrite_checkpoint(source, folder, config=source.config, replace=old, add=add)


def _write_maxima(folder: Path, seen: list[Observation], report: KvCalibration) -> None:
    maxima = {
        f"model.layers.{layer.layer}.self_attn.{kind}_amax": seen[layer.layer][kind].numpy()
        for layer in report.layers
        for kind in KINDS
    }
    metadata = {
        "dataset_fingerprint": report.dataset_fingerprint,
        "checkpoint_fingerprint": report.checkpoint_fingerprint,
        "dtype": report.dtype,
    }
    write_tensors(folder / KV_CALIBRATION_NAME, maxima, metadata)
