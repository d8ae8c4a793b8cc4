"""A claimed step as a short array of int32, and back: what the leading rank announces to the others.

Per sequence its new tokens and, for each window group, its block numbers; per prompt chunk also the blocks that it had
before. At batch 32 and a few thousand tokens a sequence that is some tens of kilobytes a step, for all layers together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from puzzle_trtllm.models.reference.kv_cache import SequenceBlocks
from puzzle_trtllm.models.reference.step import ClaimedStep, SequenceStep

Windows = Sequence["int | None"]
"""The window groups in the cache's order, the same on every rank."""


def pack_step(step: ClaimedStep, windows: Windows) -> NDArray[np.int32]:
    """int32 `[length]`."""
    numbers = [len(step.sequences), step.num_decodes]
    for s in step.sequences:
        numbers += [s.start, s.wants_logits, len(s.tokens), *s.tokens]
        _pack_blocks(numbers, s.blocks, windows)
    for past in step.past:
        _pack_blocks(numbers, past, windows)
    return np.asarray(numbers, dtype=np.int32)


def unpack_step(packet: NDArray[np.int32], windows: Windows) -> ClaimedStep:
    """The step that `pack_step` packed."""
    numbers: Iterator[int] = iter(packet.tolist())
    num_sequences, num_decodes = next(numbers), next(numbers)
    return ClaimedStep(
        sequences=[_unpack_sequence(numbers, windows) for _ in range(num_sequences)],
        num_decodes=num_decodes,
        past=[_unpack_blocks(numbers, windows) for _ in range(num_sequences - num_decodes)],
    )


def _unpack_sequence(numbers: Iterator[int], windows: Windows) -> SequenceStep:
    start, wants_logits = next(numbers), bool(next(numbers))
    tokens = _take_list(numbers)
    return SequenceStep(tokens=tokens, start=start, wants_logits=wants_logits, blocks=_unpack_blocks(numbers, windows))


def _pack_blocks(numbers: list[int], blocks: dict[int | None, SequenceBlocks], windows: Windows) -> None:
    for window in windows:
        own = blocks[window]
        numbers += [own.first_block, len(own.blocks), *own.blocks]


def _unpack_blocks(numbers: Iterator[int], windows: Windows) -> dict[int | None, SequenceBlocks]:
    return {window: SequenceBlocks(first_block=next(numbers), blocks=_take_list(numbers)) for window in windows}


def _take_list(numbers: Iterator[int]) -> list[int]:
    return [next(numbers) for _ in range(next(numbers))]
