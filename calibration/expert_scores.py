"""Four scores of an expert, each from what tokens chose and what the chosen experts answered.

Token t has router logits l_j(t) and expert outputs f_j(t). Of the experts that remain it is routed to S(t), those with
the k largest logits, with weights w_j = exp l_j / sum over S of exp l. The layer gives y(t) = sum over S of w_j f_j.
Over T tokens, for expert i:

- *votes* = number of tokens with i in S(t). One-shot: how often i is used. With iterative removal: the ranked-choice
  election (`ranked_choice`) that NVIDIA's ModelOpt uses for gpt-oss.
- *output-error* = 1 / (T D) * sum over the tokens with i in S(t) of ||y(t) - y_without_i(t)||^2. Without i the token's
  next-ranked expert takes its place and the softmax runs over the new k. It is the mean squared change of the displaced
  tokens' outputs times the share of tokens displaced: ModelOpt's leave-one-out score, which it has for other models.
- *router-mass* = 1 / T * sum over the tokens with i in S(t) of w_i ||f_i||: how much i contributes in all.
- *reap* = the same sum / number of tokens with i in S(t): how much i contributes when it is asked. Lasby et al., "REAP
  the Experts" (arXiv 2510.13999), equation for the saliency S_j.

An expert that no token is routed to scores 0 in each, so it is the first to go. For all four, larger means keep.

Removal is *one-shot*, all experts scored on the whole layer, or *iterative*: the expert with the lowest score leaves,
its tokens go to their next choices, and the rest are scored again. Then two experts that are each other's substitutes
are seen: once the first has gone, the second matters. For output-error, y stays the whole layer's output, and the
score is what leaving adds to the squared error of all that have left before it.

Iterative removal needs as many choices m of each token as it may lose. When fewer than k of a token's m remain, it is
routed to those (its output is 0 when none remains): an approximation that overrates what they lose. Votes need no
outputs, so they follow the whole ranking.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from puzzle_trtllm.calibration.expert_choices import TokenChoices
from puzzle_trtllm.calibration.ranked_choice import elimination_order, importance_from_order

Score = Literal["votes", "output-error", "router-mass", "reap"]
SCORES: tuple[Score, ...] = get_args(Score)
Removal = Literal["one-shot", "iterative"]
REMOVALS: tuple[Removal, ...] = get_args(Removal)

Mask = NDArray[np.bool_]
_TOKENS_AT_ONCE = 8192


def one_shot(choices: TokenChoices, score: Score) -> NDArray[np.float64]:
    """float64 `[E]`: every expert's score in the whole layer, by the formulas above."""
    remaining_Tm = np.ones(choices.logits.shape, dtype=bool)
    return _by_expert(choices, _shares(choices, remaining_Tm, score), remaining_Tm, score)


def importance(choices: TokenChoices, score: Score, removal: Removal) -> NDArray[np.float32]:
    """float32 `[E]`, larger means keep: the score itself, or the step at which iterative removal drops the expert."""
    if removal == "one-shot":
        return one_shot(choices, score).astype(np.float32)
    if score == "votes":
        return importance_from_order(elimination_order(choices.ranking, choices.top_k))
    return importance_from_order(removal_order(choices, score))


def removal_order(choices: TokenChoices, score: Score) -> NDArray[np.int64]:
    """Experts in the order in which iterative removal drops them, int64 `[E]`; ties drop the higher index first."""
    remaining_E = np.ones(choices.num_experts, dtype=bool)
    remaining_Tm = np.ones(choices.logits.shape, dtype=bool)
    shares_Tm = _shares(choices, remaining_Tm, score)
    chosen_Tm = choices.chosen
    order = np.empty(choices.num_experts, dtype=np.int64)
    for step in range(choices.num_experts):
        scores_E = _by_expert(choices, shares_Tm, remaining_Tm, score)
        unrouted_E = _count(chosen_Tm, _active(remaining_Tm, choices.top_k), choices.num_experts) == 0
        scores_E[unrouted_E] = -np.inf  # leaving can even mend what others broke; but first those that nobody asks
        scores_E[~remaining_E] = np.inf
        dropped = np.flatnonzero(scores_E == scores_E.min())[-1]
        order[step] = dropped
        remaining_E[dropped] = False
        moved = np.flatnonzero((chosen_Tm == dropped).any(axis=1))
        remaining_Tm[moved] &= chosen_Tm[moved] != dropped
        shares_Tm[moved] = _shares(choices, remaining_Tm, score, moved)
    return order


