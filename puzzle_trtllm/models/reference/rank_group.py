"""What the ranks of one engine say to each other, over torch.distributed: gloo on CPUs, NCCL between GPUs.

The first rank leads. It announces each step as one short array of numbers; then all ranks compute the same step, with
two sums a layer (after the attention's output projection and after the experts) and one gathering of the logits on the
leader. After a sum all ranks hold the same bits, so that they route every token to the same experts.

Waiting for the next step may take days; waiting inside a step longer than `STEP_TIMEOUT` means that a rank hangs.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 (the customary name)
from numpy.typing import NDArray
from torch import Tensor
from torch._C._distributed_c10d import Store

STEP_TIMEOUT = timedelta(minutes=5)
_IDLE_TIMEOUT = timedelta(days=3650)
_LEADER = 0
_PACKET = 1024
"""Numbers of an announcement's first broadcast; only a longer one needs a second."""

T = TypeVar("T")


class RankGroup:
    """Membership of this process; one a process. Methods are collective: every rank calls them in the same order, and
    each raises RuntimeError when another rank is gone."""

    def __init__(
        self, *, rank: int, size: int, local_size: int, device: torch.device, store: Store | None = None
    ) -> None:
        """Wait for all `size` ranks, `local_size` of them on this machine. They meet at `store`, or where the
        environment says (torchrun)."""
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        init_method = "env://" if store is None else None
        dist.init_process_group(
            backend, init_method=init_method, store=store, rank=rank, world_size=size, timeout=_IDLE_TIMEOUT
        )
        self._of_a_step = dist.new_group(timeout=STEP_TIMEOUT)
        self.rank = rank
        self.size = size
        self.local_size = local_size
        self.device = device

    # -- within a step -----------------------------------------------------------------------------------------------

    def sum(self, part: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        dist.all_reduce(part, group=self._of_a_step)
        return part

    def gather_columns(self, part: Tensor, total: int) -> Tensor:
        """`[R, total]` on the leader, of all ranks' parts side by side (sharding.py cuts them); `[R, 0]` elsewhere."""
        if len(part) == 0:
            return part
        narrow, num_wider = divmod(total, self.size)
        padded = F.pad(part, (0, narrow + (num_wider > 0) - part.shape[1])).contiguous()
        if self.rank != _LEADER:
            dist.gather(padded, dst=_LEADER, group=self._of_a_step)
            return part[:, :0]
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.gather(padded, parts, dst=_LEADER, group=self._of_a_step)
        return torch.cat([one[:, : narrow + (rank < num_wider)] for rank, one in enumerate(parts)], dim=1)

    # -- between steps -----------------------------------------------------------------------------------------------

    def announce(self, numbers: NDArray[np.int32]) -> None:
        """The leader's `numbers` to all others; an empty array ends their work."""
        first = np.zeros(_PACKET, dtype=np.int32)
        first[0] = len(numbers)
        first[1 : 1 + len(numbers)] = numbers[: _PACKET - 1]
        dist.broadcast(torch.from_numpy(first), _LEADER)
        if len(numbers) >= _PACKET:
            dist.broadcast(torch.from_numpy(np.ascontiguousarray(numbers[_PACKET - 1 :])), _LEADER)

    def follow(self) -> NDArray[np.int32]:
        """Wait for what the leader announces."""
        first = torch.empty(_PACKET, dtype=torch.int32)
        dist.broadcast(first, _LEADER)
        count = int(first[0])
        if count < _PACKET:
            return first[1 : 1 + count].numpy()
        rest = torch.empty(count - _PACKET + 1, dtype=torch.int32)
        dist.broadcast(rest, _LEADER)
        return torch.cat([first[1:], rest]).numpy()

    # -- while loading -----------------------------------------------------------------------------------------------

    def share(self, value: Any) -> Any:
        """The leader's value, everywhere."""
        values = [value]
        dist.broadcast_object_list(values, _LEADER)
        return values[0]

    def collect(self, value: T) -> list[T]:
        """All ranks' values in order, everywhere."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values
