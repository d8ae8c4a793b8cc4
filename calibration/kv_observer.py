"""What flows into ModelOpt's KV quantizers, seen finer than ModelOpt sees it, in the same pass.

ModelOpt keeps one maximum for all of K and one for all of V. Folding a scale per channel needs one per head and
channel, and an engine that quantizes Q as well needs to know Q; both are taken by hooks on the very tensors that the
quantizers get (K and Q after the rotary embedding), so that their maxima are ModelOpt's to the bit. A strided sample of
the tokens is kept to measure what FP8 does to them.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from puzzle_trtllm.calibration.forward import require_finite

Kind = Literal["q", "k", "v"]
KINDS: tuple[Kind, ...] = ("q", "k", "v")
SAMPLE_TOKENS = 1024
"""Tokens a layer kept to measure quality: 1024 x 512 values x K and V is 4 MiB a layer at 120B."""


class KvObserver:
    """Hooks on the q, k and v quantizers of every attention layer of a model that ModelOpt has prepared."""

    def __init__(self, model: Any, num_tokens: int, *, first_layer: int = 0) -> None:
        self._amax: dict[tuple[int, Kind], torch.Tensor] = {}
        self._samples: dict[tuple[int, Kind], list[torch.Tensor]] = {}
        self._stride = max(1, -(-num_tokens // SAMPLE_TOKENS))
        self._handles = [
            getattr(layer.self_attn, f"{kind}_bmm_quantizer").register_forward_pre_hook(self._hook(i, kind))
            for i, layer in enumerate(model.model.layers, first_layer)
            for kind in KINDS
        ]

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def amax(self, layer: int, kind: Kind) -> torch.Tensor:
        """float32 `[heads, head_dim]`: the largest magnitude seen."""
        return self._amax[layer, kind]

    def sample(self, layer: int, kind: Kind) -> torch.Tensor:
        """float32 `[tokens, heads * head_dim]` of K or V."""
        return torch.cat(self._samples[layer, kind])

    def _hook(self, layer: int, kind: Kind) -> Any:
        key = (layer, kind)

        def hook(quantizer: Any, arguments: Any) -> None:
            values_BHTD = arguments[0].detach()
            amax_HD = values_BHTD.abs().amax(dim=(0, 2)).float().cpu()
            require_finite(amax_HD, f"model.layers.{layer}.self_attn ({kind.upper()})")
            self._amax[key] = torch.maximum(self._amax[key], amax_HD) if key in self._amax else amax_HD
            if kind != "q":
                rows = values_BHTD.transpose(1, 2).flatten(0, 1).flatten(1)[:: self._stride]
                self._samples.setdefault(key, []).append(rows.float().cpu())

        return hook
