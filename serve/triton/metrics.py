"""The model's own metrics, on Triton's Prometheus endpoint.

Triton's queue-time metric stays near zero for a decoupled model, because `execute` returns at once; what a person or
an autoscaler wants to know is below. Setting a metric is a round trip to the server, so all are set once a second from
a thread of their own, which also asks the runtime for its statistics: that is how the death of an idle engine is
noticed, and that an engine which lives makes no steps any more (a deadlock, a GPU that does not answer).

    puzzle_engine_up                1 while the engine lives
    puzzle_requests_waiting         open, but the engine has not begun (a runtime that does not say: no token yet)
    puzzle_requests_running         all other open ones
    puzzle_kv_blocks_used, _total   as the runtime counts them (absent until it says)
    puzzle_kv_blocks_reused_total, puzzle_kv_blocks_missed_total
                                    prompt blocks found in the cache and not, if the runtime counts them
    puzzle_engine_steps_total       forward passes, if the runtime counts them: output tokens over steps is the batch
    puzzle_seconds_without_step     how long the engine has ended no step of its requests, if the runtime counts them
    puzzle_prompt_tokens_total, puzzle_output_tokens_total, puzzle_responses_total
    puzzle_requests_total{end="ok"|"cancelled"|...}

Where the model has several instances, each has its own, with the label `instance`.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from puzzle_trtllm.serve.runtimes.api import EngineDeadError
from puzzle_trtllm.serve.triton.outbox import Log, Outbox
from puzzle_trtllm.serve.triton.session import Session, engine_is_healthy

PERIOD_S = 1.0
_LONGEST_LOOK_S = 5.0
"""What a look counts for at most, so that a process which was stopped itself accuses nobody when it goes on."""
_GAUGES = {
    "puzzle_engine_up": "1 while the engine lives",
    "puzzle_requests_waiting": "open requests that the engine has not begun",
    "puzzle_requests_running": "open requests that the engine is at work on",
    "puzzle_seconds_without_step": "for so long has no step of the engine ended while requests were open",
    "puzzle_kv_blocks_used": "KV cache blocks held by requests",
    "puzzle_kv_blocks_total": "KV cache blocks",
}
_COUNTERS = {
    "puzzle_prompt_tokens_total": "prompt tokens of requests that got a token",
    "puzzle_output_tokens_total": "tokens generated, of cancelled requests those that they were answered with",
    "puzzle_responses_total": "responses sent",
    "puzzle_engine_steps_total": "forward passes of the engine",
    "puzzle_kv_blocks_reused_total": "blocks of prompts found in the KV cache",
    "puzzle_kv_blocks_missed_total": "blocks of prompts that had to be computed",
}


@dataclass(frozen=True, kw_only=True)
class KvBlocks:
    """A runtime's count of its KV blocks; what it does not count is None."""

    used: int
    total: int
    reused: int | None = None
    missed: int | None = None


def kv_blocks(stats: Any) -> KvBlocks | None:
    """From what `LLM.get_stats` gave: dicts, or JSON texts of them, the newest last."""
    blocks = _newest(stats).get("kvCacheStats") or {}
    if not blocks.get("maxNumBlocks"):
        return None  # a runtime that has not made a step yet may say 0
    return KvBlocks(
        used=int(blocks.get("usedNumBlocks", 0)),
        total=int(blocks["maxNumBlocks"]),
        reused=blocks.get("reusedBlocks"),
        missed=blocks.get("missedBlocks"),
    )


def num_steps(stats: Any) -> int | None:
    """The engine's forward passes so far, from the same."""
    steps: int | None = _newest(stats).get("iter")
    return steps


def num_active(stats: Any) -> int | None:
    """Requests that the engine is at work on, from the same.

    Under attention data parallelism `numActiveRequests` is one rank's number; newer lines of TensorRT-LLM give a row a
    rank for every step, in which only what the rank computed then is its own.
    """
    newest = _newest(stats)
    active: int | None = newest.get("numActiveRequests")
    if active is None:
        return None
    rows = takewhile(lambda row: row.get("iter") == newest.get("iter"), map(_row, reversed(stats)))
    scheduled: int = sum((row.get("inflightBatchingStats") or {}).get("numScheduledRequests", 0) for row in rows)
    return max(active, scheduled)


def _newest(stats: Any) -> dict[str, Any]:
    return _row(stats[-1]) if stats else {}


def _row(stats: Any) -> dict[str, Any]:
    row: dict[str, Any] = json.loads(stats) if isinstance(stats, str) else stats
    return row


