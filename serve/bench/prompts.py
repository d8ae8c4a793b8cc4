"""Random prompts of an exact length, all requests of a load alike or with lengths that scatter around a mean.

A prompt is a list of token ids drawn evenly from the ordinary vocabulary: every id of the tokenizer but the special
ones, which steer a chat model or end its answer. Ids are exact; text is not, since encoding merges neighbours. So text
is sent only to a server that takes no ids (a stock llmapi model), and the result then says that lengths are nominal.

Every prompt is different, so that a server which keeps the KV blocks of shared prefixes finds none; equal seeds give
equal prompts, so that two servers see the same load.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence

from puzzle_trtllm.chat import ChatTokenizer
from puzzle_trtllm.errors import BenchError
from puzzle_trtllm.scenario import Spread
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


def random_prompts(token_ids: Sequence[int], *, lengths: Sequence[int], seed: int) -> list[array[int]]:
    """One prompt for each of `lengths`, of exactly so many ids drawn from `token_ids`."""
    source = random.Random(seed)
    return [array("i", source.choices(token_ids, k=length)) for length in lengths]


def draw_lengths(mean: int, spread: Spread | None, *, count: int, seed: str) -> list[int]:
    """`count` lengths in tokens; all equal to `mean` without a spread."""
    source = random.Random(seed)  # a stream of its own: prompts are drawn from the plain seed
    return [mean if spread is None else spread.draw(mean, source) for _ in range(count)]


def load_requests(
    tokenizer: ChatTokenizer,
    *,
    num_requests: int,
    input_tokens: int,
    output_tokens: int,
    seed: int,
    exact: bool,
    input_spread: Spread | None = None,
    output_spread: Spread | None = None,
) -> list[GenerationRequest]:
    """Streaming requests of these lengths. `exact` needs a server that takes token ids and ignores end-of-sequence."""
    lengths = draw_lengths(input_tokens, input_spread, count=num_requests, seed=f"input lengths {seed}")
    max_tokens = draw_lengths(output_tokens, output_spread, count=num_requests, seed=f"output lengths {seed}")
    prompts = random_prompts(ordinary_token_ids(tokenizer), lengths=lengths, seed=seed)
    return [
        prompt_request(tokenizer, prompt, max_tokens=count, exact=exact)
        for prompt, count in zip(prompts, max_tokens, strict=True)
    ]


def prompt_request(
    tokenizer: ChatTokenizer, prompt: Sequence[int] | str, *, max_tokens: int, exact: bool
) -> GenerationRequest:
    """A streaming request for exactly `max_tokens` tokens; as text, for at most so many, to a server without ids."""
    if exact:
        ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        return GenerationRequest(input_ids=ids, max_tokens=max_tokens, ignore_eos=True)
    text = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
    return GenerationRequest(prompt=text, max_tokens=max_tokens)
