"""The engine core without weights: scheduling, accounting and sampling under thousands of requests."""

from __future__ import annotations

import math
import random
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from puzzle_trtllm.kv_layout import plan_layout
from puzzle_trtllm.models.reference.kernels.torch_kernels import TorchKernels
from puzzle_trtllm.models.reference.kv_cache import PagedKvCache
from puzzle_trtllm.models.reference.rank_group import RankGroup
from puzzle_trtllm.serve.runtimes.reference import sampling
from puzzle_trtllm.serve.runtimes.reference.engine import ReferenceEngine
from puzzle_trtllm.serve.runtimes.reference.engine_process import run
from puzzle_trtllm.serve.runtimes.reference.messages import Abort, DecodingRule, Submit, TokenUpdate
from puzzle_trtllm.serve.runtimes.reference.sampling import choose_tokens, uniform
from puzzle_trtllm.serve.runtimes.reference.scheduler import Scheduler, Sequence
from tests.serve.scripted import HANG_S
from tests.toys import toy_architecture

VOCABULARY = 50
END = 3


class RandomModel:
    """Logits without a forward pass; checks that no step exceeds its limits."""

    dtype = torch.float32

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, step, cache) -> torch.Tensor:
        assert len(step.token_ids) <= self.max_rows
        return torch.randn(len(step.logit_rows), VOCABULARY, generator=self.generator)


def make_engine(
    *, max_batch_size: int = 16, max_num_tokens: int = 64, budget: int = 1 << 20, dtype: torch.dtype = torch.bfloat16
) -> ReferenceEngine:
    layout = plan_layout(
        toy_architecture([(4, 24), (4, None), (4, 7)]),
        tokens_per_block=8,
        dtype=dtype,
        budget_bytes=budget,
        sequence_tokens=120,
        max_sequences=max_batch_size,
        reuse=True,
    )
    cache = PagedKvCache(layout, torch.device("cpu"))
    model = RandomModel(max_num_tokens)
    scheduler = Scheduler(cache, max_batch_size=max_batch_size, max_num_tokens=max_num_tokens)
    return ReferenceEngine(model, scheduler)  # type: ignore[arg-type]


def submit(engine: ReferenceEngine, request_id: int, prompt: int | list[int], **rule: object) -> None:
    message = Submit(
        request_id=request_id,
        prompt_token_ids=prompt if isinstance(prompt, list) else [5] * prompt,
        rule=DecodingRule(**rule),  # type: ignore[arg-type]
        arrival_ns=0,
    )
    assert engine.submit(message) is None


def test_ten_thousand_requests_with_random_aborts_lose_no_block():
    engine, rng = make_engine(), random.Random(0)
    ends: Counter[str] = Counter()
    open_ids: set[int] = set()

    def take(updates: list[TokenUpdate]) -> None:
        for update in updates:
            assert update.error is None
            if update.finish_reason:
                ends[update.finish_reason] += 1
                open_ids.discard(update.request_id)

    for request_id in range(10_000):
        prompt = family_prompt(rng, rng.randint(1, 60))
        submit(engine, request_id, prompt, max_tokens=rng.randint(1, 12), end_ids=frozenset({END}))
        open_ids.add(request_id)
        if rng.random() < 0.3:
            victim = rng.choice(sorted(open_ids))
            update = engine.abort(victim)
            take([update] if update else [])
        while len(open_ids) > 40:
            take(engine.step())
    while engine.has_work:
        take(engine.step())
    assert sum(ends.values()) == 10_000
    assert min(ends["stop"], ends["length"], ends["cancelled"]) > 100, ends
    stats = engine.stats["kvCacheStats"]
    assert stats["freeNumBlocks"] == stats["maxNumBlocks"], "blocks that only remember a prefix count as free"
    assert 0.15 < stats["cacheHitRate"] < 0.35
    for pool in engine.cache.pools.values():
        assert (pool.table.num_free, pool.num_reserved, pool.table.num_shares) == (pool.num_blocks, 0, 0)


