"""What attention is told about a step: which blocks its sequences read, and how long their prompt chunks are.

Legend: S sequences, P prompt chunks, M blocks of the longest sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class GroupReads:
    """How sequences read one group: keys from `first_keys` on, of which (position - window, position] are visible.

    A prompt chunk finds here what comes before it, in positions below that of its first query.
    """

    window: int | None
    num_kv_heads: int
    blocks: Tensor
    """int64 [S, M], padded with block 0"""
    first_keys: Tensor
    """int64 [S]: position of the first key in the first block"""
    positions: Tensor
    """int64 [S]: of the query; of a chunk the first one"""
    derived: dict[str, Tensor] = field(default_factory=dict)
    """What a kernel computes from the above once a step, for all layers of the group."""


@dataclass(frozen=True, kw_only=True)
class Chunks:
    """The prompt chunks of a step, whose rows follow one another."""

    lengths: Tensor
    """int64 [P]"""
    longest: int
    derived: dict[str, Tensor] = field(default_factory=dict)
    """What a kernel computes from the above once a step, for all layers."""
