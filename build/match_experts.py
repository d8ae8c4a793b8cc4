"""Which of the parent's experts a child kept, when nobody wrote it down.

Every expert has a row in each of the layer's expert tensors and a row in the router. The start of every row is hashed
in both checkpoints, and each row of the child votes for the parent's rows with its hash: the expert with most votes is
the one that was kept. That costs a few KiB a row, not the 60 GB of an exhaustive search; the proof is the comparison of
all bytes that follows, and because one changed tensor cannot outvote five unchanged ones, it can name what changed.

When several of the parent's experts get the same votes (copies of each other, or equal at the start of every row), all
their bytes decide. Rows of a few bytes, such as the router's bias, do not vote: they are equal by accident.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

from puzzle_trtllm.build.row_comparison import first_difference, read_span, row_of
from puzzle_trtllm.safetensors_file import TensorEntry

SIGNATURE_BYTES = 16 * 2**10
MIN_ROW_BYTES = 64

Pair = tuple[TensorEntry, TensorEntry]
"""The same tensor in the child and in the parent."""


def match_experts(pairs: Sequence[Pair]) -> list[int | None]:
    """For each expert of a layer of the child, the parent's expert it is most likely a copy of; None if none is.

    pairs: the layer's per-expert tensors, experts and router, with equal dtypes and row shapes. The same index twice
    means that the child holds one expert of the parent twice.
    """
    voting = [pair for pair in pairs if pair[0].num_bytes // pair[0].shape[0] >= MIN_ROW_BYTES]
    votes = [Counter[int]() for _ in range(pairs[0][0].shape[0])]
    for child, parent in voting:
        by_signature: dict[bytes, list[int]] = {}
        for expert in range(parent.shape[0]):
            by_signature.setdefault(_signature(parent, expert), []).append(expert)
        for row, ballot in enumerate(votes):
            ballot.update(by_signature.get(_signature(child, row), ()))
    found: list[int | None] = []
    for row, ballot in enumerate(votes):
        found.append(_elect(pairs, row, ballot, taken=found))
    return found


def _elect(pairs: Sequence[Pair], row: int, ballot: Counter[int], taken: Sequence[int | None]) -> int | None:
    most = max(ballot.values(), default=0)
    leaders = sorted(expert for expert, count in ballot.items() if count == most)
    if len(leaders) < 2:
        return leaders[0] if leaders else None
    free = [expert for expert in leaders if expert not in taken]
    equal = (expert for expert in free if _is_copy(pairs, row, expert))
    return next(equal, (free or leaders)[0])


def _is_copy(pairs: Sequence[Pair], row: int, expert: int) -> bool:
    return all(first_difference(row_of(child, row), row_of(parent, expert)) is None for child, parent in pairs)


def _signature(entry: TensorEntry, index: int) -> bytes:
    return hashlib.sha256(read_span(row_of(entry, index), SIGNATURE_BYTES)).digest()