@pytest.mark.parametrize(("budget", "reused"), [(200_000, 20), (2_000_000, 300)], ids=["tight", "roomy"])
def test_what_a_sequence_sees_in_the_cache_is_its_own_whatever_was_shared_evicted_and_aborted(
    monkeypatch, budget, reused
):
    """K is written as a checksum of all tokens up to its position; after every step each open sequence is checked."""
    engine, rng = make_engine(max_batch_size=6, budget=budget, max_num_tokens=40, dtype=torch.float32), random.Random(1)
    scheduled: list[Sequence] = []
    kernels = TorchKernels(dequantize_experts=True)

    def write_checksums(step, cache) -> torch.Tensor:
        values = torch.tensor([checksum for s in scheduled for checksum in checksums(s)], dtype=torch.float32)
        for pool in cache.pools.values():
            group = step.groups[pool.window]
            own = values if group.write_tokens is None else values[group.write_tokens]
            for layer in pool.layers:
                kv = own[None, :, None, None].expand(2, -1, 2, 16)
                kernels.write(cache.storage[layer], group.write_rows, group.write_offsets, kv)
        return torch.randn(len(step.logit_rows), VOCABULARY, generator=engine.model.generator)

    def checksums(s: Sequence) -> list[int]:
        return [prefix_checksum(s.tokens[: p + 1]) for p in range(s.num_computed, s.num_computed + counts[s])]

    counts: dict[Sequence, int] = {}
    schedule = engine.scheduler.schedule

    def remember_schedule(now_ns: int) -> list[tuple[Sequence, int]]:
        rows = schedule(now_ns)
        counts.clear()
        counts.update(rows)
        scheduled[:] = [s for s, _ in rows]
        return rows

    monkeypatch.setattr(engine.model, "forward", write_checksums)
    monkeypatch.setattr(engine.scheduler, "schedule", remember_schedule)
    checked = 0
    for request_id in range(400):
        submit(engine, request_id, family_prompt(rng, rng.randint(1, 90)), max_tokens=rng.randint(1, 25))
        if rng.random() < 0.2:
            engine.abort(rng.randint(0, request_id))
        for _ in range(rng.randint(0, 3)):
            assert not any(u.error for u in engine.step())
            for s in engine.scheduler.running.values():
                checked += check_cache(engine.cache, s)
    assert checked > 10_000 and engine.scheduler.num_reused_blocks > reused


