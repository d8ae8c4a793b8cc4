"""From logits to tokens.

Greedy takes the largest logit. Sampling scales by the temperature, keeps the top k, then the smallest set whose
probability reaches top_p, and inverts the cumulative distribution at one uniform number. That number depends only on
(seed, position): a request draws the same tokens whatever it is batched with, and a restart at any position goes on
identically.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from puzzle_trtllm.serve.runtimes.reference.messages import DecodingRule

if TYPE_CHECKING:
    from puzzle_trtllm.serve.runtimes.reference.scheduler import Sequence

HEAD = 1024
"""Tokens that are looked at first for top_p: sorting a whole vocabulary takes twenty times as long as finding these."""


@torch.inference_mode()
def choose_tokens(logits: Tensor, rows: list[Sequence]) -> tuple[list[int], list[float | None]]:
    """Next token of each row of float32 logits `[R, V]`, one of each sequence, and its log-probability where the rule
    asks for it.

    The log-probability is the model's own (before temperature and filters, after penalties and min_tokens).
    """
    for index, row in enumerate(rows):
        if row.rule.has_penalty:
            _apply_penalties(logits[index], row)
        if row.num_generated < row.rule.min_tokens:
            logits[index, sorted(row.rule.end_ids | row.rule.stop_ids)] = float("-inf")
    tokens = logits.argmax(dim=-1).tolist()
    for index, row in enumerate(rows):
        if not row.rule.greedy:
            tokens[index] = _sample(logits[index], row.rule, position=len(row.tokens))
    wanted = [index for index, row in enumerate(rows) if row.rule.with_logprob]
    logprobs: list[float | None] = [None] * len(rows)
    if wanted:
        own = logits[wanted].log_softmax(dim=-1)
        for place, index in enumerate(wanted):
            logprobs[index] = float(own[place, tokens[index]])
    return tokens, logprobs


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends only on its arguments: 53 bits of their hash."""
    digest = blake2b(f"{seed} {position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53


def _sample(logits: Tensor, rule: DecodingRule, *, position: int) -> int:
    ids = torch.arange(len(logits), device=logits.device)
    if 0 < rule.top_k < len(logits):
        logits, ids = logits.topk(rule.top_k)
    # Relative to the largest logit, which no temperature makes infinite.
    shares = ((logits - logits.max()).double() / rule.temperature).softmax(dim=-1)
    if rule.top_p < 1:
        shares, places = _nucleus(shares, rule.top_p)
        ids = ids[places]
    cumulative = shares.cumsum(dim=0)
    place = torch.searchsorted(cumulative, uniform(rule.seed, position) * float(cumulative[-1]), right=True)
    return int(ids[min(int(place), len(ids) - 1)])


def _nucleus(shares: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The largest shares, down to the one with which they reach `top_p` of all, and their places."""
    wanted = top_p * float(shares.sum())
    head, places = shares.topk(min(HEAD, len(shares)))
    if float(head.sum()) < wanted:
        head, places = shares.sort(descending=True)
    kept = int(torch.searchsorted(head.cumsum(dim=0), wanted)) + 1
    return head[:kept], places[:kept]


def _apply_penalties(logits: Tensor, row: Sequence) -> None:
    """In place; prompt and output count alike, as in TensorRT-LLM."""
    rule = row.rule
    row.occurrences.update(row.tokens[row.occurrences.total() :])
    ids = torch.tensor(list(row.occurrences), device=logits.device)
    counts = torch.tensor(list(row.occurrences.values()), device=logits.device)
    own = logits[ids]
    own = torch.where(own < 0, own * rule.repetition_penalty, own / rule.repetition_penalty)
    logits[ids] = own - rule.presence_penalty - rule.frequency_penalty * counts
