"""How the ranks of an engine come together, whoever has started them."""

from __future__ import annotations

import os

from puzzle_trtllm.errors import EngineError
from puzzle_trtllm.models.reference.rank_group import RankGroup
from puzzle_trtllm.serve.runtimes.reference.processes import MEETING


def join_ranks(size: int | None = None) -> RankGroup:
    """Meet the other ranks: torchrun's variables say which one this is, and where they meet, unless the front does.

    Raises EngineError when `size` are wanted and torchrun started more or fewer.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    rank, found, local_rank, local_size = (int(os.environ[name]) for name in names)
    if size not in (None, found):
        raise EngineError("torchrun started more or fewer", key="tensor_parallel_size", found=size, expected=found)
    meeting = os.environ.get(MEETING, "env://")
    return RankGroup(rank=rank, size=found, local_rank=local_rank, local_size=local_size, meeting=meeting)
