"""From steps to tokens a second: continuous batching at a constant number of sequences.

With B sequences in flight a replica spends, for every finished request, its prompt's time P and its share
osl x D(B) / B of the decode steps; prompts and decoding take turns on the same GPU. So

    output tok/s = osl / (P x (1 - overlap) + osl x D(B) / B)        times `efficiency`

D(B) is taken at the mean length, because sequences in flight are at all stages (isl ... isl + osl, evenly).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from puzzle_trtllm.build.planner.roofline import Seconds, Setup, Step, step_seconds

KNEE = 0.9
"""The knee is the smallest batch that reaches this share of the best rate."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """Prompt and generated tokens of every request."""

    isl: int
    osl: int

    @property
    def sequence_tokens(self) -> int:
        return self.isl + self.osl


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One replica at one number of sequences in flight, at the data sheet's peaks unless it says expected."""

    batch: int
    decode_step_s: float
    prefill_s_per_request: float
    prefill_bound: str
    """The resource that takes most of a prompt's time."""
    roofline_tokens_per_s: float
    """Output tokens of the replica."""
    expected_tokens_per_s: float
    """The same times `efficiency`."""
    seconds_per_request: dict[str, float]
    """Where a request's share of the replica's time goes, by resource; prompt time is one entry of its own."""

    @property
    def bound(self) -> str:
        """The resource that takes most of the time."""
        return max(self.seconds_per_request, key=lambda name: self.seconds_per_request[name])


def estimate(setup: Setup, load: Load, batch: int, *, prompt: Seconds | None = None) -> Estimate:
    """One replica with `batch` sequences in flight; `prompt` saves computing `prefill_seconds` again."""
    decode = _decode(setup, load, batch)
    prompt = prefill_seconds(setup, load) if prompt is None else prompt
    prefill = sum(prompt.values())
    shares = {name: load.osl * seconds / batch for name, seconds in decode.items()}
    shares["prompts"] = prefill * (1 - setup.assumptions.prefill_overlap)
    rate = load.osl / sum(shares.values())
    return Estimate(
        batch=batch,
        decode_step_s=sum(decode.values()),
        prefill_s_per_request=prefill,
        prefill_bound=max(prompt, key=lambda name: prompt[name]),
        roofline_tokens_per_s=rate,
        expected_tokens_per_s=rate * setup.assumptions.efficiency,
        seconds_per_request=shares,
    )


def prefill_seconds(setup: Setup, load: Load) -> Seconds:
    """Seconds of replica time for one prompt: chunks of max_num_tokens on every rank; short prompts share a chunk."""
    ranks = setup.layout.sequence_split
    chunk = setup.assumptions.max_num_tokens
    step = Step(
        tokens=chunk * ranks,
        start=0,
        stop=load.isl,
        sequences=ranks * max(1.0, chunk / load.isl),
        logits=ranks * max(1.0, chunk / load.isl),
    )
    chunks = load.isl / (chunk * ranks)
    return {name: seconds * chunks for name, seconds in step_seconds(setup, step).items()}


def best_batch(setup: Setup, load: Load, most: int) -> tuple[Estimate, Estimate]:
    """(best, knee): the fastest of 1, 2, 4, ... and `most` sequences, and the smallest within 10% of its rate."""
    sizes = sorted({1 << power for power in range(most.bit_length())} | {most})
    prompt = prefill_seconds(setup, load)
    tried = [estimate(setup, load, size, prompt=prompt) for size in sizes]
    best = max(tried, key=lambda e: e.roofline_tokens_per_s)
    knee = next(e for e in tried if e.roofline_tokens_per_s >= KNEE * best.roofline_tokens_per_s)
    return best, knee


def _decode(setup: Setup, load: Load, batch: int) -> Seconds:
    """Of the GPU that holds most sequences: the others wait for it."""
    ranks = setup.layout.sequence_split
    held = ranks * math.ceil(batch / ranks)
    return step_seconds(
        setup, Step(tokens=batch, start=load.isl, stop=load.sequence_tokens, sequences=held, logits=held)
    )
