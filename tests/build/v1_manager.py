"""TensorRT-LLM's V1 cache manager under its two schedulers, as far as blocks go: who is let in, who finds none.

Written after kvCacheManager.cpp and the schedulers of its PyTorch executor, in their terms: the capacity scheduler
counts a sequence to its end, the micro-batch scheduler fills a step first come, first served, a prompt is laid out
whole when its first chunk is due, and what a window has left behind is given back at the next token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from puzzle_trtllm.build.window_shares import V1Load


class NoFreeBlocksError(Exception):
    """Ends the engine."""


@dataclass(eq=False)
class _Sequence:
    prompt: int
    output: int
    num_tokens: int = 0
    computed: int = 0
    """Tokens of the prompt."""
    table: dict[int, int] = field(default_factory=dict)
    """By window: blocks ever given; those that went are still in the table."""
    gone: dict[int, int] = field(default_factory=dict)


class V1Manager:
    """Pools for `load`, with the shares and the number of sequences that it says."""

    def __init__(self, load: V1Load, layer_blocks: int) -> None:
        shares = load.shares(layer_blocks)
        self.load, self.max_batch_size = load, load.sequences(layer_blocks, shares)
        self.free = {
            window: int(layer_blocks * share) // layers
            for share, (window, layers) in zip(shares, load.layers.items(), strict=True)
        }

    def run(self, requests: Iterable[tuple[int, int]]) -> int:
        """Run (prompt, output) lengths to their end; returns the most sequences that were let in at once."""
        waiting, active, most = [_Sequence(*request) for request in requests], [], 0
        while waiting or active:
            while waiting and len(active) < self.max_batch_size:
                active.append(waiting.pop(0))
            admitted = self._admitted(active)
            assert admitted, "every request waits for ever"
            most = max(most, len(admitted))
            self._step(admitted)
            for sequence in [s for s in active if s.num_tokens == s.prompt + s.output]:
                active.remove(sequence)
                for window in self.free:
                    self.free[window] += sequence.table[window] - sequence.gone[window]
        return most

    def _admitted(self, active: list[_Sequence]) -> list[_Sequence]:
        started = [s for s in active if s.table]
        left = {window: self.free[window] - sum(self._counted(s, window) for s in started) for window in self.free}
        for sequence in [s for s in active if not s.table]:
            needs = {window: self._counted(sequence, window) for window in self.free}
            if any(needs[window] > left[window] for window in self.free):
                break
            started.append(sequence)
            left = {window: left[window] - needs[window] for window in self.free}
        return started

    def _counted(self, s: _Sequence, window: int) -> int:
        """Blocks that a sequence is still to get, in the scheduler's eyes."""
        temporary = max(0, min(self.load.chunk, self.load.longest - 1 - window))
        end, reach = s.prompt + s.output, window + temporary
        whole = self._blocks(min(end, reach))
        slides = end > window and self._blocks(end) > max(whole, self._blocks(s.num_tokens or s.prompt))
        return whole - s.table.get(window, 0) + slides

    def _step(self, admitted: list[_Sequence]) -> None:
        decoding = [s for s in admitted if s.computed == s.prompt]
        budget, chunks = self.load.chunk - len(decoding), []
        for sequence in admitted:
            tokens = min(budget, sequence.prompt - sequence.computed)
            if tokens > 0:
                budget -= tokens
                chunks.append((sequence, tokens))
        for sequence, _ in chunks:
            if not sequence.table:
                sequence.table = {window: self._take(window, self._blocks(sequence.prompt)) for window in self.free}
                sequence.gone = dict.fromkeys(self.free, 0)
        for sequence in decoding:
            self._add_token(sequence)
        for sequence, tokens in chunks:
            sequence.computed += tokens
            sequence.num_tokens = sequence.prompt

    def _add_token(self, s: _Sequence) -> None:
        s.num_tokens += 1
        size = self.load.tokens_per_block
        for window in self.free:
            while window < self.load.longest and s.num_tokens - s.gone[window] * size >= window + size:
                s.gone[window] += 1
                self.free[window] += 1
            if (s.num_tokens - 1) % size == 0:
                s.table[window] += self._take(window, 1)

    def _take(self, window: int, blocks: int) -> int:
        if self.free[window] < blocks:
            raise NoFreeBlocksError(f"Can't allocate new blocks for window size {window}")
        self.free[window] -= blocks
        return blocks

    def _blocks(self, num_tokens: int) -> int:
        return math.ceil(num_tokens / self.load.tokens_per_block)
