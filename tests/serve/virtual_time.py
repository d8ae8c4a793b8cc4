"""Time that passes only while everybody sleeps: what has a moment happens at it, on a machine however slow.

For asyncio and `time.perf_counter_ns` alone, in programs that wait for nothing but the time.
"""

from __future__ import annotations

import asyncio
import math
import time
from selectors import SelectorKey
from typing import Any

_perf_counter_ns = time.perf_counter_ns


class VirtualTime:
    """Begins at the machine's own time. `perf_counter_ns` is to be put in the place of time's."""

    def __init__(self) -> None:
        self._now_ns = _perf_counter_ns()

    def perf_counter_ns(self) -> int:
        return self._now_ns

    def rule(self, loop: Any) -> asyncio.AbstractEventLoop:
        """Have the loop jump to its next timer where it would wait for it; without one it waits as ever."""
        select = loop._selector.select

        def jump(timeout: float | None = None) -> list[tuple[SelectorKey, int]]:
            if timeout is None:
                return select(None)
            events = select(0)
            if not events and timeout > 0:
                self._now_ns += math.ceil(timeout * 1e9)
            return events

        loop._selector.select = jump
        loop.time = lambda: self._now_ns / 1e9
        return loop
