"""How many sequences TensorRT-LLM's V1 cache manager holds, and how its memory should be divided among the windows.

It keeps one pool for each distinct window and makes them EQUAL unless TRTLLM_WINDOW_SIZE_SHARES="s1,s2,s3" says
otherwise (ascending windows); the pool that runs out first decides. A sequence takes more of a window's pool than the
window (kvCacheManager.cpp, the same in all lines):

- Under GUARANTEED_NO_EVICT the scheduler lets it in when every pool has free what it counts to the sequence's end: all
  tokens without a window, window + max_num_tokens with one. A pool smaller than that for one sequence lets none in: the
  request waits for ever.
- A prompt is laid out whole, in every pool, when its first chunk begins; what the window has left behind is given back
  with the token after the last chunk. A pool that cannot hold it ends the engine: "Can't allocate new blocks". Steps
  are filled first come, first served: the last chunk of one long prompt, short prompts, the first chunk of the next. So
  two prompts of any length may be laid out at once, and short ones of two steps.

The trap: the shares must add up to exactly 1.0 in floating point, left to right, or the engine stops with an assertion.
Multiples of 1/4096 are exact in binary and in print, and so are their sums.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, partial

from puzzle_trtllm.kv_layout import blocks_of_a_sequence

GRID = 4096
AT_ONCE = 2
"""Long prompts, and steps of short ones, that may be laid out at the same time."""


@dataclass(frozen=True, kw_only=True)
class V1Load:
    """Sequences alike, as the V1 manager counts them; lengths in tokens."""

    windows: tuple[int, ...]
    """`max_attention_window`, one entry a layer; full attention has `longest`."""
    longest: int
    """max_seq_len."""
    held: int
    """What a sequence takes where it has no window (`held_tokens`)."""
    chunk: int
    """max_num_tokens."""
    tokens_per_block: int
    evicts: bool = False
    """MAX_UTILIZATION: nothing is reserved."""

    @cached_property
    def layers(self) -> dict[int, int]:
        """Window, ascending: layers that have it."""
        return dict(sorted(Counter(self.windows).items()))

    def reserved(self, window: int) -> int:
        """Blocks of one layer that a sequence is counted with until it ends: all of it where no window slides."""
        if self.evicts:
            return self._kept(window)
        reach = window + self.chunk
        return self._blocks(min(self.held, reach)) + (self.held > reach)  # one more while the window slides

    def needed(self, window: int, sequences: int) -> int:
        """Blocks of one layer that let so many sequences in and find room for their prompts."""
        counted = sequences * self.reserved(window)
        if window >= self.longest:
            return counted
        others = max(0, sequences - AT_ONCE)
        prompts = self._blocks(min(sequences, AT_ONCE) * self.longest + min(others, 1) * AT_ONCE * self.chunk)
        return max(counted, prompts + others * self._kept(window))

    def sequences(self, layer_blocks: int, shares: Sequence[float] | None = None) -> int:
        """How many fit into so many blocks of one layer, divided by `shares`; without them, as well as can be."""
        if shares is None:
            return _most(layer_blocks, lambda sequences: sum(self._needs(sequences)))
        pools = [
            int(layer_blocks * share) // layers for share, layers in zip(shares, self.layers.values(), strict=True)
        ]
        return min(_most(pool, partial(self.needed, window)) for pool, window in zip(pools, self.layers, strict=True))

    def shares(self, layer_blocks: int) -> list[float]:
        """By ascending window, so that all pools run out at once; [1.0] where all layers have one window."""
        needs = self._needs(max(1, self.sequences(layer_blocks)))
        return [parts / GRID for parts in _on_grid(needs)]

    def _needs(self, sequences: int) -> list[int]:
        return [layers * self.needed(window, sequences) for window, layers in self.layers.items()]

    def _kept(self, window: int) -> int:
        return blocks_of_a_sequence(window, self.held, self.tokens_per_block)

    def _blocks(self, num_tokens: int) -> int:
        return math.ceil(num_tokens / self.tokens_per_block)


def format_shares(shares: Sequence[float]) -> str:
    """As the environment variable wants it; multiples of 1/4096 have at most 12 decimals."""
    return ",".join(f"{share:.12f}".rstrip("0").rstrip(".") for share in shares)


def held_tokens(input_tokens: int, output_tokens: int, policy: str) -> int:
    """Tokens that a sequence reserves (GUARANTEED_NO_EVICT), or holds on average over its life (MAX_UTILIZATION)."""
    return input_tokens + (output_tokens if policy == "GUARANTEED_NO_EVICT" else output_tokens // 2)


def _most(blocks: int, needed: Callable[[int], int]) -> int:
    """The largest number of sequences for which so many blocks are enough; each needs one at least."""
    return bisect_right(range(1, blocks + 1), blocks, key=needed)


def _on_grid(needs: Sequence[int]) -> list[int]:
    """Whole parts of GRID in proportion to `needs`: rounded up, and the largest takes what is left.

    A short window may need five and a half of them: five would hold a tenth fewer sequences, whatever the others hold.
    The largest has thousands.
    """
    parts = [math.ceil(Fraction(need * GRID, sum(needs))) for need in needs]
    parts[needs.index(max(needs))] += GRID - sum(parts)
    return parts
