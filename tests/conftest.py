"""What every room's tests share: repeatable random numbers, a core for each worker, toy checkpoints in one line."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers

from tests.toys import Blocks, toy_architecture, write_toy_checkpoint

MakeCheckpoint = Callable[..., Path]

# The same examples at every run, and no time limit: a busy machine must not fail a test.
settings.register_profile(
    "repeatable", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)
settings.load_profile("repeatable")
# Nor do they depend on which modules other tests have imported, whose constants hypothesis would mix in. It has no
# setting for that; where it names the function otherwise, examples differ between runs and nothing else does.
if hasattr(providers, "_local_constants"):
    providers._get_local_constants = lambda: providers._local_constants

TORCH_SEED = 67280421310721
"""What torch starts with: a test that is the first to import it draws the same numbers as one that is not."""

TERMINAL = ("COLUMNS", "FORCE_COLOR", "GITHUB_ACTIONS", "LINES", "NO_COLOR", "PY_COLORS", "TERMINAL_WIDTH")
"""What typer and rich ask the environment for, so that tables and help would be coloured, or broken into other lines,
where a shell or a CI sets them."""


def pytest_configure() -> None:
    """Signals do what they do in a terminal, also under nohup and behind a shell's `&`, which have them ignored.

    The tests and the processes that they start have one core each: where others want the cores too, two threads wait
    for each other at every operation (five minutes and more for a test that takes one). A test of what several threads
    do asks for them itself.
    """
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)
    for name in TERMINAL:
        os.environ.pop(name, None)
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Seed every generator before each test and its fixtures: no test's numbers depend on which ones ran before it."""
    random.seed(0)
    np.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(TORCH_SEED)


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
