"""`calibrate kv`: the FP8 scales of a model's KV cache, learned by ModelOpt from real prompts.

One forward pass of the exact model over the data; ModelOpt's max calibrator records the largest K and V of every layer.
A model that does not fit in memory goes layer by layer (layer_stream.py), with the same result to the bit; several
processes can share the data (ranks.py), with the same result again. Held-out text then goes through the model with FP8
caches of several kinds, to say what each costs (kv_quality.py).

The calibrated checkpoint is the source plus one scale for K and one for V a layer, under ModelOpt's names, with its
hf_quant_config.json; expert shards are hard links and config.json keeps its mxfp4 entry (ModelOpt's own export would
expand the experts to BF16 and drop it). Beside them: `kv_calibration.safetensors`, the maxima per head and channel that
a finer fold needs, `kv_report.json`, what each scale does to K and V and to the output, and the same as a page.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from puzzle_trtllm.calibration.dataset import CalibrationDataset, DataOptions, load_chosen
from puzzle_trtllm.calibration.forward import MAX_TOKENS_PER_BATCH, run_dataset, run_variants
from puzzle_trtllm.calibration.held_out import HeldOut, set_aside
from puzzle_trtllm.calibration.kv_observer import KINDS, KvObserver
from puzzle_trtllm.calibration.kv_page import write_page
from puzzle_trtllm.calibration.kv_quality import STORES, StoredKv, StoreScales, compare_outputs, scales_of_layer
from puzzle_trtllm.calibration.kv_quantizers import calibrate_max, hf_quant_config, layer_amax
from puzzle_trtllm.calibration.kv_report import (
    HeldOutReport,
    KvCalibration,
    LayerReport,
    saved_bytes,
    scale_report,
    sequence_lengths,
    store_reports,
)
from puzzle_trtllm.calibration.kv_scales import modelopt_scale, power_of_two_scale
from puzzle_trtllm.calibration.layer_stream import LayerRun, Observation, ReadHidden, SideRuns, stream_layers
from puzzle_trtllm.calibration.memory import should_stream
from puzzle_trtllm.calibration.one_layer import output_head
from puzzle_trtllm.calibration.rank_processes import run_ranks
from puzzle_trtllm.calibration.ranks import ALONE, Ranks, require_enough, torchrun_ranks
from puzzle_trtllm.calibration.tensor_file import write_tensors
from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.checkpoint_writer import bytes_to_write, rewrite_checkpoint, tensor_of
from puzzle_trtllm.errors import CalibrationError
from puzzle_trtllm.folders import atomic_folder, write_atomically
from puzzle_trtllm.kv_scales import KV_CALIBRATION_NAME
from puzzle_trtllm.models.huggingface.loading import load_causal_lm
from puzzle_trtllm.output_folder import check_output_folder

if TYPE_CHECKING:
    from typing_extensions import Unpack

WHAT = "KV calibration"
QUALITY = "FP8 KV on held-out text"
MAX_TOKENS = 262_144
"""To calibrate on, unless the data options say otherwise."""


@dataclass(frozen=True, kw_only=True)
class KvOptions:
    """What `calibrate kv` can be told."""

    checkpoint: str
    out: Path
    data: DataOptions
    held_out: HeldOut
    """Sequences of the sample that are set aside to measure on, or another file; None: an eighth, 32 at most."""
    quality: bool
    """Measure on the held-out text what FP8 costs; without it calibration is one forward pass."""
    seq_lens: Sequence[int]
    """Sequence lengths at which the report says what FP8 saves."""
    exact: bool
    """Scales amax / 448 instead of powers of two."""
    dtype: torch.dtype
    stream: bool | None
    """One layer in memory at a time; None decides by the memory that is free. The result is the same."""
    device: str
    """`cpu`, or `cuda`: rank r then takes GPU r modulo their number."""
    overwrite: bool
    quiet: bool


@dataclass(frozen=True, kw_only=True)
class _Work:
    """One rank's part of the job."""

    options: KvOptions
    source: Checkpoint
    data: CalibrationDataset
    held_out: CalibrationDataset
    """Empty when nothing is to be measured."""
    ranks: Ranks

    @property
    def device(self) -> torch.device:
        if self.options.device == "cuda":
            return torch.device("cuda", self.ranks.rank % torch.cuda.device_count())
        return torch.device(self.options.device)

    @property
    def to_scale(self) -> Callable[[float], float]:
        return modelopt_scale if self.options.exact else power_of_two_scale

    def store_scales(self, layer: Observation) -> StoreScales:
        k_scale, v_scale = (self.to_scale(float(layer[f"{kind}_amax"])) for kind in "kv")
        return scales_of_layer(k_scale, v_scale, layer["k"], layer["v"])


