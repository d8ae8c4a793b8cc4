"""Which experts a child keeps: the careful way and two careless ones, compared without writing a child.

Switching an expert off in the router equals removing it, so every choice can be tried on the parent itself.

- careful: ranked-choice voting. Every token of real conversations votes for its top k experts; the least voted expert
  leaves and its votes go to those tokens' next choices; repeat.
- most_used: drop the experts that got most first votes.
- random: drop any.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor


def first_votes(logits_NE: Tensor, top_k: int) -> Tensor:
    """How many tokens have each expert among their top k, `[E]`."""
    return torch.bincount(logits_NE.topk(top_k).indices.flatten(), minlength=logits_NE.shape[1])


def elimination_order(logits_NE: Tensor, top_k: int) -> list[int]:
    """Experts from the first to go to the last, by ranked-choice voting; ties go to the higher index."""
    order: list[int] = []
    remaining = logits_NE.clone()
    while len(order) < logits_NE.shape[1]:
        left = logits_NE.shape[1] - len(order)
        votes = first_votes(remaining, min(top_k, left)).tolist()
        loser = min((v, -e) for e, v in enumerate(votes) if e not in order)[1]
        order.append(-loser)
        remaining[:, -loser] = float("-inf")
    return order


def choose_dropped(how: str, routing: list[Tensor], kept: tuple[int, ...], top_k: int, seed: int) -> Tensor:
    """Bool `[L, E]`, true for the experts to drop; `how` is careful, most_used or random."""
    rng = random.Random(seed)
    dropped = torch.zeros(len(routing), routing[0].shape[1], dtype=torch.bool)
    for layer, (logits, keep) in enumerate(zip(routing, kept, strict=True)):
        experts = logits.shape[1]
        if how == "careful":
            order = elimination_order(logits, top_k)
        elif how == "most_used":
            order = first_votes(logits, top_k).argsort(descending=True).tolist()
        else:
            order = rng.sample(range(experts), experts)
        dropped[layer, order[: experts - keep]] = True
    return dropped
