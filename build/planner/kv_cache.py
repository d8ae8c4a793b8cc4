"""The KV cache of one GPU as allocators see it: layers by window, and bytes of one token in one layer.

`mean_keys` is the other half: how many keys a token at a position reads, min(position + 1, window), averaged over a
stretch of positions in closed form. Decoding reads them from memory at every step, prompts multiply with them.
"""

from __future__ import annotations

from dataclasses import dataclass

from puzzle_trtllm.architecture import KvDtype, PuzzleArchitecture
from puzzle_trtllm.build.planner.layout import Layout


@dataclass(frozen=True, kw_only=True)
class KvGeometry:
    """What one GPU keeps of a sequence."""

    layers_by_window: tuple[tuple[int | None, int], ...]
    """(window, layers that have it), ascending, full attention (None) last."""
    bytes_per_token_and_layer: int

    @classmethod
    def of(cls, architecture: PuzzleArchitecture, kv_dtype: KvDtype, layout: Layout) -> KvGeometry:
        """The share of one GPU under `layout`."""
        windows = [block.sliding_window for block in architecture.blocks]
        whole = architecture.kv_bytes_per_token_and_layer(kv_dtype)
        return cls(
            layers_by_window=tuple((window, windows.count(window)) for window in architecture.windows),
            bytes_per_token_and_layer=whole * layout.kv_heads_per_gpu(architecture) // architecture.num_key_value_heads,
        )

    def clamped(self, num_tokens: int) -> tuple[tuple[int, int], ...]:
        """(tokens kept, layers) at a sequence length; windows that it does not fill fall together with full layers."""
        merged: dict[int, int] = {}
        for window, layers in self.layers_by_window:
            kept = num_tokens if window is None else min(window, num_tokens)
            merged[kept] = merged.get(kept, 0) + layers
        return tuple(merged.items())

    def bytes_per_sequence(self, num_tokens: int) -> int:
        """Bytes of a sequence on this GPU, without block rounding."""
        return sum(kept * layers for kept, layers in self.clamped(num_tokens)) * self.bytes_per_token_and_layer


def mean_keys(start: int, stop: int, window: int | None) -> float:
    """Mean over positions start <= p < stop of min(p + 1, window): keys that a token reads, its own included."""
    if stop <= start:
        return 0.0
    limit = stop if window is None else min(max(window, start), stop)  # first position that sees a full window
    growing = (start + 1 + limit) * (limit - start) / 2
    return (growing + (stop - limit) * (window or 0)) / (stop - start)
