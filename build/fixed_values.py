"""What TensorRT-LLM's gpt-oss does not read from config.json, but has built in. A model that says otherwise would load,
or fail deep inside a worker, and compute something else.
"""

from __future__ import annotations

from puzzle_trtllm.architecture import PuzzleArchitecture
from puzzle_trtllm.errors import ConfigError


def check_fixed_values(a: PuzzleArchitecture, *, file: str) -> None:
    """Raise ConfigError for a model that TensorRT-LLM's gpt-oss would run with other values than its own.

    `file` is the engine config that asks for TensorRT-LLM.
    """
    fixed: tuple[tuple[str, object, object], ...] = (
        ("swiglu_limit", a.swiglu_limit, 7.0),
        ("attention_bias", a.attention_bias, True),
        ("rope_scaling.rope_type", a.rope.rope_type, "yarn"),
    )
    for key, found, built_in in fixed:
        if found != built_in:
            expected = f"{built_in}, or runtime: reference"
            place = f"runtime: the model's {key}"
            raise ConfigError(
                "is built into TensorRT-LLM's gpt-oss", file=file, key=place, found=found, expected=expected
            )
