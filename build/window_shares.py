"""How TensorRT-LLM's V1 cache manager should divide its memory among attention windows.

It keeps one pool for each distinct window and makes them EQUAL unless TRTLLM_WINDOW_SIZE_SHARES="s1,s2,s3" says
otherwise (ascending windows). Equal pools waste most of the memory: at 128K tokens a sequence keeps 18 x 160 tokens in
the 128-windows and 10 x 131072 in the full layers. In proportion to what one sequence keeps, all pools run out at once.

Lengths: under GUARANTEED_NO_EVICT a sequence reserves to its last possible token, under MAX_UTILIZATION it holds, over
its life, the prompt and half of its output on average. The trap: the shares must add up to exactly 1.0 in floating
point, left to right, or the engine stops with an assertion. Multiples of 1/4096 are exact in binary and in print, and
so are their sums.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

from puzzle_trtllm.kv_layout import blocks_of_a_sequence

GRID = 4096


def window_shares(max_attention_window: Sequence[int], *, num_tokens: int, tokens_per_block: int) -> list[float]:
    """Shares by ascending window for sequences that hold `num_tokens`; [1.0] where all layers have one window."""
    layers = Counter(max_attention_window)
    needs = [layers[window] * blocks_of_a_sequence(window, num_tokens, tokens_per_block) for window in sorted(layers)]
    return [parts / GRID for parts in _on_grid(needs)]


def format_shares(shares: Sequence[float]) -> str:
    """As the environment variable wants it; multiples of 1/4096 have at most 12 decimals."""
    return ",".join(f"{share:.12f}".rstrip("0").rstrip(".") for share in shares)


def held_tokens(input_tokens: int, output_tokens: int, policy: str) -> int:
    """Tokens that a sequence holds or reserves under a capacity-scheduler policy."""
    return input_tokens + (output_tokens if policy == "GUARANTEED_NO_EVICT" else output_tokens // 2)


def _on_grid(needs: Sequence[int]) -> list[int]:
    """Whole parts of GRID in proportion to `needs`: rounded up, and the largest takes what is left.

    A short window may need five and a half of them: five would hold a tenth fewer sequences, whatever the others hold.
    The largest has thousands.
    """
    parts = [math.ceil(Fraction(need * GRID, sum(needs))) for need in needs]
    parts[needs.index(max(needs))] += GRID - sum(parts)
    return parts
