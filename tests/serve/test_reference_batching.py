"""What a request gets depends neither on its batch nor on who fails beside it: the real model, in process.

Logits differ by rounding alone, since sums over other shapes round differently. So tokens may differ only where the two
best logits are as close as that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from puzzle_trtllm.serve.runtimes.reference.arguments import read_arguments
from puzzle_trtllm.serve.runtimes.reference.engine import ReferenceEngine
from puzzle_trtllm.serve.runtimes.reference.loading import load_engine
from puzzle_trtllm.serve.runtimes.reference.messages import DecodingRule, Submit
from tests.toys import VOCAB_SIZE

CHILD = [(6, 24), (4, None), (3, 40), (2, 24)]
NEAR_TIE = 1e-4
BF16_TOLERANCE = 0.1
"""Logits of the toys have a standard deviation of about 2; bfloat16 keeps 8 bits, so one rounding of a logit is 0.008,
and every layer adds its own."""


@pytest.fixture(scope="module")
def child(make_checkpoint) -> Path:
    return make_checkpoint(CHILD, seed=3)


def prompt(seed: int, length: int) -> list[int]:
    return torch.randint(7, 90, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [prompt(seed, 5 + 13 * seed) for seed in range(12)]


@dataclass
class Trace:
    """What one request saw and got."""

    tokens: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    error: str | None = None


def make_engine(folder: Path, dtype: str = "float32", **arguments: object) -> ReferenceEngine:
    given = {"max_seq_len": 256, "max_batch_size": 8, "kv_cache_config": {"tokens_per_block": 8}, **arguments}
    return load_engine(read_arguments(folder, {"dtype": dtype, **given})[0])[0]


def run(engine: ReferenceEngine, prompts: list[list[int]], monkeypatch, *, max_tokens: int = 40) -> list[Trace]:
    """Run them together; logits are taken where tokens are chosen."""
    from puzzle_trtllm.serve.runtimes.reference import engine as module

    traces = [Trace() for _ in prompts]
    by_tokens = {id(engine): traces}
    choose = module.choose_tokens

    def watched(logits, rows):
        for row, own in zip(rows, logits, strict=True):
            index = next(i for i, p in enumerate(prompts) if list(row.tokens[: len(p)]) == p)
            trace = by_tokens[id(engine)][index]
            del trace.logits[row.num_generated :]
            trace.logits.append(own.clone())
        return choose(logits, rows)

    with monkeypatch.context() as patch:
        patch.setattr(module, "choose_tokens", watched)
        for index, tokens in enumerate(prompts):
            rule = DecodingRule(max_tokens=max_tokens)
            engine.submit(Submit(request_id=index, prompt_token_ids=tokens, rule=rule, arrival_ns=0))
        while engine.has_work:
            for update in engine.step():
                traces[update.request_id].tokens += update.token_ids
                traces[update.request_id].error = update.error and str(update.error)
    return traces


def test_float32_tokens_alone_and_in_a_full_batch_differ_at_near_ties_only(child, monkeypatch):
    engine = make_engine(child)
    together = run(engine, PROMPTS, monkeypatch)
    steps = ties = differing = 0
    for tokens, crowd in zip(PROMPTS, together, strict=True):
        (alone,) = run(engine, [tokens], monkeypatch)
        for ours, theirs, own, other in zip(alone.tokens, crowd.tokens, alone.logits, crowd.logits, strict=True):
            top = own.topk(2).values
            is_tie = float(top[0] - top[1]) < NEAR_TIE
            steps, ties = steps + 1, ties + is_tie
            if ours != theirs:
                assert is_tie, "the tokens differ where no rounding can have decided"
                differing += 1
                break  # another token, another text from here on
            assert (own - other).abs().max() < NEAR_TIE
    print(f"{steps} steps, {ties} with a top-2 gap below {NEAR_TIE}, {differing} continuations differ there")
    assert steps > 400


def test_bf16_logits_alone_and_in_a_full_batch_agree_within_the_stated_tolerance(child, monkeypatch):
    engine = make_engine(child, "bfloat16")
    together = run(engine, PROMPTS, monkeypatch)
    worst, compared = 0.0, 0
    for tokens, crowd in zip(PROMPTS, together, strict=True):
        (alone,) = run(engine, [tokens], monkeypatch)
        for ours, theirs, own, other in zip(alone.tokens, crowd.tokens, alone.logits, crowd.logits, strict=True):
            worst, compared = max(worst, float((own - other).abs().max())), compared + 1
            if ours != theirs:
                break
    print(f"largest difference of {compared} bfloat16 logit rows: {worst:.4f}")
    assert compared > 100 and worst < BF16_TOLERANCE


def test_a_poisonous_request_fails_alone_in_whichever_chunk_of_its_prompt_it_hides(child, monkeypatch):
    """The model raises in every step that holds the request's token; prompts arrive in chunks beside decoding ones."""
    healthy = PROMPTS[:6]
    engine = make_engine(child, max_num_tokens=24)
    expected = run(engine, healthy, monkeypatch)
    generated = {token for trace in expected for token in trace.tokens}
    poison = next(token for token in (*range(7), *range(90, VOCAB_SIZE)) if token not in generated)
    forward = engine.model.forward

    def poisoned(step, cache):
        if bool((step.token_ids == poison).any()):
            raise RuntimeError("no such embedding")
        return forward(step, cache)

    monkeypatch.setattr(engine.model, "forward", poisoned)
    at_once, in_a_later_chunk = [poison], [*prompt(40, 60), poison]
    traces = run(engine, [*healthy[:2], in_a_later_chunk, *healthy[2:4], at_once, *healthy[4:]], monkeypatch)
    failed = [traces.pop(5), traces.pop(2)]
    assert [trace.error for trace in failed] == ["RuntimeError: no such embedding"] * 2
    assert [(trace.tokens, trace.error) for trace in traces] == [(trace.tokens, None) for trace in expected]
    assert engine.cache.num_free == engine.cache.num_blocks