def calibrate_kv(
    checkpoint: str | Path,
    out: str | Path,
    *,
    held_out: HeldOut = None,
    quality: bool = True,
    seq_lens: Sequence[int] = (),
    exact: bool = False,
    dtype: torch.dtype = torch.float32,
    stream: bool | None = None,
    ranks: int = 1,
    device: str = "cpu",
    overwrite: bool = False,
    quiet: bool = True,
    **data_options: Unpack[DataOptions],
) -> KvCalibration:
    """Write the calibrated checkpoint `out`; `KvOptions` says what each option does.

    What to calibrate on: `dataset` and the other keywords of DataOptions; at most 262,144 tokens unless they say so.
    `ranks` processes on this machine share the data; under torchrun its processes do. The result is the same.
    Raises CalibrationError (data, activations, a source that has scales without `overwrite`, a rank that died),
    CheckpointError, or PuzzleError when `out` holds something and `overwrite` is not given.
    """
    options = KvOptions(
        checkpoint=str(checkpoint),
        out=Path(out),
        data=data_options,
        held_out=held_out,
        quality=quality,
        seq_lens=tuple(seq_lens),
        exact=exact,
        dtype=dtype,
        stream=stream,
        device=device,
        overwrite=overwrite,
        quiet=quiet,
    )
    if ranks > 1:
        # What cannot be shared is refused before any process starts: 500 of them would take the machine with them.
        _prepare(Checkpoint.open(options.checkpoint), options, Ranks(rank=0, size=ranks))
        result: KvCalibration = run_ranks(ranks, _calibrate, {"options": options, "num_local_ranks": ranks})
        return result
    with torchrun_ranks() as world:
        return _calibrate(world, options=options, num_local_ranks=world.size)


def _calibrate(ranks: Ranks, *, options: KvOptions, num_local_ranks: int) -> KvCalibration:
    _require_device(options.device)
    source = Checkpoint.open(options.checkpoint)
    if ranks.is_first:
        held_out = options.held_out if isinstance(options.held_out, str | Path) else None
        others = (options.data.get("dataset"), held_out)
        num_bytes = bytes_to_write(source, options.out)
        check_output_folder(options.out, source=source.path, num_bytes=num_bytes, others=others)
    if source.kv_scales and not options.overwrite:
        _, entry = next(iter(source.kv_scales.items()))
        raise CalibrationError("already has KV scales (--overwrite replaces them)", file=entry.file, key=entry.name)
    with atomic_folder(options.out, overwrite=options.overwrite) if ranks.is_first else nullcontext() as folder:
        work, missing = _prepare(source, options, ranks)
        streamed = should_stream(source, options.dtype, wanted=options.stream, num_copies=num_local_ranks)
        streamed = bool(ranks.smallest(int(streamed)))  # all the same way, though free memory changes
        seen, outputs = _stream(work) if streamed else _run_whole(work)
        report = _report(work, seen, outputs, missing=missing)
        if folder is not None:
            _write_checkpoint(source, folder, report)
            _write_maxima(folder, seen, report)
            write_atomically(folder / "hf_quant_config.json", seen[0]["hf_quant_config"].numpy().tobytes())
            report.write(folder)
            write_page(report, folder)
    return report


