"""kv_report.json: what calibration learned about every layer, and what an FP8 KV cache costs and saves.

Quality is measured on held-out text (kv_quality.py); where there is none, its fields are null and `held_out_missing`
says why.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from puzzle_trtllm.architecture import BlockConfig, PuzzleArchitecture
from puzzle_trtllm.calibration.kv_quality import FP8_STORES
from puzzle_trtllm.calibration.kv_scales import StorageQuality, storage_quality
from puzzle_trtllm.folders import write_atomically

REPORT_NAME = "kv_report.json"
DEFAULT_LENGTHS = (8_192, 131_072)


@dataclass(frozen=True, kw_only=True)
class ScaleReport:
    """One scale of a layer, and what storing at it does to the values of held-out text."""

    amax: float
    scale: float
    calibrated: StorageQuality | None
    unit: StorageQuality | None
    """The same values stored at scale 1.0, so that nobody has to believe that calibration helped."""
    channel: StorageQuality | None
    """Stored at one power of two a channel, as `build --fold channel` folds them."""


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One layer's K and V."""

    layer: int
    sliding_window: int | None
    k: ScaleReport
    v: ScaleReport
    q_amax: float
    saved_bytes: dict[str, int]
    """By sequence length: bytes a sequence that FP8 saves over BF16 in this layer."""


@dataclass(frozen=True, kw_only=True)
class StoreReport:
    """What one way to store K and V changes in the output, against a BF16 cache."""

    kl: float
    """Mean KL divergence of the next-token distribution, nats a token."""
    top1_agreement: float
    """Share of tokens whose most likely successor is the same."""
    kl_over_unit: float
    """Mean over sequences of (KL - KL at unit scale); below 0 is better than no calibration."""
    kl_over_unit_standard_error: float | None
    """Of that mean; None for one sequence."""


@dataclass(frozen=True, kw_only=True)
class HeldOutReport:
    """End to end, on text that calibration did not see."""

    num_sequences: int
    num_tokens: int
    dataset_fingerprint: str
    stores: dict[str, StoreReport]
    """`unit`, `calibrated`, `channel`; see kv_quality.py."""


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
    saved_bytes: dict[str, int]
    """By sequence length: bytes a sequence, all layers."""
    held_out: HeldOutReport | None
    held_out_missing: str | None

    def write(self, folder: Path) -> None:
        write_atomically(folder / REPORT_NAME, json.dumps(asdict(self), indent=2, allow_nan=False) + "\n")


def scale_report(amax: float, scale: float, sums_SN: torch.Tensor | None) -> ScaleReport:
    """`sums_SN` are the sums by FP8 store of `storage_sums`, None where nothing was measured."""
    found: dict[str, StorageQuality | None] = dict.fromkeys(FP8_STORES)
    if sums_SN is not None:
        found = {store: storage_quality(sums) for store, sums in zip(FP8_STORES, sums_SN, strict=True)}
    return ScaleReport(
        amax=amax, scale=scale, calibrated=found["calibrated"], unit=found["unit"], channel=found["channel"]
    )


def store_reports(rows_BSN: torch.Tensor) -> dict[str, StoreReport]:
    """From the rows of `compare_outputs`, one a held-out sequence."""
    tokens_B = rows_BSN[:, 0, 0]
    total = float(tokens_B.sum())
    over_unit_BS = (rows_BSN[:, :, 1] - rows_BSN[:, :1, 1]) / tokens_B[:, None]
    many = len(tokens_B) > 1
    return {
        store: StoreReport(
            kl=float(rows_BSN[:, i, 1].sum()) / total,
            top1_agreement=float(rows_BSN[:, i, 2].sum()) / total,
            kl_over_unit=float(over_unit_BS[:, i].mean()),
            kl_over_unit_standard_error=float(over_unit_BS[:, i].std()) / math.sqrt(len(tokens_B)) if many else None,
        )
        for i, store in enumerate(FP8_STORES)
    }


def sequence_lengths(a: PuzzleArchitecture, wanted: Sequence[int]) -> list[int]:
    """The lengths to tell savings at: those wanted, or the usual ones, none above the model's limit."""
    return sorted({min(length, a.max_position_embeddings) for length in wanted or DEFAULT_LENGTHS})


def saved_bytes(a: PuzzleArchitecture, block: BlockConfig, num_tokens: int) -> int:
    """Bytes that FP8 instead of BF16 saves in one layer of a sequence of `num_tokens`."""
    kept = num_tokens if block.sliding_window is None else min(block.sliding_window, num_tokens)
    return kept * (a.kv_bytes_per_token_and_layer("bf16") - a.kv_bytes_per_token_and_layer("fp8"))
