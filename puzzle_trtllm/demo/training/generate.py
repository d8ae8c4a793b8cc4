"""Greedy decoding in batches, with a cache; enough to measure a model, not to serve it.

Prompts of one batch must have one length, so that nothing is padded: problems are grouped by their digits. Sequences
that have ended keep being fed until all have; what they produce is cut.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from puzzle_trtllm.demo.training import vocabulary
from puzzle_trtllm.demo.training.attention import Cache
from puzzle_trtllm.demo.training.model import Abacus, Conditions

MAX_NEW_TOKENS = 200


@torch.inference_mode()
def generate(model: Abacus, prompts: Sequence[list[int]], conditions: Conditions) -> list[list[int]]:
    """New token ids of each prompt, `<|return|>` included when it came within MAX_NEW_TOKENS."""
    results: list[list[int]] = [[] for _ in prompts]
    for length in sorted({len(prompt) for prompt in prompts}):
        members = [index for index, prompt in enumerate(prompts) if len(prompt) == length]
        tokens = torch.tensor([prompts[index] for index in members])
        for index, row in zip(members, _generate_batch(model, tokens, conditions), strict=True):
            results[index] = row
    return results


def _generate_batch(model: Abacus, tokens_BT: torch.Tensor, conditions: Conditions) -> list[list[int]]:
    caches = [Cache() for _ in range(model.dims.num_layers)]
    written: list[torch.Tensor] = []
    ended = torch.zeros(len(tokens_BT), dtype=torch.bool)
    while len(written) < MAX_NEW_TOKENS and not ended.all():
        tokens_BT = model(tokens_BT, conditions, caches)[:, -1].argmax(-1, keepdim=True)
        written.append(tokens_BT)
        ended |= tokens_BT[:, 0] == vocabulary.RETURN_ID
    return [_cut(row) for row in torch.cat(written, 1).tolist()]


def _cut(row: list[int]) -> list[int]:
    return row[: row.index(vocabulary.RETURN_ID) + 1] if vocabulary.RETURN_ID in row else row
