"""A trace: what users once asked of a server and when, as JSONL, one request a line, to be replayed.

    {"timestamp": 27482, "input_length": 1200, "output_length": 52, "hash_ids": [46, 47, 48]}

This is the form of the public Mooncake traces. Keys:

    timestamp       when the request arrived, from any zero; in every line or in none, never falling back
    output_length   tokens to generate
    input_length    tokens of the prompt, which is then made up of random ones
    hash_ids        with input_length, optional: one id for each `block_tokens` of the prompt, the last block may be
                    partly filled. Blocks of equal id get equal tokens, so a prefix cache finds what it found then.
    input_ids       the prompt's token ids, instead of input_length
    text_input      the prompt's text, instead of input_length

Other keys (session ids, kinds of requests) are ignored, and the result names them. Traces differ in two things that no
line says: the unit of timestamps (Mooncake ms, others s) and the tokens of a block (Mooncake 512, others 16).
"""

from __future__ import annotations

import hashlib
import io
import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from puzzle_trtllm.errors import ConfigError
from puzzle_trtllm.json_files import unique_keys
from puzzle_trtllm.plain_file import read_bytes
from puzzle_trtllm.scenario import Count
from puzzle_trtllm.yaml_files import first_problem

MOONCAKE_BLOCK_TOKENS = 512
TimeUnit = Literal["ms", "s"]
_PROMPT_KEYS = ("input_length", "input_ids", "text_input")


MAX_TIMESTAMP = 1e20
"""More than the ns since 1970; what is far beyond is no number any more once it is converted."""


class _Line(BaseModel):
    """One line as it is written."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    timestamp: float | None = Field(default=None, ge=0, le=MAX_TIMESTAMP, allow_inf_nan=False)
    output_length: Count
    input_length: Count | None = None
    hash_ids: list[int] | None = None
    input_ids: list[int] | None = Field(default=None, min_length=1)
    text_input: str | None = Field(default=None, min_length=1)


@dataclass(frozen=True, kw_only=True)
class TracedRequest:
    """One request; exactly one of input_length, input_ids and text_input is set."""

    time_ns: int | None
    """Arrival, ns after the first one of the trace; None in a trace without timestamps."""
    output_length: int
    input_length: int | None = None
    hash_ids: tuple[int, ...] = ()
    input_ids: array[int] | None = None
    text_input: str | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """The requests of a file, or its first ones, by arrival."""

    file: Path
    sha256: str
    """Of the whole file."""
    requests: tuple[TracedRequest, ...]
    block_tokens: int
    ignored_keys: tuple[str, ...]

    @property
    def has_times(self) -> bool:
        return self.requests[0].time_ns is not None


def read_trace(
    path: str | Path,
    *,
    time_unit: TimeUnit = "ms",
    block_tokens: int = MOONCAKE_BLOCK_TOKENS,
    max_requests: int | None = None,
    max_seconds: float | None = None,
) -> Trace:
    """Read a trace, or its first `max_requests` requests, or those of its first `max_seconds` of recorded time.

    Raises ConfigError naming file, line and key for the first line that is wrong, or a file without requests.
    """
    file = Path(path)
    requests: list[TracedRequest] = []
    ignored: set[str] = set()
    ns_per_unit = {"ms": 1_000_000, "s": 1_000_000_000}[time_unit]
    first_ns = 0
    # Once: a pipe, as a shell's <(zcat trace.gz) is one, has nothing left for a second time.
    content = read_bytes(file, ConfigError, named_pipes=True)
    for place, text in _lines(content, file):
        line = _parse(text, place, ignored)
        time_ns = None if line.timestamp is None else round(line.timestamp * ns_per_unit)
        if time_ns is not None:
            first_ns = first_ns if requests else time_ns
            time_ns -= first_ns
        _check_order(requests, time_ns, place)
        if max_seconds is not None and time_ns is None:
            raise ConfigError("missing, so no span of time can be taken", file=place, key="timestamp")
        if max_seconds is not None and time_ns is not None and time_ns > max_seconds * 1e9:
            break
        requests.append(_request(line, time_ns, place, block_tokens))
        if len(requests) == max_requests:
            break
    if not requests:
        raise ConfigError("holds no request", file=file)
    return Trace(
        file=file,
        sha256=hashlib.sha256(content).hexdigest(),
        requests=tuple(requests),
        block_tokens=block_tokens,
        ignored_keys=tuple(sorted(ignored)),
    )


def _lines(content: bytes, file: Path) -> Iterator[tuple[str, str]]:
    """(file:number, text) of every line that is not blank."""
    try:
        for number, line in enumerate(io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig"), 1):
            if line.strip():
                yield f"{file}:{number}", line
    except UnicodeDecodeError:
        raise ConfigError("not UTF-8 text", file=file) from None


def _parse(text: str, place: str, ignored: set[str]) -> _Line:
    try:
        value: Any = json.loads(text, object_pairs_hook=unique_keys)
        line = _Line.model_validate(value)
    except json.JSONDecodeError as error:
        raise ConfigError(f"not JSON: {error.msg}", file=place) from None
    except ValidationError as error:
        raise first_problem(error, place, ConfigError) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or nesting as deep
        raise ConfigError(f"not readable: {error}", file=place) from None
    ignored.update(set(value) - set(_Line.model_fields))
    prompts = [key for key in _PROMPT_KEYS if getattr(line, key) is not None]
    if len(prompts) != 1:
        found = " and ".join(prompts) or "none"
        raise ConfigError("a request needs one prompt", file=place, found=found, expected=", ".join(_PROMPT_KEYS))
    return line


def _check_order(requests: list[TracedRequest], time_ns: int | None, place: str) -> None:
    if not requests:
        return
    before_ns = requests[-1].time_ns
    if (before_ns is None) != (time_ns is None):
        raise ConfigError("must stand in every line or in none", file=place, key="timestamp")
    if before_ns is not None and time_ns is not None and time_ns < before_ns:
        raise ConfigError("falls back behind the line before: sort the trace", file=place, key="timestamp")


def _request(line: _Line, time_ns: int | None, place: str, block_tokens: int) -> TracedRequest:
    blocks = line.hash_ids or []
    if blocks:
        if line.input_length is None:
            raise ConfigError("belongs to input_length", file=place, key="hash_ids")
        needed = -(-line.input_length // block_tokens)
        if len(blocks) != needed:
            raise ConfigError(
                f"do not fit blocks of {block_tokens} tokens",
                file=place,
                key="hash_ids",
                found=f"{len(blocks)} ids for input_length {line.input_length}",
                expected=f"{needed}, or another --trace-block-tokens",
            )
    try:
        input_ids = None if line.input_ids is None else array("i", line.input_ids)
    except OverflowError:
        raise ConfigError("not 32-bit integers", file=place, key="input_ids") from None
    if input_ids is not None and min(input_ids) < 0:
        raise ConfigError("no token id", file=place, key="input_ids", found=min(input_ids), expected="0 or more")
    return TracedRequest(
        time_ns=time_ns,
        output_length=line.output_length,
        input_length=line.input_length,
        hash_ids=tuple(blocks),
        input_ids=input_ids,
        text_input=line.text_input,
    )
