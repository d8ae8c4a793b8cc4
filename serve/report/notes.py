"""What a reader must know before believing a report: sentences, generated from the measurements.

They fail nothing; they stand on the page and in report.json. No note means that none of these things happened.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from puzzle_trtllm.serve.bench.result import BUSY_CLIENT
from puzzle_trtllm.serve.metrics.provenance import differing_versions
from puzzle_trtllm.serve.metrics.units import show_number
from puzzle_trtllm.serve.report.compare import paired_range
from puzzle_trtllm.serve.report.measurement import EngineMeasurement

LENGTH_FACTOR = 2
"""Answers that differ by more from what the scenario asked for are another load than the one that was measured."""


def notes_on(engines: Sequence[EngineMeasurement], *, baselines: Sequence[str], child: str) -> list[str]:
    """All notes on a comparison of `child` with `baselines`."""
    by_name = {engine.name: engine for engine in engines}
    notes = [note for engine in engines for note in _on_engine(engine)]
    notes.extend(_on_lengths(by_name[child]))
    for name in baselines:
        notes.extend(_on_pair(by_name[child], by_name[name]))
    return notes


def _on_engine(engine: EngineMeasurement) -> Iterator[str]:
    if engine.requests.completed != engine.requests.total:
        yield f"{engine.name}: the load ended with {engine.requests}."
    if len(engine.output_tokens_per_s.rounds) == 1:
        yield f"{engine.name}: throughput was measured in a single round, and no interval says how far another may lie."
    cpu = engine.busiest_client_cpu
    if cpu is not None and cpu > BUSY_CLIENT:
        yield (
            f"{engine.name}: a process of the client used {cpu:.0%} of a core, so the client's own speed may be in the "
            "throughput (bench --workers)."
        )
    if engine.lengths != "exact":
        yield f"{engine.name}: the server takes no token ids, so prompt and answer lengths are nominal."
    if engine.token_counts != "server":
        yield f"{engine.name}: the server tells no token counts, so its text was encoded again to count them."
    if engine.repeats_prompts:
        yield (
            f"{engine.name}: rounds had the same prompts (bench --seed), and the engine reuses prefixes: unless its "
            "server was started anew, its cache answered part of them."
        )
    if engine.mixed_rounds:
        yield f"{engine.name}: its rounds were measured on or with several: {'; '.join(engine.mixed_rounds)}."
    if engine.kv_dtype == "fp8" and engine.kv_fold == "none":
        yield f"{engine.name}: FP8 KV cache with unit scales; no calibrated scale was folded into the weights."
    for effort, result in engine.efforts.items():
        if result.requests.failed or result.requests.cancelled:
            yield f"{engine.name}, {effort} effort: {result.requests}; accuracy is over answered problems."
        if result.requests.truncated:
            cut, answered = result.requests.truncated, result.requests.answered
            yield (
                f"{engine.name}, {effort} effort: {cut} of {answered} answers ran out of tokens. Their mean length "
                "counts them as they were cut, so requests per second are too high."
            )


def _on_lengths(child: EngineMeasurement) -> Iterator[str]:
    """Headlines are about the last effort."""
    for effort in list(child.efforts)[-1:]:
        asked, answered = child.scenario.output_tokens, child.efforts[effort].mean_output_tokens
        if max(asked, answered) > LENGTH_FACTOR * min(asked, answered):
            yield (
                f"{child.name}: throughput was measured with answers of {asked:,} tokens, and at {effort} effort they "
                f"have {show_number(answered)}: requests per second are throughput / length, no rate that was served."
            )


def _on_pair(child: EngineMeasurement, baseline: EngineMeasurement) -> Iterator[str]:
    if found := _unresolved(child, baseline):
        yield f"{child.name} and {baseline.name}: {found}, so their difference in throughput is not resolved."
    if child.memory_bytes != baseline.memory_bytes:
        yield f"{child.name} and {baseline.name} were given different memory."
    ours, theirs = child.total_ranks, baseline.total_ranks
    if ours != theirs:
        yield (
            f"{child.name} and {baseline.name} ran on different numbers of GPUs or ranks: {ours} and {theirs}. "
            "Ratios of tokens and requests per second are those of all together, unless they say otherwise."
        )
    if str(child.provenance.hardware) != str(baseline.provenance.hardware):
        yield f"{child.name} and {baseline.name} were measured on different machines."
    if versions := differing_versions([child.provenance, baseline.provenance]):
        yield f"{child.name} and {baseline.name} were measured with different versions: {'; '.join(versions)}."


def _unresolved(child: EngineMeasurement, baseline: EngineMeasurement) -> str | None:
    """Why the rounds do not say which of the two is faster; those measured in turn are compared pair by pair."""
    ours, theirs = child.output_tokens_per_s, baseline.output_tokens_per_s
    if (paired := paired_range(child, baseline)) is not None:
        return "not every round had the same one ahead" if paired[0] <= 1 <= paired[1] else None
    return "the ranges of their rounds overlap" if ours.low <= theirs.high and theirs.low <= ours.high else None
