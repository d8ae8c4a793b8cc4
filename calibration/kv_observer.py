"""What flows into ModelOpt's KV quantizers, seen finer than ModelOpt sees it, in the same pass.

ModelOpt keeps one maximum for all of K and one for all of V. Folding a scale per channel needs one per head and
channel, and an engine that quantizes Q as well needs to know Q; both are taken by hooks on the very tensors that the
quantizers get (K and Q after the rotary embedding), so that their maxima are ModelOpt's to the bit.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from puzzle_trtllm.calibration.forward import require_finite

Kind = Literal["q", "k", "v"]
KINDS: tuple[Kind, ...] = ("q", "k", "v")


class KvObserver:
    """Hooks on the q, k and v quantizers of every attention layer of a model that ModelOpt has prepared."""

    def __init__(self, model: Any, *, first_layer: int = 0) -> None:
        self._amax: dict[tuple[int, Kind], torch.Tensor] = {}
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

    def _hook(self, layer: int, kind: Kind) -> Any:
        key = (layer, kind)

        def hook(quantizer: Any, arguments: Any) -> None:
            amax_HD = arguments[0].detach().abs().amax(dim=(0, 2)).float().cpu()
            require_finite(amax_HD, f"model.layers.{layer}.self_attn ({kind.upper()})")
            self._amax[key] = torch.maximum(self._amax[key], amax_HD) if key in self._amax else amax_HD

        return hook
