"""The files that ride along with a model's weights: tokenizer, chat template, generation config, licences.

A list of what is taken rather than of what is not: a parent's README, its index or its problem sets would describe the
wrong model beside a child.
"""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

from puzzle_trtllm.checkpoint import Checkpoint

GENERATION_CONFIG = "generation_config.json"
_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.tiktoken",
    "*.jinja",
    GENERATION_CONFIG,
    "LICENSE*",
    "NOTICE*",
    "USAGE_POLICY*",
)


def companions(checkpoint: Checkpoint) -> list[Path]:
    """Files of the checkpoint's folder that belong beside any model made from it, sorted by name."""
    return [file for file in checkpoint.companion_files() if any(fnmatch(file.name, pattern) for pattern in _PATTERNS)]
