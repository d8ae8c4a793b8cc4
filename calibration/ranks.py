"""Several processes calibrate one model: each takes its share of the micro-batches, and all agree on what was seen.

Micro-batch i goes to rank i modulo the number of ranks. A micro-batch is computed by one process from beginning to end,
so what it gives does not depend on how many there are. Maxima are combined by a maximum (`all_reduce`); everything else
is put back into the order of the micro-batches. One rank and several give the same files, bit for bit, at the same
number of threads a rank.

Processes come from `calibrate kv --ranks N` (rank_processes.py) or from torchrun, which may span machines.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import TypeVar

import torch
import torch.distributed as dist

from puzzle_trtllm.errors import CalibrationError

T = TypeVar("T")


PATIENCE = timedelta(days=7)
"""For the slowest of the ranks, whose micro-batches may be much longer. Closed sockets tell of death, not time."""


class LostRankError(CalibrationError):
    """Another rank has ended, so this one cannot go on; the other says why."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those that share the work; the default is alone."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """The one that writes and talks."""
        return self.rank == 0

    def share(self, items: Iterable[T]) -> Iterator[T]:
        """The items that are this rank's, in order."""
        return islice(items, self.rank, None, self.size)

    def maximum(self, values: torch.Tensor) -> torch.Tensor:
        """The elementwise maximum over all ranks. Raises LostRankError."""
        if self.size == 1:
            return values
        result = values.clone()
        _talk(lambda: dist.all_reduce(result, op=dist.ReduceOp.MAX))
        return result

    def in_order(self, shares: Sequence[T]) -> list[T]:
        """What every rank made of its share, in the order of the items before they were shared out."""
        if self.size == 1:
            return list(shares)
        by_rank: list[Sequence[T]] = [()] * self.size
        _talk(lambda: dist.all_gather_object(by_rank, shares))
        total = sum(map(len, by_rank))
        return [by_rank[i % self.size][i // self.size] for i in range(total)]

    def smallest(self, number: int) -> int:
        """The smallest of all ranks' numbers; nobody gets it before all have asked. Raises LostRankError."""
        return -int(self.maximum(torch.tensor(-number)))

    def wait(self) -> None:
        """Until all ranks are here."""
        self.smallest(0)


ALONE = Ranks()


def is_first_process() -> bool:
    """False in the processes of torchrun that are not to talk."""
    return not dist.is_torchelastic_launched() or os.environ["RANK"] == "0"


@contextmanager
def torchrun_ranks() -> Iterator[Ranks]:
    """This process among those that torchrun started, talking through gloo; alone if torchrun did not start it."""
    if not dist.is_torchelastic_launched():
        yield ALONE
        return
    with joined_ranks("env://", rank=int(os.environ["RANK"]), size=int(os.environ["WORLD_SIZE"])) as ranks:
        yield ranks


@contextmanager
def joined_ranks(init_method: str, *, rank: int, size: int) -> Iterator[Ranks]:
    """Join the process group of `size` ranks, and leave it at the end."""
    if size == 1:
        yield ALONE
        return
    _talk(
        lambda: dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=size, timeout=PATIENCE)
    )
    try:
        yield Ranks(rank=rank, size=size)
    finally:
        dist.destroy_process_group()


def require_enough(num_batches: int, ranks: Ranks) -> None:
    """Raises CalibrationError when a rank would have nothing to do."""
    if num_batches < ranks.size:
        raise CalibrationError(
            "too little data to share", key="ranks", found=ranks.size, expected=f"at most {num_batches} (micro-batches)"
        )


def _talk(collective: Callable[[], object]) -> None:
    try:
        collective()
    except RuntimeError as error:  # gloo: connection closed, timed out
        raise LostRankError(f"another rank has ended: {str(error).splitlines()[0]}") from error
