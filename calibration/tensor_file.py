"""Small results as one safetensors file, written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from puzzle_trtllm.folders import write_atomically
from puzzle_trtllm.safetensors_file import encode_header


def write_tensors(file: Path, tensors: Mapping[str, NDArray[np.float32]], metadata: Mapping[str, str]) -> None:
    """Write float32 tensors, in the given order, with `metadata` in the header."""
    arrays = {name: np.ascontiguousarray(values, dtype=np.float32) for name, values in tensors.items()}
    header = encode_header({name: ("F32", values.shape) for name, values in arrays.items()}, metadata)
    write_atomically(file, header + b"".join(values.tobytes() for values in arrays.values()))
