"""Greedy continuations of fixed prompts by one engine.

Prompts are token ids, the same on every engine with this vocabulary: random text tokens at lengths that cross every
window (a prompt shorter than the smallest window would never test one), or texts of a problem set through the engine's
own tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from puzzle_trtllm.engine import Engine
from puzzle_trtllm.errors import BenchError, ConfigError
from puzzle_trtllm.folders import write_atomically
from puzzle_trtllm.plain_file import read_text
from puzzle_trtllm.serve.runtimes import create_llm, load_runtime
from puzzle_trtllm.serve.runtimes.ending import ending_at_every_end
from puzzle_trtllm.text_tokens import random_text_ids

PROMPTS_PER_LENGTH = 4


class Continuation(BaseModel):
    """What one engine made of one prompt."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt_tokens: int
    token_ids: list[int] = Field(min_length=1)
    """Greedy, up to max_tokens, the end-of-sequence token ignored."""
    first_logprob: float | None = Field(allow_inf_nan=False)
    """Log-probability of token_ids[0]; None where the runtime gives none."""


class Recording(BaseModel):
    """One engine's continuations."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    engine: str
    runtime: str
    kv_dtype: str
    kv_fold: str
    max_tokens: int
    prompts_fingerprint: str
    continuations: list[Continuation] = Field(min_length=1)

    def save(self, file: str | Path) -> None:
        """Write the recording as JSON, whole or not at all. Raises PuzzleError when it cannot be written."""
        write_atomically(Path(file), self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, file: str | Path) -> Recording:
        """Read a recording. Raises ConfigError in one line."""
        text = read_text(Path(file), ConfigError)
        try:
            return cls.model_validate_json(text, strict=True)
        except ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(str(part) for part in problem["loc"]) or None
            raise ConfigError(f"not a recording: {problem['msg']}", file=file, key=key) from None


def synthetic_prompts(windows: Sequence[int | None], *, vocab_size: int, max_prompt_tokens: int) -> list[list[int]]:
    """Random prompts at 16 tokens, and for each window somewhat above it, as far as `max_prompt_tokens` allows."""
    lengths = sorted({16, *(window + window // 4 + 1 for window in windows if window is not None)})
    fitting = [length for length in lengths if length <= max_prompt_tokens] or [max_prompt_tokens]
    source = random.Random(0)
    all_lengths = [length for length in fitting for _ in range(PROMPTS_PER_LENGTH)]
    return [random_text_ids(length, vocab_size=vocab_size, source=source) for length in all_lengths]


def record(engine_folder: str | Path, *, texts: Sequence[str] | None = None, max_tokens: int = 32) -> Recording:
    """Start the engine, continue every prompt greedily, stop it.

    Args:
        engine_folder: made by `build`, for any runtime that is installed here.
        texts: prompts as text; synthetic token ids when None.
        max_tokens: tokens to generate for each prompt.

    Raises BenchError when there is no prompt, when the engine's sequences are too short, and for an answer without a
    token or with a log-probability that is no number; EngineError when the engine cannot start.
    """
    if texts is not None and not texts:
        raise BenchError("no prompt to continue", file=engine_folder)
    engine = Engine.open(engine_folder)
    room = (engine.max_seq_len or engine.architecture.max_position_embeddings) - max_tokens
    if room < 1:
        raise BenchError(
            "leaves no room for a prompt", key="max_tokens", found=max_tokens, expected=f"below {room + max_tokens}"
        )
    a = engine.architecture
    llm = create_llm(engine)
    try:
        prompts: list[list[int]]
        if texts is None:
            prompts = synthetic_prompts(a.windows, vocab_size=a.vocab_size, max_prompt_tokens=room)
        else:
            prompts = [list(llm.tokenizer.encode(text))[:room] for text in texts]
        # Though the end is ignored: TensorRT-LLM wants to be told of one where no tokenizer names it.
        runtime = load_runtime(engine.manifest.runtime)
        sampling_params = ending_at_every_end(runtime.SamplingParams, engine.model_path)
        continuations = [_continue(llm, sampling_params, prompt, max_tokens) for prompt in prompts]
    finally:
        llm.shutdown()
    return Recording(
        engine=engine.path.name,
        runtime=engine.manifest.runtime,
        kv_dtype=engine.manifest.kv_dtype,
        kv_fold=engine.manifest.kv_fold.mode,
        max_tokens=max_tokens,
        prompts_fingerprint=hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        continuations=continuations,
    )


def _continue(llm: Any, sampling_params: Any, prompt: list[int], max_tokens: int) -> Continuation:
    # One after the other: in a batch other kernels run, and texts would depend on their neighbours.
    first = llm.generate(prompt, sampling_params(max_tokens=1, ignore_eos=True, logprobs=1)).outputs[0]
    whole = llm.generate(prompt, sampling_params(max_tokens=max_tokens, ignore_eos=True)).outputs[0]
    logprob = first.cumulative_logprob
    if not whole.token_ids:
        raise BenchError("the engine gave no token", key=f"prompt of {len(prompt)} tokens")
    if logprob is not None and not math.isfinite(logprob):
        raise BenchError("no finite number", key=f"log-probability after {len(prompt)} tokens", found=logprob)
    return Continuation(prompt_tokens=len(prompt), token_ids=list(whole.token_ids), first_logprob=logprob)
