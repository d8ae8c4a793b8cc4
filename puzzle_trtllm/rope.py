"""Rotary position embedding as gpt-oss configures it: YaRN (arXiv 2309.00071) over half-split pairs.

YaRN divides the low frequencies by `factor`, keeps the high ones and blends in between; attention logits are scaled by
multiplying cos and sin with `attention_scaling` = 0.1 ln(factor) + 1. gpt-oss sets `truncate: false`: the borders of
the blend are not rounded to whole dimensions. Configs in the wild write the block as `rope_scaling` with `rope_theta`
beside it (transformers 4) or as `rope_parameters` with the theta inside (transformers 5), with integer or float
factors; this reads them all. As in transformers, `rope_scaling` wins where both are given, and a config that has
neither key means the released model's YaRN; null is no YaRN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puzzle_trtllm.config_values import boolean, positive_integer, positive_number, section
from puzzle_trtllm.errors import ArchitectureError

_KNOWN_TYPES = ("yarn", "default")
_SPELLINGS = ("rope_scaling", "rope_parameters")
_RELEASED = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 4096,
    "truncate": False,
}
_NOT_COMPUTED = ("attention_factor", "mscale", "mscale_all_dim", "partial_rotary_factor")
"""What transformers also knows, and no runtime here."""
_YARN_KEYS = _RELEASED.keys() - {"rope_type"}
"""Which a block of unknown type must not hold: they would be ignored."""


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary parameters; `rope_type` "default" ignores everything but theta."""

    theta: float
    rope_type: str = "default"
    factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    original_max_position_embeddings: int = 4096
    truncate: bool = True

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, source: str | Path) -> RopeConfig:
        key = next((key for key in _SPELLINGS if config.get(key)), "rope_scaling")
        is_given, prefix = any(key in config for key in _SPELLINGS), f"{key}."
        block = section(config, key, source) if is_given else _RELEASED
        rope_type = _read_type(block, key, source)
        name = "original_max_position_embeddings"
        rope = cls(
            theta=positive_number(block, "rope_theta", source, prefix=prefix)
            if "rope_theta" in block
            else positive_number(config, "rope_theta", source, default=150000.0),
            rope_type=rope_type,
            factor=positive_number(
                block, "factor", source, default=None if rope_type == "yarn" else 1.0, prefix=prefix
            ),
            beta_fast=positive_number(block, "beta_fast", source, default=32.0, prefix=prefix),
            beta_slow=positive_number(block, "beta_slow", source, default=1.0, prefix=prefix),
            original_max_position_embeddings=positive_integer(block, name, source, prefix=prefix)
            if name in block
            else positive_integer(config, "initial_context_length", source, default=4096),
            truncate=boolean(block, "truncate", source, default=True, prefix=prefix),
        )
        if rope.theta <= 1:
            raise ArchitectureError("must be greater than 1", file=source, key="rope_theta", found=rope.theta)
        if rope.factor < 1:
            raise ArchitectureError("must be at least 1", file=source, key=f"{prefix}factor", found=rope.factor)
        if rope.beta_fast < rope.beta_slow:
            expected = f"at least beta_slow, {rope.beta_slow}"
            key = f"{prefix}beta_fast"
            raise ArchitectureError("too small", file=source, key=key, found=rope.beta_fast, expected=expected)
        return rope

    def to_json(self) -> dict[str, Any]:
        """The keys of config.json in the older spelling, which every reader knows."""
        names = _RELEASED if self.rope_type == "yarn" else ("rope_type",)
        return {"rope_scaling": {name: getattr(self, name) for name in names}, "rope_theta": self.theta}

    @property
    def attention_scaling(self) -> float:
        """Factor on cos and sin (YaRN section 3.4)."""
        if self.rope_type != "yarn" or self.factor <= 1.0:
            return 1.0
        return 0.1 * math.log(self.factor) + 1.0

    def inverse_frequencies(self, head_dim: int) -> NDArray[np.float32]:
        """float32 `[head_dim / 2]`: radians that a position adds to each rotary pair (i, i + head_dim / 2).

        Computed with torch's operations in transformers' order (`_compute_yarn_parameters` of its
        modeling_rope_utils.py), because numpy's power differs in the last bit and positions multiply it.
        """
        import torch

        pos_freqs = self.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        extrapolated = 1.0 / pos_freqs
        if self.rope_type != "yarn":
            return extrapolated.numpy()
        low, high = self.correction_range(head_dim)
        span = high - low if high != low else 0.001
        ramp = torch.clamp((torch.arange(head_dim // 2, dtype=torch.float32) - low) / span, 0, 1)
        keep = 1 - ramp
        return (1.0 / (self.factor * pos_freqs) * (1 - keep) + extrapolated * keep).numpy()

    def correction_range(self, head_dim: int) -> tuple[float, float]:
        """YaRN's blend: pairs up to the first index keep their frequency, pairs from the second on are interpolated."""
        low, high = self._dimension(self.beta_fast, head_dim), self._dimension(self.beta_slow, head_dim)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        return max(low, 0), min(high, head_dim - 1)

    def _dimension(self, rotations: float, head_dim: int) -> float:
        """The (fractional) pair index that turns `rotations` times over the original context."""
        turns = self.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(self.theta))


def _read_type(block: Mapping[str, Any], key: str, source: str | Path) -> str:
    """The kind of a rotary block in which nothing would be ignored."""
    for name in _NOT_COMPUTED:
        if block.get(name) is not None:
            raise ArchitectureError(
                "is not supported", file=source, key=f"{key}.{name}", found=block[name], expected="no such key"
            )
    rope_type: str = block.get("rope_type", block.get("type", "default"))
    known = " or ".join(_KNOWN_TYPES)
    if rope_type not in _KNOWN_TYPES:
        raise ArchitectureError("unknown kind", file=source, key=f"{key}.rope_type", found=rope_type, expected=known)
    if not {"rope_type", "type"} & block.keys() and _YARN_KEYS & block.keys():
        raise ArchitectureError("missing key", file=source, key=f"{key}.rope_type", expected=known)
    return rope_type
