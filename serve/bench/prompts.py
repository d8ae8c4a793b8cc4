"""Random prompts of an exact length.

A prompt is a list of token ids drawn evenly from the ordinary vocabulary: every id of the tokenizer but the special
ones, which steer a chat model or end its answer. Ids are exact; text is not, since encoding merges neighbours. So text
is sent only to a server that takes no ids (a stock llmapi model), and the result then says that lengths are nominal.

Every prompt is different, so that a server which keeps the KV blocks of shared prefixes finds none; equal seeds give
equal prompts, so that two servers see the same load.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from puzzle_trtllm.chat import ChatTokenizer
from puzzle_trtllm.errors import BenchError
from puzzle_trtllm.serve.client.request import GenerationRequest


def ordinary_token_ids(tokenizer: ChatTokenizer) -> list[int]:
    """Ids of the vocabulary that are not special tokens, ascending. Raises BenchError when there is none."""
    added = set(tokenizer.tokenizer.get_added_tokens_decoder())
    unknown = getattr(tokenizer.tokenizer.model, "unk_token", None)
    vocabulary = tokenizer.tokenizer.get_vocab(with_added_tokens=True)
    ids = sorted(token_id for token, token_id in vocabulary.items() if token_id not in added and token != unknown)
    if not ids:
        raise BenchError("holds special tokens only", file=tokenizer.folder / "tokenizer.json")
    return ids


def random_prompts(token_ids: Sequence[int], *, num_prompts: int, input_tokens: int, seed: int) -> list[list[int]]:
    """`num_prompts` lists of exactly `input_tokens` ids drawn from `token_ids`."""
    rng = random.Random(seed)
    return [rng.choices(token_ids, k=input_tokens) for _ in range(num_prompts)]


def load_requests(
    tokenizer: ChatTokenizer, *, num_requests: int, input_tokens: int, output_tokens: int, seed: int, exact: bool
) -> list[GenerationRequest]:
    """Streaming requests of these lengths. `exact` needs a server that takes token ids and ignores end-of-sequence."""
    prompts = random_prompts(
        ordinary_token_ids(tokenizer), num_prompts=num_requests, input_tokens=input_tokens, seed=seed
    )
    if exact:
        return [GenerationRequest(input_ids=ids, max_tokens=output_tokens, ignore_eos=True) for ids in prompts]
    return [GenerationRequest(prompt=tokenizer.decode(ids), max_tokens=output_tokens) for ids in prompts]
