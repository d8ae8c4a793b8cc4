"""Fixtures that every room uses: toy checkpoints in the released format, made in one line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import settings

from tests.toys import Blocks, toy_architecture, write_toy_checkpoint

MakeCheckpoint = Callable[..., Path]

# The same examples at every run, and no deadline: a busy machine must not fail a test.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """`make_checkpoint(blocks=[(num_experts, window or None), ...], seed=0, experts_format="mxfp4", **dims)`.

    Writes a new folder at every call, so a test may damage it. `model_type` is gpt_oss where a plain config can say the
    blocks (equal counts, one window size), else gpt_oss_puzzle. `kv_scales=[(k, v), ...]` adds ModelOpt's scales, one
    pair a layer; `max_shard_bytes` makes more shards; dims are the keywords of `tests.toys.toy_architecture`.
    """

    def make(
        blocks: Blocks,
        *,
        seed: int = 0,
        kv_scales: Sequence[tuple[float, float]] | None = None,
        max_shard_bytes: int = 5_000_000_000,
        **dims: object,
    ) -> Path:
        folder = tmp_path_factory.mktemp("toy") / "checkpoint"
        architecture = toy_architecture(blocks, **dims)  # type: ignore[arg-type]
        return write_toy_checkpoint(
            folder, architecture, seed=seed, kv_scales=kv_scales, max_shard_bytes=max_shard_bytes
        )

    return make
