"""What this room's tests share."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.serve.virtual_time import VirtualTime


@pytest.fixture
def virtual_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every event loop that the test runs in this process is in virtual time."""
    clock, new_event_loop = VirtualTime(), asyncio.events.new_event_loop
    monkeypatch.setattr(asyncio.events, "new_event_loop", lambda: clock.rule(new_event_loop()))
    monkeypatch.setattr(time, "perf_counter_ns", clock.perf_counter_ns)
