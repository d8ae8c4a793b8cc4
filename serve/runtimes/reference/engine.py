"""The engine core: model, cache and scheduler, advanced one step at a time. No processes, no text, no I/O.

`step` runs the scheduled rows through the model, chooses the next tokens, retires what has ended and reports. When that
raises, the step is run again in parts, and only sequences that fail alone are failed, with the reason: one poisonous
input, or a batch too large for the memory, does not take the others along.
"""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor

from puzzle_trtllm.models.reference.decode_graphs import DecodeGraphs
from puzzle_trtllm.models.reference.model import ReferenceModel
from puzzle_trtllm.models.reference.rank_group import ALONE, Ranks
from puzzle_trtllm.models.reference.step import SequenceStep, plan_step
from puzzle_trtllm.serve.runtimes.api import GenerationError, RequestError, RequestPerfMetrics
from puzzle_trtllm.serve.runtimes.reference.messages import Submit, TokenUpdate
from puzzle_trtllm.serve.runtimes.reference.sampling import choose_tokens
from puzzle_trtllm.serve.runtimes.reference.scheduler import Scheduled, Scheduler, Sequence


class OutOfStepError(RuntimeError):
    """A step that other ranks have begun failed: they can no longer be led."""


class ReferenceEngine:
    """Runs requests to their end; see `puzzle_trtllm.serve.runtimes.reference.loading` for how one is made."""

    def __init__(self, model: ReferenceModel | DecodeGraphs, scheduler: Scheduler, ranks: Ranks = ALONE) -> None:
        self.model = model
        self.scheduler = scheduler
        self.cache = scheduler.cache
        self.ranks = ranks
        """Those that compute every step along with this one."""
        self._num_steps = 0

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    @property
    def stats(self) -> dict[str, Any]:
        """The gauges, in the form of TensorRT-LLM's `get_stats`."""
        reused, missed = self.scheduler.num_reused_blocks, self.scheduler.num_missed_blocks
        return {
            "iter": self._num_steps,
            "numActiveRequests": len(self.scheduler.running),
            "numQueuedRequests": len(self.scheduler.waiting),
            "kvCacheStats": {
                "maxNumBlocks": self.cache.num_blocks,
                "freeNumBlocks": self.cache.num_free,
                "usedNumBlocks": self.cache.num_blocks - self.cache.num_free,
                "reusedBlocks": reused,
                "missedBlocks": missed,
                "cacheHitRate": reused / max(1, reused + missed),
            },
        }

    def submit(self, message: Submit) -> TokenUpdate | None:
        """Queue a request; an update with an error when it cannot run."""
        sequence = Sequence(
            request_id=message.request_id,
            tokens=list(message.prompt_token_ids),
            num_prompt_tokens=len(message.prompt_token_ids),
            rule=message.rule,
            arrival_ns=message.arrival_ns,
        )
        try:
            self.scheduler.add(sequence)
        except Exception as error:  # whatever is wrong with it, it is the request's own
            return TokenUpdate(request_id=message.request_id, token_ids=[], error=RequestError(str(error)))
        return None

    def abort(self, request_id: int) -> TokenUpdate | None:
        """Stop a request and free its blocks; None when it has already ended."""
        sequence = self.scheduler.remove(request_id)
        return None if sequence is None else self._report(sequence, "cancelled", None)

    def step(self) -> list[TokenUpdate]:
        """Advance every scheduled sequence; reports of those that have something to say. Raises OutOfStepError."""
        scheduled = self.scheduler.schedule(time.monotonic_ns())
        if not scheduled:
            return []
        self._num_steps += 1
        return self._attempt(scheduled)

    def _attempt(self, scheduled: list[Scheduled]) -> list[TokenUpdate]:
        try:
            return self._run(scheduled)
        except OutOfStepError:
            raise
        except Exception as error:
            if len(scheduled) > 1:
                return self._run_in_parts(scheduled)
            sequence, _ = scheduled[0]
            self.scheduler.remove(sequence.request_id)
            failure = GenerationError(f"{type(error).__name__}: {error}")
            return [TokenUpdate(request_id=sequence.request_id, token_ids=[], error=failure)]

    def _run_in_parts(self, scheduled: list[Scheduled]) -> list[TokenUpdate]:
        """Run a step that failed once more. Nothing of it was recorded, and a decoding sequence only repeats its write;
        but a prompt chunk may have lost the past that it reads, so its prompt begins again, and comes as far as it was
        alone: beside others it might fail them, and they it, for ever."""
        decodes = [(s, count) for s, count in scheduled if count == 1 and s.num_computed > 0]
        chunks = [row for row in scheduled if row not in decodes]
        half = (len(decodes) + 1) // 2
        updates: list[TokenUpdate] = []
        for part in (decodes[:half], decodes[half:]):
            updates += self._attempt(part) if part else []
        for s, count in chunks:
            reached = s.num_computed + count
            admitted = self.scheduler.begin_again(s)
            while admitted and s.num_computed < reached and s.request_id in self.scheduler.running:
                updates += self._attempt([(s, min(reached - s.num_computed, self.scheduler.max_num_tokens))])
        return updates

    def _run(self, scheduled: list[Scheduled]) -> list[TokenUpdate]:
        """One step; nothing is recorded before all of it has succeeded."""
        steps = [
            SequenceStep(
                tokens=s.tokens[s.num_computed : s.num_computed + count],
                start=s.num_computed,
                blocks=s.blocks,
                wants_logits=count == s.num_pending,
            )
            for s, count in scheduled
        ]
        logits = self._forward(steps)
        ready = [s for s, count in scheduled if count == s.num_pending]
        tokens, logprobs = self.ranks.agree(lambda: choose_tokens(logits, ready))
        for s, count in scheduled:
            start, s.num_computed = s.num_computed, s.num_computed + count
            self.cache.commit(s.blocks, s.block_keys, s.tokens, start, s.num_computed)
        now_ns = time.monotonic_ns()
        reports = (
            self._append(s, token, logprob, now_ns) for s, token, logprob in zip(ready, tokens, logprobs, strict=True)
        )
        return [report for report in reports if report is not None]

    def _forward(self, steps: list[SequenceStep]) -> Tensor:
        try:
            return self.model.forward(plan_step(steps, self.cache), self.cache)
        except Exception as error:
            if self.ranks.size == 1:
                raise
            raise OutOfStepError(f"{type(error).__name__}: {error}") from error

    def _append(self, s: Sequence, token: int, logprob: float | None, now_ns: int) -> TokenUpdate | None:
        s.tokens.append(token)
        s.cumulative_logprob += logprob or 0.0
        s.first_token_ns = s.first_token_ns or now_ns
        finish, stop_reason = _ending(s, token)
        if finish is not None:
            self.scheduler.remove(s.request_id)
            return self._report(s, finish, stop_reason)
        every = s.rule.report_every
        if every and (s.num_generated == 1 or s.num_generated - s.num_reported >= every):
            return self._report(s, None, None)
        return None

    def _report(self, s: Sequence, finish: str | None, stop_reason: int | None) -> TokenUpdate:
        new = s.tokens[s.num_prompt_tokens + s.num_reported :]
        s.num_reported = s.num_generated
        return TokenUpdate(
            request_id=s.request_id,
            token_ids=new,
            finish_reason=finish,
            stop_reason=stop_reason,
            cumulative_logprob=s.cumulative_logprob if s.rule.with_logprob else None,
            metrics=self._metrics(s) if finish else None,
        )

    def _metrics(self, s: Sequence) -> RequestPerfMetrics:
        reused, missed = self.cache.count_reuse(s.num_prompt_tokens, s.num_reused) if s.blocks else (0, 0)
        taken = sum(own.num_taken for own in s.blocks.values())
        return RequestPerfMetrics(
            arrival_time_ns=s.arrival_ns,
            first_scheduled_time_ns=s.first_scheduled_ns,
            first_token_time_ns=s.first_token_ns,
            last_token_time_ns=time.monotonic_ns(),
            num_total_allocated_blocks=taken + sum(own.num_shared for own in s.blocks.values()),
            num_new_allocated_blocks=taken,
            num_reused_blocks=reused,
            num_missed_blocks=missed,
        )


def _ending(s: Sequence, token: int) -> tuple[str | None, int | None]:
    """(finish_reason, stop_reason) after `token`, or (None, None)."""
    if s.num_generated >= s.rule.min_tokens:
        if token in s.rule.end_ids:
            return "stop", None
        if token in s.rule.stop_ids:
            return "stop", token
    return ("length", None) if s.num_generated >= s.rule.max_tokens else (None, None)
