"""Text that calibration does not see, to measure on.

Scales that were chosen on some text look good on that text: nothing there can saturate. So part of the sample is set
aside before calibration begins, the same part whether a report is wanted or not, or another file is named. Records are
set aside before they are packed into rows, so that no row's end is seen where its beginning is measured.
"""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import Any

from puzzle_trtllm.calibration.dataset import CalibrationDataset, DataOptions, load_dataset
from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.errors import CalibrationError

MAX_SEQUENCES = 32
ONE_OF = 8
"""One sequence of so many is set aside by default, up to MAX_SEQUENCES."""

HeldOut = int | str | Path | None
"""How many sequences to set aside (0: none), a file to read instead, or None for the default."""


def set_aside(
    data: CalibrationDataset, held_out: HeldOut, checkpoint: Checkpoint, options: DataOptions | None = None
) -> tuple[CalibrationDataset, CalibrationDataset]:
    """(for calibration, held out); the second may be empty.

    `data` was loaded by `options`, but for packing, which is done here (`pack_later`). A held-out sequence is dropped
    when calibration sees it as well, token for token, or sees the same conversation at another effort. Raises
    CalibrationError when nothing would be left to calibrate on, and as `load_dataset` does for a file.
    """
    options = options or {}
    if isinstance(held_out, str | Path):
        calibration, measured = data, _load(held_out, checkpoint, options)
    else:
        calibration, measured = _split(data, held_out)
    measured = _without_repeats(measured, calibration)
    row_length = options.get("sequence_length")
    if options.get("pack") and row_length is not None:
        return calibration.packed(row_length), measured.packed(row_length)
    return calibration, measured


def _load(held_out: str | Path, checkpoint: Checkpoint, options: DataOptions) -> CalibrationDataset:
    """Read as the calibration data were, but for which records are drawn."""
    only_of_the_sample = {"dataset", "max_samples", "seed"}
    if Path(held_out).is_file():
        only_of_the_sample.add("dataset_config")  # files have none
    named: dict[str, Any] = {name: value for name, value in options.items() if name not in only_of_the_sample}
    return load_dataset(held_out, checkpoint, max_samples=MAX_SEQUENCES, pack_later=True, **named)


def _split(data: CalibrationDataset, wanted: int | None) -> tuple[CalibrationDataset, CalibrationDataset]:
    count = min(MAX_SEQUENCES, len(data.sequences) // ONE_OF) if wanted is None else wanted
    if not 0 <= count < len(data.sequences):
        expected = f"0 to {len(data.sequences) - 1}: the sample has {len(data.sequences)} sequences"
        raise CalibrationError("impossible", file=data.source, key="held_out", found=count, expected=expected)
    is_calibration = [i < len(data.sequences) - count for i in range(len(data.sequences))]
    return data.subset(is_calibration), data.subset([not kept for kept in is_calibration])


def _without_repeats(held_out: CalibrationDataset, calibration: CalibrationDataset) -> CalibrationDataset:
    tokens = {sequence.tobytes() for sequence in calibration.sequences}
    contents = set(calibration.contents)
    pairs = zip_longest(held_out.sequences, held_out.contents)  # rows of several records have no content
    return held_out.subset([ids.tobytes() not in tokens and content not in contents for ids, content in pairs])
