"""Training examples: problems drawn on the fly, rendered as conversations, padded into batches of one effort.

Batches hold one effort, so that short conversations are not padded to the length of long ones. Only what the model
writes is trained on; a slip in a first pass is shown but never taught.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from puzzle_trtllm.demo import problems
from puzzle_trtllm.demo.training import vocabulary

SLIP_SHARE = 0.25
"""Share of high-effort examples whose first pass holds a slip."""

_FULL_COLUMN_CHARACTERS = len("3+7+0=10 ")
IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Inputs `[B, T]` and the next tokens `[B, T]`, IGNORED where nothing is to be learned."""

    inputs: Tensor
    targets: Tensor


def sample_batch(rng: random.Random, effort: str, size: int, digits: Sequence[int]) -> Batch:
    """Draw `size` training problems at one effort; each has one of `digits` digits, repeated ones being likelier."""
    rows = []
    for _ in range(size):
        a, b = problems.sample_operands(rng, "training", rng.choice(digits))
        slip = _sample_slip(rng, a) if effort == "high" and rng.random() < SLIP_SHARE else None
        rows.append(example(a, b, effort, slip=slip))
    return _pad(rows)


def _sample_slip(rng: random.Random, a: int) -> tuple[int, int]:
    """A column and a wrong digit for it, as a copying mistake would make it."""
    column = rng.randrange(len(str(a)))
    right = a // 10**column % 10
    return column, (right + rng.randint(1, 9)) % 10


def example(a: int, b: int, effort: str, *, slip: tuple[int, int] | None = None) -> tuple[list[int], list[int]]:
    """Token ids of a whole conversation, and the ids to learn (IGNORED for the prompt and a slip)."""
    thinking, answer = problems.reasoning_trace(a, b, effort, slip=slip)
    prompt = vocabulary.encode(vocabulary.prompt(problems.prompt_text(a, b), effort))
    written = vocabulary.encode(vocabulary.completion(thinking, answer))
    labels = [IGNORED] * len(prompt) + written
    if slip is not None:
        thinking_start = len(prompt) + len(vocabulary.encode("<|channel|>analysis<|message|>"))
        labels[thinking_start + slip[0] * _FULL_COLUMN_CHARACTERS] = IGNORED
    return prompt + written, labels


def _pad(rows: list[tuple[list[int], list[int]]]) -> Batch:
    length = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [vocabulary.PAD_ID] * (length - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [IGNORED] * (length - len(labels)) for _, labels in rows])
    return Batch(inputs=ids[:, :-1], targets=labels[:, 1:])