def _require_device(device: str) -> None:
    if device not in ("cpu", "cuda"):
        raise CalibrationError("unknown", key="device", found=device, expected="cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise CalibrationError("no GPU that torch can use", key="device", found=device, expected="cpu")


def _prepare(source: Checkpoint, options: KvOptions, ranks: Ranks) -> tuple[_Work, str | None]:
    """The work, and why nothing can be measured, if so."""
    sample = load_chosen(source, options.data, max_tokens=MAX_TOKENS, pack_later=True)
    data, held_out = set_aside(sample, options.held_out, source, options.data)
    require_enough(sum(1 for _ in data.batches(MAX_TOKENS_PER_BATCH)), ranks)
    missing = None
    if not options.quality:
        missing = "not asked for"
    elif not held_out.sequences:
        missing = "no held-out text: the sample is too small, or calibration sees all of it"
    if missing is not None:
        held_out = CalibrationDataset(source=held_out.source, sequences=())
    return _Work(options=options, source=source, data=data, held_out=held_out, ranks=ranks), missing


def _run_whole(work: _Work) -> tuple[list[Observation], list[torch.Tensor]]:
    """By layer what was seen, and by micro-batch of held-out text what FP8 changed (kv_quality.compare_outputs)."""
    model = load_causal_lm(work.source, dtype=work.options.dtype).to(work.device)
    quiet, ranks = work.options.quiet, work.ranks
    seen = observe(model, lambda m: run_dataset(m, work.data, what=WHAT, quiet=quiet, ranks=ranks), ranks=ranks)
    outputs: list[torch.Tensor] = []
    if work.held_out.sequences:
        stored = StoredKv(model, [work.store_scales(layer) for layer in seen])
        variants = run_variants(model, work.held_out, STORES, stored.choose, what=QUALITY, quiet=quiet, ranks=ranks)
        outputs = [compare_outputs(hidden_BTD, model.lm_head.weight) for hidden_BTD in variants]
        for i, layer in enumerate(seen):
            layer["quality"] = stored.sums(i)
    return seen, outputs


def _stream(work: _Work) -> tuple[list[Observation], list[torch.Tensor]]:
    """The same with one layer in memory at a time."""
    outputs: list[torch.Tensor] = []

    def visit(model: Any, run: LayerRun, layer: int) -> Observation:
        seen = observe(model, run, first_layer=layer, ranks=work.ranks)[0]
        if work.held_out.sequences:
            stored = StoredKv(model, [work.store_scales(seen)])
            for store in STORES:
                stored.choose(store)
                run.side(model, store)
            seen["quality"] = stored.sums(0)
        return seen

    def finish(read: ReadHidden) -> None:
        norm, head_VD = output_head(work.source, dtype=work.options.dtype, device=work.device)
        for batches in zip(*(read(store) for store in STORES), strict=True):
            hidden_BTD = {store: norm(batch.to(work.device)) for store, batch in zip(STORES, batches, strict=True)}
            outputs.append(compare_outputs(hidden_BTD, head_VD))

    side_runs = SideRuns(data=work.held_out, names=STORES, finish=finish) if work.held_out.sequences else None
    seen = stream_layers(
        work.source,
        work.data,
        visit,
        out=work.options.out,
        what=WHAT,
        dtype=work.options.dtype,
        quiet=work.options.quiet,
        side_runs=side_runs,
        settings={"exact": work.options.exact},
        ranks=work.ranks,
        device=work.device,
    )
    return seen, outputs


def observe(model: Any, run: Callable[[Any], None], *, first_layer: int = 0, ranks: Ranks = ALONE) -> list[Observation]:
    """Calibrate `model` with the pass `run`; by layer, what ModelOpt and the observer saw on all ranks.

    `k_amax` and `v_amax` (0-d) are ModelOpt's, which it reduces over the ranks itself; `q`, `k`, `v`
    `[heads, head_dim]` the finer maxima of the same pass. All float32, but for `hf_quant_config`: that file's bytes, by
    ModelOpt's own export code.
    """
    observers: list[KvObserver] = []

    def forward_loop(prepared: Any) -> None:
        observers.append(KvObserver(prepared, first_layer=first_layer))
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
        layer |= {kind: ranks.maximum(observers[0].amax(first_layer + i, kind)) for kind in KINDS}
        seen.append(layer)
    return seen


def _report(work: _Work, seen: list[Observation], outputs: list[torch.Tensor], *, missing: str | None) -> KvCalibration:
    a, options = work.source.architecture, work.options
    lengths = sequence_lengths(a, options.seq_lens)
    layers = []
    for i, (block, layer) in enumerate(zip(a.blocks, seen, strict=True)):
        sums: dict[str, torch.Tensor | None] = {"k": None, "v": None}
        if missing is None:
            both = torch.stack(work.ranks.in_order(layer["quality"].unbind())).sum(dim=0)
            sums = {"k": both[0], "v": both[1]}
        k, v = (
            scale_report(amax, work.to_scale(amax), sums[kind])
            for kind, amax in ((kind, float(layer[f"{kind}_amax"])) for kind in ("k", "v"))
        )
        layers.append(
            LayerReport(
                layer=i,
                sliding_window=block.sliding_window,
                k=k,
                v=v,
                q_amax=float(layer["q"].max()),
                saved_bytes={str(length): saved_bytes(a, block, length) for length in lengths},
            )
        )
    return KvCalibration(
        out=str(options.out),
        scale_rule="amax / 448" if options.exact else "2 * 2^ceil(log2(amax / 448))",
        num_sequences=len(work.data.sequences),
        num_tokens=work.data.num_tokens,
        dtype=str(options.dtype).removeprefix("torch."),
        dataset_fingerprint=work.data.fingerprint,
        dataset_is_bundled=work.data.is_bundled,
        checkpoint_fingerprint=work.source.fingerprint(),
        versions={name: version(name) for name in ("nvidia-modelopt", "torch", "transformers")},
        layers=tuple(layers),
        saved_bytes={str(length): sum(layer.saved_bytes[str(length)] for layer in layers) for length in lengths},
        held_out=None if missing is not None else _held_out_report(work, outputs),
        held_out_missing=missing,
    )


def _held_out_report(work: _Work, outputs: list[torch.Tensor]) -> HeldOutReport:
    return HeldOutReport(
        num_sequences=len(work.held_out.sequences),
        num_tokens=work.held_out.num_tokens,
        dataset_fingerprint=work.held_out.fingerprint,
        stores=store_reports(torch.cat(work.ranks.in_order(outputs))),
    )


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
