"""Does a model fit? Its dequantized size against the memory that is free.

MXFP4 experts are 4.25 bits a parameter on disk and 16 or 32 when a CPU multiplies by them: a checkpoint of 60 GB is a
model of 234 GB in bfloat16.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.free_memory import free_memory_bytes
from puzzle_trtllm.tensors import count_parameters

SHARE_OF_FREE_MEMORY = 0.6
"""A larger model is streamed; the rest is for activations and for whoever else needs memory."""


def dequantized_bytes(source: Checkpoint, dtype: torch.dtype) -> int:
    """Bytes of all parameters in `dtype`."""
    return count_parameters(source.architecture) * dtype.itemsize


def should_stream(source: Checkpoint, dtype: torch.dtype, *, wanted: bool | None, num_copies: int = 1) -> bool:
    """`wanted` if it is given, else whether `num_copies` of the model take more than their share of the free memory."""
    if wanted is not None:
        return wanted
    free_bytes = free_memory_bytes()
    return free_bytes is not None and num_copies * dequantized_bytes(source, dtype) > SHARE_OF_FREE_MEMORY * free_bytes


def free_memory() -> None:
    """Give back what is not used any more, which Python and the allocator would do later or never.

    A model holds itself in reference cycles, so it outlives its last use until the collector runs; and glibc keeps the
    freed pieces of expert matrices between live ones, some 40 MB more with every layer.
    """
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


@contextmanager
def old_objects_kept() -> Iterator[None]:
    """Inside, the collector looks at no object that is there already.

    Those of torch, transformers and ModelOpt take it 0.4 s, which `free_memory` would cost with every layer.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
