"""The model families that this project can take, one entry each: the only place that knows their names.

A family is a `model_type` of config.json. Stages ask `family_of` and read the entry; they never compare names. Another
Puzzle family (Nemotron-NAS, NemotronH-Puzzle) is one more entry here, its own reading of per-layer blocks in
architecture.py, and a model under models/.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puzzle_trtllm.errors import ArchitectureError


@dataclass(frozen=True, kw_only=True)
class Family:
    """What the stages need to know of a family by name."""

    model_type: str
    """Of a checkpoint's config.json."""
    causal_lm: str
    """Its class in `architectures`, in transformers and in TensorRT-LLM."""
    serving_model_type: str
    """Of a serving copy's config.json: one that TensorRT-LLM's workers can load without remote code."""
    trtllm_model: str | None
    """Module that registers `causal_lm` with TensorRT-LLM when it is imported; None where upstream has the class."""


GPT_OSS = Family(model_type="gpt_oss", causal_lm="GptOssForCausalLM", serving_model_type="gpt_oss", trtllm_model=None)
GPT_OSS_PUZZLE = Family(
    model_type="gpt_oss_puzzle",
    causal_lm="GptOssPuzzleForCausalLM",
    serving_model_type="gpt_oss",
    trtllm_model="puzzle_trtllm.models.trtllm.modeling",
)
FAMILIES: Mapping[str, Family] = {family.model_type: family for family in (GPT_OSS, GPT_OSS_PUZZLE)}


def family_of(config: Mapping[str, Any], source: str | Path) -> Family:
    """The family of a config.json; per-layer blocks win over its model_type. Raises ArchitectureError for another."""
    if "block_configs" in config:
        return GPT_OSS_PUZZLE
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        expected = " or ".join(FAMILIES)
        raise ArchitectureError(
            "not a gpt-oss model", file=source, key="model_type", found=model_type, expected=expected
        )
    return FAMILIES[model_type]
