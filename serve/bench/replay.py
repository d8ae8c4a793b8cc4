"""What a trace becomes: requests with its lengths or prompts, and a load that says which trace it was.

Prompts that the trace describes by their length alone are random; where it names blocks (hash_ids), a block's tokens
are drawn from its id, so requests share prefixes as they did when the trace was recorded.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from typing import Any

from puzzle_trtllm.chat import ChatTokenizer
from puzzle_trtllm.errors import BenchError
from puzzle_trtllm.scenario import Arrival, OpenScenario, ReplayScenario, Scenario, TraceFacts
from puzzle_trtllm.serve.bench.prompts import ordinary_token_ids, prompt_request
from puzzle_trtllm.serve.client.request import GenerationRequest
from puzzle_trtllm.trace import Trace, TracedRequest

TraceLoad = Scenario | OpenScenario | ReplayScenario


def trace_load(
    trace: Trace,
    tokenizer: ChatTokenizer,
    *,
    concurrency: int | None = None,
    request_rate: float | None = None,
    arrival: Arrival | None = None,
    speed: float | None = None,
    **fields: Any,
) -> TraceLoad:
    """The load of a trace: closed with a `concurrency`, open with a `request_rate`, else at the trace's own moments.

    `fields` are Load's (warmup_requests, limits). Raises BenchError for token ids of another model, for a trace without
    moments, or without a span of time between them, and for a concurrency that its requests cannot reach.
    """
    _check_token_ids(trace, tokenizer.largest_id)
    inputs = [_input_length(request, tokenizer) for request in trace.requests]
    outputs = [request.output_length for request in trace.requests]
    fields |= {
        "name": trace.file.stem,
        "description": f"trace {trace.file.name}",
        "input_tokens": max(1, round(sum(inputs) / len(inputs))),
        "output_tokens": max(1, round(sum(outputs) / len(outputs))),
        "num_requests": len(trace.requests),
        "trace": TraceFacts(
            file=trace.file.name,
            sha256=trace.sha256,
            longest_sequence=max(map(sum, zip(inputs, outputs, strict=True))),
            shared_blocks=any(request.hash_ids for request in trace.requests),
            ignored_keys=trace.ignored_keys,
        ),
    }
    if concurrency is not None:
        return Scenario(concurrency=concurrency, **fields)
    if request_rate is not None:
        return OpenScenario(request_rate=request_rate, arrival=arrival or "poisson", **fields)
    if not trace.has_times:
        raise BenchError(
            "missing: there is nothing to replay", file=trace.file, key="timestamp", expected="a rate or a concurrency"
        )
    if not trace.requests[-1].time_ns:
        raise BenchError(
            "the same in every line: no time passes",
            file=trace.file,
            key="timestamp",
            expected="a rate or a concurrency",
        )
    return ReplayScenario(speed=speed or 1.0, **fields)


def _check_token_ids(trace: Trace, largest_id: int) -> None:
    largest = max((max(request.input_ids) for request in trace.requests if request.input_ids), default=0)
    if largest > largest_id:
        raise BenchError(
            "a token id that the tokenizer does not have (another model's trace?)",
            file=trace.file,
            key="input_ids",
            found=largest,
            expected=f"at most {largest_id}",
        )


def replay_times_ns(trace: Trace, *, speed: float) -> list[int]:
    """When each request arrives, ns after the start. The trace must have times."""
    return [round((request.time_ns or 0) / speed) for request in trace.requests]


def trace_requests(trace: Trace, tokenizer: ChatTokenizer, *, seed: int, exact: bool) -> list[GenerationRequest]:
    """The trace's requests; equal seeds give equal prompts."""
    ids = ordinary_token_ids(tokenizer)
    blocks: dict[int, array[int]] = {}
    source = random.Random(f"trace {seed}")  # a stream of its own: the warm-up's prompts are drawn from the plain seed
    requests = []
    for request in trace.requests:
        prompt: Sequence[int] | str
        if request.text_input is not None:
            prompt = request.text_input
        elif request.input_ids is not None:
            prompt = request.input_ids
        elif request.hash_ids:
            prompt = _prompt_of_blocks(request, ids, blocks, block_tokens=trace.block_tokens, seed=seed)
        else:
            assert request.input_length is not None
            prompt = array("i", source.choices(ids, k=request.input_length))
        requests.append(prompt_request(tokenizer, prompt, max_tokens=request.output_length, exact=exact))
    return requests


def _prompt_of_blocks(
    request: TracedRequest, ids: Sequence[int], blocks: dict[int, array[int]], *, block_tokens: int, seed: int
) -> array[int]:
    prompt = array("i")
    for block in request.hash_ids:
        if block not in blocks:
            blocks[block] = array("i", random.Random(f"block {seed} {block}").choices(ids, k=block_tokens))
        prompt += blocks[block]
    return prompt[: request.input_length]


def _input_length(request: TracedRequest, tokenizer: ChatTokenizer) -> int:
    if request.text_input is not None:
        return len(tokenizer.encode(request.text_input))
    return len(request.input_ids) if request.input_ids is not None else request.input_length or 0