def check_cache(cache: PagedKvCache, s: Sequence) -> int:
    """Compare what the next query of `s` sees in every group; how many keys that were."""
    checked = 0
    for window, pool in cache.pools.items():
        own = s.blocks[window]
        first = 0 if window is None else max(0, s.num_computed - window + 1)
        for position in range(first, s.num_computed):
            block = own.blocks[position // 8 - own.first_block]
            stored = pool.storage[0, 0, block * 2, position % 8, 0]
            assert int(stored) == prefix_checksum(s.tokens[: position + 1]), (window, position)
            checked += 1
    return checked


def prefix_checksum(tokens: list[int]) -> int:
    """Small enough for a float32 to hold."""
    return zlib.crc32(bytes(tokens)) >> 8


def family_prompt(rng: random.Random, length: int) -> list[int]:
    """A prompt of one of eight families, alike to a random point."""
    family = random.Random(rng.randint(0, 7))
    common = rng.randint(0, length)
    return [family.randint(5, 20) for _ in range(common)] + [rng.randint(5, 20) for _ in range(length - common)]


def test_first_come_first_served_and_nobody_starves():
    engine = make_engine(max_batch_size=4, budget=60_000)
    for request_id in range(40):
        submit(engine, request_id, 1 + (request_id * 37) % 60, max_tokens=10)
    first_tokens: list[int] = []
    while engine.has_work:
        first_tokens += [u.request_id for u in engine.step() if u.request_id not in first_tokens]
    started = [first_tokens.index(i) for i in range(40)]
    # Requests admitted together may finish their prompts in another order; never by more than the batch size.
    assert all(abs(place - i) < 4 for i, place in enumerate(started))


def test_decoding_goes_on_while_a_long_prompt_arrives_in_chunks():
    engine = make_engine(max_num_tokens=16)
    submit(engine, 1, 4, max_tokens=30)
    engine.step()
    submit(engine, 2, 100, max_tokens=1)
    tokens_of_first = sum(len(u.token_ids) for _ in range(7) for u in engine.step() if u.request_id == 1)
    assert tokens_of_first == 7, "one token a step, however long the other's prompt is"


class ThreadRank(RankGroup):
    """One of two ranks that are threads."""

    def __init__(self, rank: int, link: SimpleQueue[object]) -> None:
        self.rank = rank
        self.link = link

    def share(self, value: object = None) -> object:
        if self.rank:
            return self.link.get(timeout=HANG_S)
        self.link.put(value)
        return value


def test_a_rank_that_hears_the_messages_and_the_choices_runs_the_same_steps():
    """Random arrivals and aborts, and requests whose sampling fails: those alone fail, on both ranks alike."""
    generator = random.Random(5)
    link: SimpleQueue[object] = SimpleQueue()
    inbox: list[list[Submit | Abort]] = []
    poisoned = set(range(0, 60, 9))
    for request_id in range(60):
        temperature = None if request_id in poisoned else 1.0
        rule: dict[str, object] = {"greedy": False, "seed": request_id, "temperature": temperature}
        message = Submit(
            request_id=request_id,
            prompt_token_ids=family_prompt(generator, generator.randrange(1, 100)),
            rule=DecodingRule(max_tokens=generator.randrange(1, 20), **rule),  # type: ignore[arg-type]
            arrival_ns=0,
        )
        aborted = [Abort(request_id=generator.randrange(60))] if generator.random() < 0.3 else []
        inbox.append([message, *aborted])

    def take_part(rank: int) -> tuple[list[tuple[object, ...]], dict[str, Any]]:
        ranks = ThreadRank(rank, link)
        engine = make_engine(budget=1 << 18)
        engine.ranks = ranks
        if rank:  # as the logits are gathered: on the leader alone
            engine.model = SimpleNamespace(forward=lambda step, cache: torch.empty(0, VOCABULARY))  # type: ignore[assignment]
        messages = iter(inbox)
        reports: list[TokenUpdate] = []

        def receive(wait: bool) -> list[Submit | Abort] | None:
            return cast("list[Submit | Abort] | None", ranks.share(next(messages, None if wait else [])))

        run(engine, receive, lambda report: reports.extend(report.updates))
        told = [(r.request_id, r.token_ids, r.finish_reason, r.error is not None) for r in reports]
        return cast("list[tuple[object, ...]]", told), engine.stats

    with ThreadPoolExecutor(2) as threads:
        (told, stats), other = threads.map(take_part, [0, 1])
    assert (told, stats) == other
    failed = {request_id for request_id, _, _, is_error in told if is_error}
    assert failed and failed <= poisoned
    assert {request_id for request_id, _, finish, _ in told if finish} == set(range(60)) - failed
    assert stats["kvCacheStats"]["usedNumBlocks"] == 0


def test_a_request_may_fill_the_cache_to_its_last_position_and_no_further():
    """Room for one sequence of 120 tokens; the last token of an answer is never fed back."""
    engine = make_engine(max_batch_size=1, max_num_tokens=200)
    submit(engine, 1, 100, max_tokens=21)
    assert len([token for _ in range(21) for update in engine.step() for token in update.token_ids]) == 21
    beyond = Submit(request_id=2, prompt_token_ids=[5] * 100, rule=DecodingRule(max_tokens=22), arrival_ns=0)
    refused = engine.submit(beyond)
    assert refused is not None and "KV cache for 121 tokens" in str(refused.error)


def test_no_more_sequences_run_than_a_step_has_tokens():
    engine = make_engine(max_batch_size=8, max_num_tokens=4)
    for request_id in range(8):
        submit(engine, request_id, 1, max_tokens=10)
    for _ in range(3):
        engine.step()
    assert engine.stats["numActiveRequests"] == 4


def test_a_step_is_filled_to_its_last_token_and_nobody_is_in_it_with_none():
    engine = make_engine(max_num_tokens=7)
    for request_id, prompt in enumerate((3, 3, 9, 2)):
        submit(engine, request_id, prompt, max_tokens=10)
    assert [(s.request_id, count) for s, count in engine.scheduler.schedule(0)] == [(0, 3), (1, 3), (2, 1)]


def test_reports_come_every_interval_and_lose_no_token():
    engine = make_engine()
    submit(engine, 1, 4, max_tokens=23, report_every=10)
    submit(engine, 2, 4, max_tokens=23, report_every=0)
    updates = [update for _ in range(23) for update in engine.step()]
    assert [len(u.token_ids) for u in updates if u.request_id == 1] == [1, 10, 10, 2]
    assert [len(u.token_ids) for u in updates if u.request_id == 2] == [23]


@given(seed=st.integers(0, 2**63 - 1), position=st.integers(0, 10**6))
def test_the_random_number_is_a_function_of_seed_and_position(seed, position):
    assert 0 <= uniform(seed, position) < 1
    assert uniform(seed, position) == uniform(seed, position)


def test_the_random_numbers_are_uniform_over_seeds_and_positions():
    for draws in ([uniform(7, i) for i in range(20_000)], [uniform(i, 7) for i in range(20_000)]):
        counts = torch.histc(torch.tensor(draws, dtype=torch.float64), bins=20, min=0, max=1)
        chi_square = float(((counts - 1000) ** 2 / 1000).sum())
        assert chi_square < 45  # 19 degrees of freedom: exceeded once in 1,400 tries


@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature"), [(0, 1.0, 1.0), (5, 1.0, 0.7), (0, 0.6, 1.3), (8, 0.8, 2.0)]
)
def test_sampled_frequencies_follow_the_filtered_distribution(top_k, top_p, temperature):
    logits = torch.randn(12, generator=torch.Generator().manual_seed(1)) * 2
    # The oracle, written out: scale, keep the k largest, then the smallest head that reaches top_p, renormalise.
    order = logits.argsort(descending=True)
    kept = order[: top_k or 12]
    probabilities = (logits[kept].double() / temperature).softmax(-1)
    reached = next(i for i in range(len(kept)) if probabilities[: i + 1].sum() >= top_p - 1e-12)
    head = probabilities[: reached + 1] / probabilities[: reached + 1].sum()
    draws: Counter[int] = Counter()
    for seed in range(4000):
        rule = DecodingRule(max_tokens=1, greedy=False, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        row = Sequence(request_id=1, rule=rule, tokens=[1, 2], num_prompt_tokens=2, arrival_ns=0)
        draws[choose_tokens(logits[None].clone(), [row])[0][0]] += 1
    assert set(draws) <= set(kept[: reached + 1].tolist())
    for token, probability in zip(kept.tolist(), head.tolist(), strict=False):
        assert draws[token] / 4000 == pytest.approx(probability, abs=4 * (probability / 4000) ** 0.5 + 0.002)


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.9999])
def test_top_p_finds_the_same_tokens_however_many_it_looks_at_first(top_p, monkeypatch):
    logits = torch.randn(300, generator=torch.Generator().manual_seed(3))
    drawn = []
    for head in (2, 1000):
        monkeypatch.setattr(sampling, "HEAD", head)
        rules = [DecodingRule(max_tokens=1, greedy=False, top_p=top_p, seed=seed) for seed in range(100)]
        rows = [Sequence(request_id=1, rule=rule, tokens=[1], num_prompt_tokens=1, arrival_ns=0) for rule in rules]
        drawn.append(choose_tokens(logits.repeat(100, 1), rows)[0])
    assert drawn[0] == drawn[1] and len(set(drawn[0])) > 10


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_large_vocabulary_is_not_sorted_for_a_token(top_p, monkeypatch):
    logits = torch.randn(1, 50_000, generator=torch.Generator().manual_seed(3)) * 5
    asked, topk = [0], torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, "topk", lambda self, k: asked.append(k) or topk(self, k))
    rule = DecodingRule(max_tokens=1, greedy=False, top_p=top_p)
    choose_tokens(logits, [Sequence(request_id=1, rule=rule, tokens=[1], num_prompt_tokens=1, arrival_ns=0)])
    assert max(asked) <= sampling.HEAD


