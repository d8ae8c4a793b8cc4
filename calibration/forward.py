"""Running calibration data through a model, with a progress bar and an eye on every layer.

No KV cache is used: ModelOpt sees whole sequences, and each layer sees K and V exactly once. A layer whose output is
not finite is named at once; later layers would only spread the damage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import Progress

from puzzle_trtllm.calibration.dataset import CalibrationDataset
from puzzle_trtllm.calibration.ranks import ALONE, Ranks
from puzzle_trtllm.errors import CalibrationError

V = TypeVar("V")

MAX_TOKENS_PER_BATCH = 4096
ONE_THREAD_BELOW_PARAMETERS = 50_000_000
"""Smaller models run on one thread: their operations are too short to share, and on a busy machine the threads spend
their time waiting for each other (abacus, two threads on two loaded cores: 58 s instead of 1.9 s)."""


def run_dataset(
    model: Any, dataset: CalibrationDataset, *, what: str, quiet: bool = True, ranks: Ranks = ALONE
) -> None:
    """Run this rank's sequences through the decoder stack (no output head).

    Raises CalibrationError for NaN or infinity.
    """
    for _ in run_variants(model, dataset, [what], lambda _: None, what=what, quiet=quiet, ranks=ranks):
        pass


@torch.no_grad()
def run_variants(
    model: Any,
    dataset: CalibrationDataset,
    names: Sequence[V],
    choose: Callable[[V], None],
    *,
    what: str,
    quiet: bool = True,
    ranks: Ranks = ALONE,
) -> Iterator[dict[V, torch.Tensor]]:
    """For each of this rank's micro-batches: by name, the final hidden states `[B, T, D]` after `choose(name)`.

    Raises CalibrationError for NaN or infinity.
    """
    device = next(model.parameters()).device
    parameters = sum(parameter.numel() for parameter in model.parameters())
    batches = list(ranks.share(dataset.batches(MAX_TOKENS_PER_BATCH)))
    with naming_layers(model), threads(parameters), progress(quiet=quiet or not ranks.is_first) as bar:
        task = bar.add_task(what, total=len(names) * sum(ids_BT.size for ids_BT in batches))
        for ids_BT in batches:
            hidden = {}
            for name in names:
                choose(name)
                output = model.model(input_ids=torch.from_numpy(ids_BT).to(device), use_cache=False)
                hidden[name] = output.last_hidden_state
                bar.advance(task, ids_BT.size)
            yield hidden


def progress(*, quiet: bool) -> Progress:
    """A bar on stderr with the share that is done and the time that is left."""
    return Progress(console=Console(stderr=True), disable=quiet)


@contextmanager
def naming_layers(model: Any, *, first_layer: int = 0) -> Iterator[None]:
    """While this is open, the first decoder layer that gives NaN or infinity is named in a CalibrationError.

    `first_layer` is the index, in the whole model, of the first one here.
    """

    def check(layer_idx: int) -> Any:
        def hook(module: Any, arguments: Any, output: Any) -> None:
            require_finite(output[0] if isinstance(output, tuple) else output, f"model.layers.{layer_idx}")

        return hook

    handles = [layer.register_forward_hook(check(i)) for i, layer in enumerate(model.model.layers, first_layer)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def threads(parameters: int) -> Iterator[None]:
    """The number of threads for a model of so many parameters, while this is open."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads(parameters))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def num_threads(parameters: int) -> int:
    """Threads for a model of so many parameters: torch's own choice, or one."""
    return 1 if parameters < ONE_THREAD_BELOW_PARAMETERS else torch.get_num_threads()


def require_finite(values: torch.Tensor, name: str) -> None:
    """Raises CalibrationError naming `name` when a value is NaN or infinite."""
    if not torch.isfinite(values).all():
        found = "NaN" if torch.isnan(values).any() else "infinity"
        raise CalibrationError("activations are not finite", key=name, found=found)
