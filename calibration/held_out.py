"""Text that calibration does not see, to measure on.

Scales that were chosen on some text look good on that text: nothing there can saturate. So part of the sample is set
aside before calibration begins, the same part whether a report is wanted or not, or another file is named.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from puzzle_trtllm.calibration.dataset import CalibrationDataset, load_dataset
from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.errors import CalibrationError

MAX_SEQUENCES = 32
ONE_OF = 8
"""One sequence of so many is set aside by default, up to MAX_SEQUENCES."""

HeldOut = int | str | Path | None
"""How many sequences to set aside (0: none), a file to read instead, or None for the default."""


def set_aside(
    data: CalibrationDataset, held_out: HeldOut, checkpoint: Checkpoint, *, sequence_length: int | None = None
) -> tuple[CalibrationDataset, CalibrationDataset]:
    """(for calibration, held out); the second may be empty.

    A held-out sequence that calibration sees as well, token for token, is dropped. Raises CalibrationError when nothing
    would be left to calibrate on, and as `load_dataset` does for a file.
    """
    if isinstance(held_out, str | Path):
        other = load_dataset(held_out, checkpoint, max_samples=MAX_SEQUENCES, sequence_length=sequence_length)
        return data, _without_repeats(other, data)
    count = min(MAX_SEQUENCES, len(data.sequences) // ONE_OF) if held_out is None else held_out
    if not 0 <= count < len(data.sequences):
        expected = f"0 to {len(data.sequences) - 1}: the sample has {len(data.sequences)} sequences"
        raise CalibrationError("impossible", file=data.source, key="held_out", found=count, expected=expected)
    cut = len(data.sequences) - count
    calibration = replace(data, sequences=data.sequences[:cut])
    return calibration, _without_repeats(replace(data, sequences=data.sequences[cut:]), calibration)


def _without_repeats(held_out: CalibrationDataset, calibration: CalibrationDataset) -> CalibrationDataset:
    seen = {sequence.tobytes() for sequence in calibration.sequences}
    return replace(held_out, sequences=tuple(s for s in held_out.sequences if s.tobytes() not in seen))