def test_penalties_lower_what_was_seen_in_the_prompt_too():
    """As TensorRT-LLM's `batchApplyPenalty` (penaltyKernels.cu) and the PenaltyHandler of its TorchSampler count."""
    logits = torch.tensor([[2.0, 1.9, -1.0, 0.5]])
    rule = DecodingRule(max_tokens=9, frequency_penalty=0.1, presence_penalty=0.2, repetition_penalty=2.0)
    row = Sequence(request_id=1, rule=rule, tokens=[3, 2], num_prompt_tokens=2, arrival_ns=0)
    choose_tokens(logits.clone(), [row])
    row.tokens += [0, 0]
    work = logits.clone()
    choose_tokens(work, [row])
    # token 0: twice (2.0 / 2 - 0.2 - 2 * 0.1); once each, in the prompt, 2 (-1.0 * 2 - 0.2 - 0.1) and 3 (0.5 / 2 - 0.3)
    assert work[0].tolist() == pytest.approx([0.6, 1.9, -2.3, -0.05])


def row_of(tokens=(1, 2), num_prompt_tokens=1, **rule):
    rule = DecodingRule(max_tokens=9, **rule)
    return Sequence(request_id=1, rule=rule, tokens=list(tokens), num_prompt_tokens=num_prompt_tokens, arrival_ns=0)


