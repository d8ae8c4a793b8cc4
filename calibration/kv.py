"""`calibrate kv`: the FP8 scales of a model's KV cache, learned by ModelOpt from real prompts.

One forward pass of the exact model over the data; ModelOpt's max calibrator records the largest K and V of every layer.
The calibrated checkpoint is the source plus one scale for K and one for V a layer, under ModelOpt's names, with its
hf_quant_config.json; expert shards are hard links and config.json keeps its mxfp4 entry (ModelOpt's own export would
expand the experts to BF16 and drop it). Beside them: `kv_calibration.safetensors`, the maxima per head and channel that
a finer fold needs, and `kv_report.json`, what each scale does to K and V.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from puzzle_trtllm.calibration.dataset import CalibrationDataset, load_dataset
from puzzle_trtllm.calibration.forward import run_dataset
from puzzle_trtllm.calibration.kv_observer import KINDS, KvObserver
from puzzle_trtllm.calibration.kv_quantizers import calibrate_max, hf_quant_config, layer_amax
from puzzle_trtllm.calibration.kv_scales import StorageQuality, modelopt_scale, power_of_two_scale, storage_quality
from puzzle_trtllm.calibration.tensor_file import write_tensors
from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.checkpoint_writer import rewrite_checkpoint, tensor_of
from puzzle_trtllm.errors import CalibrationError
from puzzle_trtllm.folders import atomic_folder, write_atomically
from puzzle_trtllm.models.huggingface.loading import load_causal_lm

CALIBRATION_NAME = "kv_calibration.safetensors"
REPORT_NAME = "kv_report.json"


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
    checkpoint_fingerprint: str
    """Of the source, before it had scales."""
    versions: dict[str, str]
    layers: tuple[LayerReport, ...]


def calibrate_kv(
    checkpoint: str | Path,
    out: str | Path,
    *,
    dataset: str | Path | None = None,
    exact: bool = False,
    max_samples: int = 512,
    max_tokens: int = 262_144,
    sequence_length: int | None = None,
    pack: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    quiet: bool = True,
) -> KvCalibration:
    """Write the calibrated checkpoint `out`; scales are powers of two, or amax / 448 if `exact`.

    Raises CalibrationError (data, activations, a source that has scales without `overwrite`), CheckpointError, or
    PuzzleError when `out` holds something and `overwrite` is not given.
    """
    source = Checkpoint.open(checkpoint)
    if source.kv_scales and not overwrite:
        _, entry = next(iter(source.kv_scales.items()))
        raise CalibrationError("already has KV scales (--overwrite replaces them)", file=entry.file, key=entry.name)
    with atomic_folder(Path(out), overwrite=overwrite) as folder:
        data = load_dataset(
            dataset,
            source,
            max_samples=max_samples,
            max_tokens=max_tokens,
            sequence_length=sequence_length,
            pack=pack,
            seed=seed,
        )
        model, observer = observe(load_causal_lm(source, dtype=dtype), data, quiet=quiet)
        report = _report(source, data, model, observer, out=str(out), exact=exact, dtype=dtype)
        _write_checkpoint(source, folder, report)
        _write_maxima(folder, observer, report)
        write_atomically(folder / "hf_quant_config.json", json.dumps(hf_quant_config(model), indent=4))
        write_atomically(folder / REPORT_NAME, json.dumps(asdict(report), indent=2) + "\n")
    return report


def observe(model: Any, data: CalibrationDataset, *, quiet: bool = True) -> tuple[Any, KvObserver]:
    """Calibrate `model` on `data`: the model with ModelOpt's quantizers, and the finer maxima of the same pass."""
    observers: list[KvObserver] = []

    def forward_loop(prepared: Any) -> None:
        observers.append(KvObserver(prepared, data.num_tokens))
        try:
            run_dataset(prepared, data, what="KV calibration", quiet=quiet)
        finally:
            observers[0].close()

    return calibrate_max(model, forward_loop), observers[0]


def _report(
    source: Checkpoint,
    data: CalibrationDataset,
    model: Any,
    observer: KvObserver,
    *,
    out: str,
    exact: bool,
    dtype: torch.dtype,
) -> KvCalibration:
    to_scale = modelopt_scale if exact else power_of_two_scale
    layers = []
    for i, block in enumerate(source.architecture.blocks):
        k_amax, v_amax = layer_amax(model, i)
        layers.append(
            LayerReport(
                layer=i,
                sliding_window=block.sliding_window,
                k=_scale_report(k_amax, to_scale(k_amax), observer.sample(i, "k")),
                v=_scale_report(v_amax, to_scale(v_amax), observer.sample(i, "v")),
                q_amax=float(observer.amax(i, "q").max()),
            )
        )
    return KvCalibration(
        out=out,
        scale_rule="amax / 448" if exact else "2 * 2^ceil(log2(amax / 448))",
        num_sequences=len(data.sequences),
        num_tokens=data.num_tokens,
        dtype=str(dtype).removeprefix("torch."),
        dataset_fingerprint=data.fingerprint,
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


def _write_maxima(folder: Path, observer: KvObserver, report: KvCalibration) -> None:
    maxima = {
        f"model.layers.{layer.layer}.self_attn.{kind}_amax": observer.amax(layer.layer, kind).numpy()
        for layer in report.layers
        for kind in KINDS
    }
    metadata = {
        "dataset_fingerprint": report.dataset_fingerprint,
        "checkpoint_fingerprint": report.checkpoint_fingerprint,
        "dtype": report.dtype,
    }
    write_tensors(folder / CALIBRATION_NAME, maxima, metadata)
