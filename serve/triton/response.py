"""From the LLM API's outputs to output tensors.

A runtime updates one output object in place at every step, in the event loop's thread, while responses are built and
sent in another. So each step is first frozen into a `Snapshot`: references to immutable text and the count of tokens
that belongs to it, nothing copied. `render` turns a snapshot and what was sent before into tensors.

Two forms. Plain, as NVIDIA's: every response repeats everything so far and every field that was asked for. Delta: only
what is new; fields about the end come with the end. A delta cannot take back text, and runtimes cut a stop string off
only when they have seen all of it: so the end of the text is held back while it could be the beginning of one.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from puzzle_trtllm.serve.triton.request import ReplyFormat

Tensor = tuple[str, npt.NDArray[Any]]


class Snapshot(NamedTuple):
    """One step of one request."""

    text: str
    token_ids: list[int]
    """May grow after the snapshot: only the first `num_tokens` belong to it."""
    num_tokens: int
    finished: bool
    finish_reason: str | None
    stop_reason: int | str | None
    cumulative_logprob: float | None
    perf: list[Tensor]


class Sent(NamedTuple):
    """How much of a request's output has left."""

    text_length: int = 0
    num_tokens: int = 0


def take_snapshot(output: Any, stops: tuple[str, ...] = ()) -> Snapshot:
    """Freeze a RequestOutput as it is now; call it where the runtime updates it."""
    completion = output.outputs[0]
    finished = bool(output.finished)
    return Snapshot(
        hold_back(completion.text, stops) if stops and not finished else completion.text,
        completion.token_ids,
        len(completion.token_ids),
        finished,
        completion.finish_reason,
        completion.stop_reason,
        completion.cumulative_logprob,
        perf_tensors(output) if finished else [],
    )


def hold_back(text: str, stops: tuple[str, ...]) -> str:
    """`text` without the longest end that is the beginning of a stop string."""
    held = max((_length_begun(text, stop) for stop in stops), default=0)
    return text[: len(text) - held]


def _length_begun(text: str, stop: str) -> int:
    """How much of `stop`, short of all, the end of `text` is. Finding its first character skips most places."""
    start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while start >= 0 and not stop.startswith(text[start:]):
        start = text.find(stop[0], start + 1)
    return len(text) - start if start >= 0 else 0


def render(reply: ReplyFormat, now: Snapshot, sent: Sent) -> list[Tensor]:
    """The tensors of one response."""
    text_from, tokens_from = (sent.text_length, sent.num_tokens) if reply.delta else (0, 0)
    tensors: list[Tensor] = [("text_output", _strings(now.text[text_from:]))]
    if reply.output_ids:
        tensors.append(("output_ids", np.array(now.token_ids[tokens_from : now.num_tokens], dtype=np.int32)))
    if now.finished or not reply.delta:
        tensors += _details(reply, now)
    return tensors


def _details(reply: ReplyFormat, now: Snapshot) -> list[Tensor]:
    tensors: list[Tensor] = []
    if reply.output_ids:
        tensors.append(("num_output_tokens", np.array([now.num_tokens], dtype=np.int32)))
    if reply.finish_reason:
        tensors.append(("finish_reason", _strings(str(now.finish_reason))))
    if reply.stop_reason:
        tensors.append(("stop_reason", _strings(str(now.stop_reason))))
    if reply.cumulative_logprob:
        logprob = float("nan") if now.cumulative_logprob is None else now.cumulative_logprob
        tensors.append(("cumulative_logprob", np.array([logprob], dtype=np.float32)))
    return tensors + now.perf


def _strings(text: str) -> npt.NDArray[Any]:
    return np.array([text.encode("utf-8", errors="replace")], dtype=np.object_)


def perf_tensors(output: Any) -> list[Tensor]:
    """The perf metrics of a finished request, when the client asked for them and the runtime gave them.

    Ours are flat and in nanoseconds (RequestPerfMetrics); TensorRT-LLM's sit on the completion, in three groups, with
    times as durations.
    """
    flat = getattr(output, "metrics", None)
    nested = getattr(output.outputs[0], "request_perf_metrics", None)
    if nested is not None:
        return _perf(nested.kv_cache_metrics, nested.timing_metrics, "", nested.speculative_decoding)
    if flat is not None and hasattr(flat, "arrival_time_ns"):
        return _perf(flat, flat, "_ns", None)
    return []


def _perf(blocks: Any, times: Any, suffix: str, speculation: Any) -> list[Tensor]:
    reused, missed = int(blocks.num_reused_blocks), int(blocks.num_missed_blocks)
    int32 = {
        "kv_cache_reused_block": reused,
        "kv_cache_missed_block": missed,
        "kv_cache_alloc_new_blocks": int(blocks.num_new_allocated_blocks),
        "kv_cache_alloc_total_blocks": int(blocks.num_total_allocated_blocks),
        "total_accepted_draft_tokens": int(getattr(speculation, "total_accepted_draft_tokens", 0)),
        "total_draft_tokens": int(getattr(speculation, "total_draft_tokens", 0)),
    }
    fp32 = {
        "kv_cache_hit_rate": reused / (reused + missed) if reused + missed else 0.0,
        "acceptance_rate": float(getattr(speculation, "acceptance_rate", 0.0)),
    }
    names = ("arrival_time", "first_scheduled_time", "first_token_time", "last_token_time")
    int64 = {f"{name}_ns": _nanoseconds(getattr(times, name + suffix)) for name in names}
    return [
        *((name, np.array([value], dtype=np.int32)) for name, value in int32.items()),
        *((name, np.array([value], dtype=np.float32)) for name, value in fp32.items()),
        *((name, np.array([value], dtype=np.int64)) for name, value in int64.items()),
    ]


def _nanoseconds(value: int | timedelta) -> int:
    if isinstance(value, timedelta):
        return (value.days * 86_400 + value.seconds) * 1_000_000_000 + value.microseconds * 1_000
    return int(value)
