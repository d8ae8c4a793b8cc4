"""The reference runtime, writing down when requests are aborted; `cancel_latency.py` has Triton's stub load it.

A line for each in the file that ABORT_TIMES names: time.monotonic_ns when the stub asked, and when the engine had done
it.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from puzzle_trtllm.serve.runtimes.api import KvCacheConfig, SamplingParams
from puzzle_trtllm.serve.runtimes.reference import llm as reference

__all__ = ["LLM", "KvCacheConfig", "SamplingParams"]


class LLM(reference.LLM):
    """As its base does it."""

    def __init__(self, *arguments: Any, **llm_args: Any) -> None:
        self._asked_ns: dict[int, int] = {}
        self._file = Path(os.environ["ABORT_TIMES"])
        super().__init__(*arguments, **llm_args)

    def _abort(self, request_id: int) -> None:
        self._asked_ns.setdefault(request_id, time.monotonic_ns())
        super()._abort(request_id)

    def _take(self, report: Any) -> None:
        done_ns = time.monotonic_ns()
        for update in report.updates:
            if update.finish_reason == "cancelled":
                with self._file.open("a") as lines:
                    lines.write(f"{self._asked_ns.pop(update.request_id, done_ns)} {done_ns}\n")
        super()._take(report)