def test_a_prompt_longer_than_a_step_alone_in_the_engine(child, monkeypatch):
    """Steps of which no row wants logits."""
    (whole,) = run(make_engine(child), [PROMPTS[9]], monkeypatch)
    (chunked,) = run(make_engine(child, max_num_tokens=24), [PROMPTS[9]], monkeypatch)
    assert (chunked.tokens, chunked.error) == (whole.tokens, None)


def test_a_batch_too_large_for_the_memory_is_run_in_parts(child, monkeypatch):
    engine = make_engine(child)
    expected = run(engine, PROMPTS, monkeypatch)
    forward, rows = engine.model.forward, []

    def small(step, cache):
        if len(step.token_ids) > 3 and step.num_decodes:
            raise MemoryError("no more than 3 rows")
        rows.append(len(step.token_ids))
        return forward(step, cache)

    monkeypatch.setattr(engine.model, "forward", small)
    traces = run(engine, PROMPTS, monkeypatch)
    assert [(trace.tokens, trace.error) for trace in traces] == [(trace.tokens, None) for trace in expected]
    assert 2 in rows or 3 in rows


def test_a_sampler_that_fails_fails_its_own_request(child, monkeypatch):
    from puzzle_trtllm.serve.runtimes.reference import engine as module

    engine = make_engine(child)
    expected = run(engine, PROMPTS[:4], monkeypatch)
    choose = module.choose_tokens

    def broken(logits, rows):
        if any(list(row.tokens[:5]) == PROMPTS[0] and row.num_generated == 7 for row in rows):
            raise ValueError("not a distribution")
        return choose(logits, rows)

    monkeypatch.setattr(module, "choose_tokens", broken)
    traces = run(engine, PROMPTS[:4], monkeypatch)
    assert (traces[0].error, traces[0].tokens) == ("ValueError: not a distribution", expected[0].tokens[:7])
    assert [trace.tokens for trace in traces[1:]] == [trace.tokens for trace in expected[1:]]
