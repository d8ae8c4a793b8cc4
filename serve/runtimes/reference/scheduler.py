"""In-flight batching: which sequences run in the next step, and with how many tokens each.

A request is admitted, in order of arrival, when every pool can hold it up to its last possible token (TensorRT-LLM's
GUARANTEED_NO_EVICT): once running it is never thrown out. Each step first gives every decoding sequence its one token;
what is left of `max_num_tokens` goes to prompt chunks, oldest first. Nobody overtakes the head of the queue, so nobody
starves. What the cache holds of a prompt's beginning is not computed again.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

from puzzle_trtllm.models.reference.kv_cache import BlocksByWindow, PagedKvCache
from puzzle_trtllm.serve.runtimes.reference.messages import DecodingRule


@dataclass(kw_only=True, eq=False)
class Sequence:
    """A request inside the engine."""

    request_id: int
    tokens: list[int]
    """Prompt, then generated."""
    num_prompt_tokens: int
    rule: DecodingRule
    arrival_ns: int
    num_computed: int = 0
    """Tokens whose K and V are in the cache."""
    blocks: BlocksByWindow = field(default_factory=dict)
    block_keys: list[bytes] = field(default_factory=list)
    """Under which others find its full blocks: those of the prompt, then those it filled itself."""
    num_reused: int = 0
    """Prompt tokens found in the cache."""
    num_reported: int = 0
    cumulative_logprob: float = 0.0
    occurrences: Counter[int] = field(default_factory=Counter)
    """Of each token, for penalties; counted when they are asked for."""
    first_scheduled_ns: int = 0
    first_token_ns: int = 0

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def num_pending(self) -> int:
        """Known tokens that have not been through the model: 1 while decoding, more while prefilling."""
        return len(self.tokens) - self.num_computed

    @property
    def max_tokens(self) -> int:
        """Cache positions that it can ever use: the last token is never fed back."""
        return self.num_prompt_tokens + self.rule.max_tokens - 1


Scheduled: TypeAlias = tuple[Sequence, int]
"""A sequence and the number of its pending tokens that run in this step."""


class Scheduler:
    """The waiting queue and the running set."""

    def __init__(self, cache: PagedKvCache, *, max_batch_size: int, max_num_tokens: int) -> None:
        self.cache = cache
        self.max_batch_size = min(max_batch_size, max_num_tokens)
        self.max_num_tokens = max_num_tokens
        self.waiting: OrderedDict[int, Sequence] = OrderedDict()
        self.running: dict[int, Sequence] = {}
        self.num_reused_blocks = 0
        self.num_missed_blocks = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises ValueError when it cannot ever run."""
        if not self.cache.can_ever_hold(sequence.max_tokens):
            raise ValueError(
                f"the request needs KV cache for {sequence.max_tokens} tokens, more than the whole cache can hold"
            )
        sequence.block_keys = self.cache.keys(sequence.tokens)
        self.waiting[sequence.request_id] = sequence

    def schedule(self, now_ns: int) -> list[Scheduled]:
        """The next step as (sequence, number of its pending tokens), decoding sequences first."""
        decodes = [(s, 1) for s in self.running.values() if s.num_pending == 1 and s.num_computed > 0]
        budget = self.max_num_tokens - len(decodes)
        chunks: list[Scheduled] = []
        prefilling = [s for s in self.running.values() if not (s.num_pending == 1 and s.num_computed > 0)]
        for sequence in self._with_admissions(prefilling, now_ns):
            if budget == 0:
                break
            count = min(sequence.num_pending, budget)
            chunks.append((sequence, count))
            budget -= count
        # The last token of a chunked prompt, alone in its chunk, looks like a decoding step and is laid out as one.
        chunks.sort(key=lambda chunk: not (chunk[1] == 1 and chunk[0].num_computed > 0))
        return decodes + chunks

    def remove(self, request_id: int) -> Sequence | None:
        """Take a sequence out, wherever it is, and free its blocks. None when it is not here (any more)."""
        if request_id not in self.running:
            return self.waiting.pop(request_id, None)
        sequence = self.running.pop(request_id)
        self.cache.release(sequence.blocks, sequence.max_tokens)
        return sequence

    def begin_again(self, sequence: Sequence) -> bool:
        """Forget what a running sequence has computed; False when it has to wait, as the first, for room to do so."""
        self.remove(sequence.request_id)
        self.waiting[sequence.request_id] = sequence
        self.waiting.move_to_end(sequence.request_id, last=False)
        return self._admit(sequence)

    def _with_admissions(self, prefilling: Iterable[Sequence], now_ns: int) -> Iterable[Sequence]:
        """The sequences in prefill, then newly admitted ones for as long as they are asked for and fit."""
        yield from prefilling
        while self.waiting and len(self.running) < self.max_batch_size:
            sequence = next(iter(self.waiting.values()))
            if not self._admit(sequence):
                return
            sequence.first_scheduled_ns = now_ns
            reused, missed = self.cache.count_reuse(sequence.num_prompt_tokens, sequence.num_reused)
            self.num_reused_blocks += reused
            self.num_missed_blocks += missed
            yield sequence

    def _admit(self, sequence: Sequence) -> bool:
        """Have a waiting sequence run, from where the cache leaves it to begin; False when it does not fit."""
        num_reused = self.cache.find_prefix(sequence.block_keys, sequence.num_prompt_tokens)
        blocks = self.cache.admit(sequence.max_tokens, sequence.block_keys, num_reused)
        if blocks is None:
            return False
        sequence.blocks = blocks
        sequence.num_computed = sequence.num_reused = num_reused
        self.running[sequence.request_id] = self.waiting.pop(sequence.request_id)
        return True
