"""How the ranks of an engine come together, whoever has started them."""

from __future__ import annotations

import os

import torch

from puzzle_trtllm.errors import EngineError
from puzzle_trtllm.models.reference.rank_group import RankGroup
from puzzle_trtllm.serve.runtimes.reference.processes import MEETING


def join_ranks(size: int | None = None) -> RankGroup:
    """Meet the other ranks: torchrun's variables say which one this is, and where they meet, unless the front does.

    Raises EngineError when `size` are wanted and torchrun started more or fewer.
    """
    rank, found, local_rank, local_size = (
        int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    if size not in (None, found):
        raise EngineError("torchrun started more or fewer", key="tensor_parallel_size", found=size, expected=found)
    device = _device(local_rank, local_size)
    meeting = os.environ.get(MEETING, "env://")
    return RankGroup(rank=rank, size=found, local_size=local_size, device=device, meeting=meeting)


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