class MetricsThread:
    """Publishes a session's state. `metric_family` is pb_utils.MetricFamily (a fake in tests); `labels` go to all.

    An engine that ends no step for `step_timeout_s`, while requests are open, is declared dead; 0: never.
    """

    def __init__(
        self,
        session: Session,
        outbox: Outbox,
        llm: Any,
        *,
        metric_family: Any,
        step_timeout_s: float = 0,
        labels: Mapping[str, str] | None = None,
        log: Log = print,
    ) -> None:
        self._session = session
        self._outbox = outbox
        self._llm = llm
        self._log = log
        self._stats_wanted = True
        self._num_active = 0
        self._step_timeout_s = step_timeout_s
        self._steps: int | None = None
        """The engine's, as far as is known."""
        self._progress: tuple[int | None, int] = None, 0
        """They and the tokens that it has generated, at the look before; steps alone may be lost on their way here."""
        self._looked_s = time.monotonic()
        self._without_step_s = 0.0
        self._labels = {"model": "tensorrt_llm", **(labels or {})}
        gauge, counter = metric_family.GAUGE, metric_family.COUNTER
        # The families must outlive their metrics, so they are kept.
        self._families = {
            name: metric_family(name=name, description=text, kind=gauge) for name, text in _GAUGES.items()
        } | {name: metric_family(name=name, description=text, kind=counter) for name, text in _COUNTERS.items()}
        self._ends = metric_family(name="puzzle_requests_total", description="requests by their end", kind=counter)
        self._metrics: dict[str, Any] = {}
        self._counted: dict[str, int] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="puzzle-metrics", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while True:
            try:
                self._watch_engine()
                self._watch_steps()
                self.publish()
            except Exception as error:  # never let the watch over the engine end with a metric
                self._log(f"metrics: {type(error).__name__}: {error}")
            if self._stopping.wait(PERIOD_S):
                return

    def publish(self) -> None:
        """Set every metric to its value now."""
        waiting, running = self._session.queue_lengths(self._num_active)
        self._set("puzzle_engine_up", 0 if self._session.death else 1)
        self._set("puzzle_seconds_without_step", self._without_step_s)
        self._set("puzzle_requests_waiting", waiting)
        self._set("puzzle_requests_running", running)
        totals = self._session.totals
        self._count_to("puzzle_prompt_tokens_total", totals.prompt_tokens)
        self._count_to("puzzle_output_tokens_total", totals.output_tokens)
        self._count_to("puzzle_responses_total", self._outbox.responses_sent)
        for end, count in [("ok", self._outbox.answers_sent), *totals.ends.items()]:
            self._count_to(f"end:{end}", count)

    def _watch_engine(self) -> None:
        if self._session.death is not None:
            return
        if not engine_is_healthy(self._llm):
            self._session.engine_died("its process has ended")
            return
        if not self._stats_wanted:
            return
        try:
            stats = self._llm.get_stats(timeout=PERIOD_S)
        except EngineDeadError as error:
            self._session.engine_died(str(error))
        except TimeoutError:
            pass  # a busy engine is no news
        except Exception as error:
            self._stats_wanted, self._steps = False, None
            self._log(f"the runtime gives no statistics: {type(error).__name__}: {error}")
        else:
            if (active := num_active(stats)) is not None:
                self._num_active = active
            if (steps := num_steps(stats)) is not None:
                self._steps = steps
                self._count_to("puzzle_engine_steps_total", steps)
            if (blocks := kv_blocks(stats)) is not None:
                self._set("puzzle_kv_blocks_used", blocks.used)
                self._set("puzzle_kv_blocks_total", blocks.total)
                for name, count in (("reused", blocks.reused), ("missed", blocks.missed)):
                    if count is not None:
                        self._count_to(f"puzzle_kv_blocks_{name}_total", count)

    def _watch_steps(self) -> None:
        now_s = time.monotonic()
        look_s, self._looked_s = min(now_s - self._looked_s, _LONGEST_LOOK_S), now_s
        progress = self._steps, self._session.totals.output_tokens
        if progress != self._progress or self._steps is None or not self._session.engine_has_requests:
            self._progress, self._without_step_s = progress, 0.0
            return
        self._without_step_s += look_s
        if self._session.death is None and 0 < self._step_timeout_s <= self._without_step_s:
            self._session.engine_died(f"no step of it ended in {self._without_step_s:.0f} s (step_timeout_s)")

    def _set(self, name: str, value: float) -> None:
        if name not in self._metrics:
            self._metrics[name] = self._families[name].Metric(labels=self._labels)
        self._metrics[name].set(value)

    def _count_to(self, name: str, total: int) -> None:
        if name not in self._metrics:
            family, labels = self._families.get(name), self._labels
            if family is None:
                family, labels = self._ends, {**self._labels, "end": name.partition(":")[2]}
            self._metrics[name] = family.Metric(labels=labels)
        increase = total - self._counted.get(name, 0)
        if increase:
            self._metrics[name].increment(increase)
            self._counted[name] = total