def test_each_row_of_a_batch_is_chosen_by_its_own_rule_and_tells_the_models_log_probability():
    """Neither temperature nor filters are in it; a row that did not ask for it gets none."""
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.9]]).repeat(4, 1)
    sampled = {"greedy": False, "temperature": 100.0, "top_k": 3}
    seed = next(
        seed for seed in range(100) if choose_tokens(logits[:1].clone(), [row_of(**sampled, seed=seed)])[0] == [2]
    )
    rows = [
        row_of(with_logprob=True),
        row_of(**sampled, seed=seed, with_logprob=True),
        row_of(),
        row_of(end_ids=frozenset({1}), min_tokens=5, with_logprob=True),
    ]
    tokens, logprobs = choose_tokens(logits.clone(), rows)
    assert tokens == [1, 2, 1, 3]
    total = sum(math.exp(x) for x in (0.0, 3.0, 1.0, 2.9))
    assert logprobs[0] == pytest.approx(3.0 - math.log(total), abs=1e-5)
    assert logprobs[1] == pytest.approx(1.0 - math.log(total), abs=1e-5)
    assert logprobs[2] is None
    # Of what min_tokens leaves.
    assert logprobs[3] == pytest.approx(2.9 - math.log(total - math.exp(3.0)), abs=1e-5)


@pytest.mark.parametrize("generated", [0, 1, 2])
def test_nothing_that_ends_a_request_is_chosen_before_min_tokens(generated):
    rule = {"end_ids": frozenset({0}), "stop_ids": frozenset({1}), "min_tokens": 2}
    row = row_of([5] * (3 + generated), 3, **rule)
    assert choose_tokens(torch.tensor([[3.0, 2.0, 1.0]]), [row])[0] == [2 if generated < 2 else 0]


@pytest.mark.parametrize("temperature", [1e-5, 1e-308, 5e-324])
def test_a_temperature_near_zero_takes_the_largest_logit(temperature):
    rule = DecodingRule(max_tokens=9, greedy=False, temperature=temperature, top_k=3)
    row = Sequence(request_id=1, rule=rule, tokens=[1], num_prompt_tokens=1, arrival_ns=0)
    assert choose_tokens(torch.tensor([[3.0, 2.9, -1.0, 0.5]]), [row])[0] == [0]
