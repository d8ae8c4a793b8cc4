"""Two recordings side by side: how often first tokens agree, how far texts run together and logits apart."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from puzzle_trtllm.errors import BenchError
from puzzle_trtllm.serve.acceptance.recording import Continuation, Recording


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Prompts of one length, or all."""

    num_prompts: int
    same_first_token: float
    """Share of prompts whose first token is the same."""
    same_text: float
    """Share of prompts whose whole continuation is the same."""
    mean_common_tokens: float
    max_logprob_difference: float | None
    """Of the first token where it is the same; None where a runtime gives no log-probabilities."""

    def accepted(self, *, min_first_token: float, max_logprob_difference: float) -> bool:
        """Whether the two engines say the same, within these bounds."""
        apart = self.max_logprob_difference
        far = apart is not None and not apart <= max_logprob_difference  # NaN is far
        return self.same_first_token >= min_first_token and not far


def compare(a: Recording, b: Recording) -> dict[str, Agreement]:
    """Agreement by prompt length, shortest first, then over "all".

    Raises BenchError for recordings of different questions.
    """
    for key in ("prompts_fingerprint", "max_tokens"):
        if getattr(a, key) != getattr(b, key):
            raise BenchError(
                "recordings of different questions", key=key, found=getattr(b, key), expected=getattr(a, key)
            )
    if len(a.continuations) != len(b.continuations):
        raise BenchError(
            "recordings of different questions",
            key="continuations",
            found=len(b.continuations),
            expected=len(a.continuations),
        )
    pairs = list(zip(a.continuations, b.continuations, strict=True))
    groups: dict[int, list[tuple[Continuation, Continuation]]] = defaultdict(list)
    for pair in pairs:
        groups[pair[0].prompt_tokens].append(pair)
    return {**{str(n): _agreement(groups[n]) for n in sorted(groups)}, "all": _agreement(pairs)}


def common_tokens(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens before the first that differs."""
    for index, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return index
    return min(len(a), len(b))


def _agreement(pairs: Sequence[tuple[Continuation, Continuation]]) -> Agreement:
    first = [(a, b) for a, b in pairs if a.token_ids[:1] == b.token_ids[:1]]
    apart = [
        abs(a.first_logprob - b.first_logprob)
        for a, b in first
        if a.first_logprob is not None and b.first_logprob is not None
    ]
    return Agreement(
        num_prompts=len(pairs),
        same_first_token=len(first) / len(pairs),
        same_text=sum(a.token_ids == b.token_ids for a, b in pairs) / len(pairs),
        mean_common_tokens=sum(common_tokens(a.token_ids, b.token_ids) for a, b in pairs) / len(pairs),
        max_logprob_difference=max(apart) if apart else None,
    )
