"""How the ranks of an engine come together: started by the leader on this machine, or by torchrun."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from socket import socket

import torch
from torch._C._distributed_c10d import TCPStore

from puzzle_trtllm.errors import EngineError
from puzzle_trtllm.models.reference.rank_group import RankGroup
from puzzle_trtllm.serve.runtimes.reference.arguments import EngineArguments
from puzzle_trtllm.serve.runtimes.reference.followers import Followers

_LOOPBACK = "127.0.0.1"
_MEETING_TIMEOUT = timedelta(minutes=5)


def lead(
    arguments: EngineArguments, *, front_fd: int, fail: Callable[[str], None]
) -> tuple[RankGroup, Followers | None]:
    """Bring all ranks together and tell them what to load. `front_fd` and `fail` as in `Followers`; none under
    torchrun, which watches its processes itself."""
    size = arguments.parallelism.tensor
    followers = None
    if launched_by_torchrun():
        group = join_torchrun(size=size)
    else:
        meeting = socket()
        meeting.bind((_LOOPBACK, 0))
        meeting.listen()
        port = meeting.getsockname()[1]
        followers = Followers(size=size, port=port, front_fd=front_fd, fail=fail)
        group = join_local(rank=0, size=size, port=port, meeting=meeting)
    group.share(arguments)
    return group, followers


def join_local(*, rank: int, size: int, port: int, meeting: socket | None = None) -> RankGroup:
    """Meet the other ranks on this machine; the leader brings the listening socket."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = TCPStore(
        _LOOPBACK,
        port,
        size,
        is_master=meeting is not None,
        timeout=_MEETING_TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=meeting.detach() if meeting else None,
    )
    return RankGroup(rank=rank, size=size, local_size=size, device=_device(rank, size), store=store)


def join_torchrun(*, size: int | None = None) -> RankGroup:
    """Meet the other ranks that torchrun has started. Raises EngineError when `size` are wanted and it started more or
    fewer."""
    rank, found, local_rank, local_size = (
        int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    if size not in (None, found):
        raise EngineError("torchrun started more or fewer", key="tensor_parallel_size", found=size, expected=found)
    return RankGroup(rank=rank, size=found, local_size=local_size, device=_device(local_rank, local_size))


def launched_by_torchrun() -> bool:
    """True in a process of torchrun, or a child of one: then its ranks are the engine's, and none are started."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def _device(local_rank: int, local_size: int) -> torch.device:
    """A GPU of its own, or the CPU. Raises EngineError when there are GPUs, but too few."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if torch.cuda.device_count() < local_size:
        raise EngineError(
            "more ranks than GPUs", key="tensor_parallel_size", found=local_size, expected=torch.cuda.device_count()
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
