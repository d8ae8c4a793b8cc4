"""What ends a generation: the end-of-sequence tokens of a serving copy, of which gpt-oss has three.

TensorRT-LLM as of 1.2's candidates ends a generation at one token, the tokenizer's own: at gpt-oss's `<|return|>` and
not at the `<|call|>` of a tool call, after which the model goes on up to max_tokens. (Later lines read
generation_config.json too; NVIDIA's trtllm-serve names the tokens itself.) And all lines refuse every request where
there is no tokenizer to ask for that one token.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from puzzle_trtllm.errors import EngineError
from puzzle_trtllm.json_files import read_json_object


def read_end_ids(model: Path) -> list[int]:
    """End-of-sequence ids of a serving copy: generation_config.json's, if it has them, else config.json's."""
    config: dict[str, Any] = {}
    for file in (model / "config.json", model / "generation_config.json"):
        if file.is_file():
            config |= read_json_object(file, EngineError)
    end = config.get("eos_token_id")
    return end if isinstance(end, list) else [] if end is None else [end]


def ending_at_every_end(sampling_params: Callable[..., Any], model: Path) -> Callable[..., Any]:
    """TensorRT-LLM's SamplingParams, of requests that end at any of the end-of-sequence ids of `model`.

    They go in as stop tokens, for which its sampler has a quick way where each word is one token. The one that ended
    the generation is taken off the output. A request with `min_tokens` goes without, because TensorRT-LLM keeps only
    the tokenizer's token from ending it too early.
    """
    end_ids = read_end_ids(model)
    if not end_ids:
        return sampling_params
    always = {} if (model / "tokenizer.json").is_file() else {"end_id": end_ids[0]}

    def make(**arguments: Any) -> Any:
        goes_on = arguments.get("ignore_eos") or arguments.get("min_tokens", 0) > 1
        stops = {} if goes_on else {"stop_token_ids": list(end_ids)}
        return sampling_params(**always, **stops, **arguments)

    return make
