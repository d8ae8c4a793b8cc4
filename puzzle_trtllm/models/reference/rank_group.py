"""What the ranks of one engine say to each other, over torch.distributed: gloo on CPUs, NCCL between GPUs.

All ranks run the same engine on the same requests: the first one shares what it hears from the front, and what it
chooses from the logits, so that all schedule the same steps. A step has two sums a layer (after the attention's output
projection and after the experts) and one gathering of the logits on the leader. After a sum all ranks hold the same
bits, so that they route every token to the same experts.

Waiting for the next requests may take days; waiting inside a step longer than `STEP_TIMEOUT` means that a rank hangs.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 (the customary name)
from torch import Tensor

STEP_TIMEOUT = timedelta(minutes=5)
_IDLE_TIMEOUT = timedelta(days=3650)
_LEADER = 0
_PACKET_BYTES = 4096
"""Of the first broadcast of what is shared; only a longer one needs a second."""

T = TypeVar("T")


class Ranks:
    """The ranks of an engine. By itself, one that is the whole: nobody else has to be asked."""

    rank, size = 0, 1
    local_rank, local_size = 0, 1
    """Among those on this machine."""

    def sum(self, part: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        return part

    def gather_columns(self, part: Tensor, total: int) -> Tensor:
        """`[R, total]` on the leader, of all ranks' parts side by side (sharding.py cuts them); `[R, 0]` elsewhere."""
        return part

    def share(self, value: Any = None) -> Any:
        """The leader's value (picklable), everywhere; the others give none."""
        return value

    def agree(self, decide: Callable[[], T]) -> T:
        """What the leader decides, everywhere. When that raises, all raise: ranks that fail alike stay in step."""
        return decide()

    def collect(self, value: T) -> list[T]:
        """All ranks' values in order, everywhere."""
        return [value]


ALONE = Ranks()


class RankGroup(Ranks):
    """Several; one membership a process. Methods are collective: every rank calls them in the same order, and
    each raises RuntimeError when another rank is gone."""

    def __init__(self, *, rank: int, size: int, local_rank: int, local_size: int, meeting: str) -> None:
        """Wait for all ranks at `meeting`, an `init_method` of torch.distributed."""
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=size, timeout=_IDLE_TIMEOUT)
        self._of_a_step = dist.new_group(timeout=STEP_TIMEOUT)
        self.rank, self.size = rank, size
        self.local_rank, self.local_size = local_rank, local_size

    # -- within a step -----------------------------------------------------------------------------------------------

    def sum(self, part: Tensor) -> Tensor:
        dist.all_reduce(part, group=self._of_a_step)
        return part

    def gather_columns(self, part: Tensor, total: int) -> Tensor:
        if len(part) == 0:
            return part
        narrow, num_wider = divmod(total, self.size)
        padded = F.pad(part, (0, narrow + (num_wider > 0) - part.shape[1])).contiguous()
        parts = [torch.empty_like(padded) for _ in range(self.size)] if self.rank == _LEADER else None
        dist.gather(padded, parts, dst=_LEADER, group=self._of_a_step)
        if parts is None:
            return part[:, :0]
        return torch.cat([one[:, : narrow + (rank < num_wider)] for rank, one in enumerate(parts)], dim=1)

    # -- between steps -----------------------------------------------------------------------------------------------

    def share(self, value: Any = None) -> Any:
        packet = torch.zeros(_PACKET_BYTES, dtype=torch.uint8)
        count, head = packet[:8].view(torch.int64), packet[8:]
        pickled = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        if self.rank == _LEADER:
            count[0] = len(pickled)
            head[: len(pickled)] = pickled[: len(head)]
        dist.broadcast(packet, _LEADER)
        if count > len(head):
            rest = pickled[len(head) :] if self.rank == _LEADER else head.new_empty(int(count) - len(head))
            dist.broadcast(rest, _LEADER)
            head = torch.cat([head, rest])
        return value if self.rank == _LEADER else pickle.loads(head.numpy().tobytes())

    def agree(self, decide: Callable[[], T]) -> T:
        if self.rank != _LEADER:
            reason, value = self.share()
            if reason:
                raise RuntimeError(reason)
            return cast("T", value)
        try:
            value = decide()
        except Exception as error:
            self.share((f"{type(error).__name__}: {error}", None))
            raise
        self.share(("", value))
        return value

    def collect(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values
