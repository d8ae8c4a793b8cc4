"""Which experts can go: a ranked-choice election among the tokens.

Every token ranks all experts of a layer by its router logits and votes for its first k (the experts it would be routed
to). The expert with the fewest votes is dropped; each token that had voted for it votes for its next choice among those
that remain; and so on. The order of dropping is the importance. Unlike counting once, this sees that two experts which
are each other's second choice must not both go.

An expert that no token is routed to has no votes, so it is dropped first (tools that count only the votes they saw
forget it and keep it to the end).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def elimination_order(rankings_TE: NDArray[Any], top_k: int) -> NDArray[np.int64]:
    """Experts in the order in which they are dropped, int64 `[E]`; the last is the most important.

    `rankings_TE[t]` lists token t's experts from most to least preferred. Ties drop the higher index first. Once fewer
    than `top_k` remain every token votes for all of them, so the order of the last `top_k` says nothing; nobody can use
    it either, as a router needs `top_k` experts.
    """
    num_tokens, num_experts = rankings_TE.shape
    tokens = np.arange(num_tokens)
    voted_TE = np.zeros((num_tokens, num_experts), dtype=bool)
    voted_TE[tokens[:, None], rankings_TE[:, :top_k]] = True
    next_choice_T = np.full(num_tokens, top_k)
    votes_E = voted_TE.sum(axis=0)
    remains_E = np.ones(num_experts, dtype=bool)
    order = np.empty(num_experts, dtype=np.int64)
    for step in range(num_experts):
        fewest = votes_E[remains_E].min()
        dropped = np.flatnonzero(remains_E & (votes_E == fewest))[-1]
        order[step] = dropped
        remains_E[dropped] = False
        moving = np.flatnonzero(voted_TE[:, dropped])
        while len(moving):
            moving = moving[next_choice_T[moving] < num_experts]
            choice = rankings_TE[moving, next_choice_T[moving]]
            next_choice_T[moving] += 1
            accepted = remains_E[choice]
            voted_TE[moving[accepted], choice[accepted]] = True
            votes_E += np.bincount(choice[accepted], minlength=num_experts)
            moving = moving[~accepted]
    return order


def importance_from_order(order: NDArray[np.int64]) -> NDArray[np.float32]:
    """float32 `[E]`: the step at which each expert was dropped, 0 for the first; larger means keep."""
    importance = np.empty(len(order), dtype=np.float32)
    importance[order] = np.arange(len(order), dtype=np.float32)
    return importance
