"""Fixtures of the build room: importance files and child architecture files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from puzzle_trtllm.safetensors_file import encode_header

WriteImportance = Callable[..., Path]


@pytest.fixture
def write_importance(tmp_path: Path) -> WriteImportance:
    """`write_importance([layer scores, ...], fingerprint=None, dtype="F32")` writes an importance file."""

    def write(
        scores: Sequence[Sequence[float]],
        *,
        fingerprint: str | None = None,
        dtype: str = "F32",
        layers: Sequence[int] | None = None,
    ) -> Path:
        arrays = [np.asarray(s, dtype=np.float32 if dtype == "F32" else np.float64) for s in scores]
        names = [f"model.layers.{i}.mlp.experts.importance" for i in (layers or range(len(arrays)))]
        metadata = {"method": "test", **({} if fingerprint is None else {"parent_fingerprint": fingerprint})}
        header = encode_header(dict(zip(names, [(dtype, a.shape) for a in arrays], strict=True)), metadata)
        file = tmp_path / "importance.safetensors"
        file.write_bytes(header + b"".join(a.tobytes() for a in arrays))
        return file

    return write


@pytest.fixture
def write_architecture(tmp_path: Path) -> Callable[..., Path]:
    """`write_architecture([(num_experts, window), ...])` writes a child architecture file."""

    def write(blocks: Sequence[tuple[int, int | None]]) -> Path:
        file = tmp_path / "child_architecture.json"
        entries = [{"num_local_experts": experts, "sliding_window": window} for experts, window in blocks]
        file.write_text(json.dumps({"block_configs": entries}))
        return file

    return write