def relative_error(choices: TokenChoices, kept: Sequence[int]) -> float:
    """The layer's root mean square error with only the experts `kept`, relative to its output's root mean square."""
    kept_Tm = np.isin(choices.chosen, kept)
    error = power = 0.0
    for start in range(0, choices.num_tokens, _TOKENS_AT_ONCE):
        block = np.arange(start, min(start + _TOKENS_AT_ONCE, choices.num_tokens))
        gram = choices.gram(block)
        whole = _weights(choices, np.ones_like(kept_Tm[block]), block)
        error += float(_quadratic(whole - _weights(choices, kept_Tm[block], block), gram).sum())
        power += float(_quadratic(whole, gram).sum())
    return float(np.sqrt(error / power)) if power > 0 else 0.0


def share_out_of_choices(choices: TokenChoices, kept: Sequence[int]) -> float:
    """The share of tokens that have fewer than k of `kept` among their m choices: for those, errors are approximate."""
    enough_T = np.isin(choices.chosen, kept).sum(axis=1) >= min(choices.top_k, len(kept))
    return float(1 - enough_T.mean())


def _shares(
    choices: TokenChoices, remaining_Tm: Mask, score: Score, tokens: NDArray[np.int64] | None = None
) -> NDArray[np.float64]:
    """What each choice of each token adds to its expert's score, float64 `[T, m]`, 0 where the token is not routed."""
    tokens = np.arange(choices.num_tokens) if tokens is None else tokens
    if score == "votes":
        return _active(remaining_Tm[tokens], choices.top_k).astype(np.float64)
    share = _error_shares if score == "output-error" else _mass_shares
    blocks = [tokens[start : start + _TOKENS_AT_ONCE] for start in range(0, len(tokens), _TOKENS_AT_ONCE)]
    empty = np.empty((0, choices.num_choices))
    return np.concatenate([empty, *(share(choices, remaining_Tm, block) for block in blocks)])


def _mass_shares(choices: TokenChoices, remaining_Tm: Mask, block: NDArray[np.int64]) -> NDArray[np.float64]:
    norms_Tm = np.sqrt(np.diagonal(choices.gram(block), axis1=1, axis2=2))
    product: NDArray[np.float64] = _weights(choices, remaining_Tm[block], block) * norms_Tm
    return product


def _error_shares(choices: TokenChoices, remaining_Tm: Mask, block: NDArray[np.int64]) -> NDArray[np.float64]:
    gram, remaining = choices.gram(block), remaining_Tm[block]
    whole = _weights(choices, np.ones_like(remaining), block)
    before = _quadratic(whole - _weights(choices, remaining, block), gram)
    active = _active(remaining, choices.top_k)
    shares = np.zeros(remaining.shape)
    for place in range(choices.num_choices):
        without = remaining.copy()
        without[:, place] = False
        after = _quadratic(whole - _weights(choices, without, block), gram)
        shares[:, place] = np.where(active[:, place], after - before, 0.0)
    return shares


def _weights(choices: TokenChoices, remaining: Mask, block: NDArray[np.int64]) -> NDArray[np.float64]:
    """Router weights of the first k that remain, 0 elsewhere, float64 `[T, m]`."""
    active = _active(remaining, choices.top_k)
    logits = np.where(active, choices.logits[block].astype(np.float64), -np.inf)
    largest = logits.max(axis=1, keepdims=True)
    exponents = np.exp(logits - np.where(np.isfinite(largest), largest, 0.0))
    total = exponents.sum(axis=1, keepdims=True)
    weights: NDArray[np.float64] = exponents / np.where(total > 0, total, 1.0)
    return weights


def _active(remaining: Mask, top_k: int) -> Mask:
    """The first k of each token's choices that remain."""
    active: Mask = remaining & (remaining.cumsum(axis=1) <= top_k)
    return active


def _quadratic(weights: NDArray[np.float64], gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """||sum_j weights_j f_j||^2 of each token; never below 0, whatever rounding says."""
    squares: NDArray[np.float64] = np.einsum("ti,tij,tj->t", weights, gram, weights, optimize=True)
    return squares.clip(min=0.0)


def _by_expert(
    choices: TokenChoices, shares_Tm: NDArray[np.float64], remaining_Tm: Mask, score: Score
) -> NDArray[np.float64]:
    chosen_Tm, num_experts = choices.chosen, choices.num_experts
    sums_E = np.bincount(chosen_Tm.ravel(), weights=shares_Tm.ravel(), minlength=num_experts).astype(np.float64)
    divisor: Any = 1
    if score == "reap":
        divisor = np.maximum(_count(chosen_Tm, _active(remaining_Tm, choices.top_k), num_experts), 1)
    elif score != "votes":
        divisor = choices.num_tokens * (choices.hidden_size if score == "output-error" else 1)
    scores_E: NDArray[np.float64] = sums_E / divisor
    return scores_E


def _count(chosen_Tm: NDArray[np.int64], active_Tm: Mask, num_experts: int) -> NDArray[Any]:
    return np.bincount(chosen_Tm[active_Tm], minlength=num_experts)
