"""What an FP8 KV cache does to a model, measured on text that calibration did not see.

The same text runs once for every way to store K and V. Attention reads them as a cache of that kind gives them back, in
every layer, from the first token on:

    bf16         rounded to BF16: what the others are compared with
    unit         E4M3 at scale 1: no calibration
    calibrated   E4M3 at the scales that calibration writes, one for K and one for V a layer
    channel      E4M3 at the powers of two that `build --fold channel` folds, one a rotary pair of K and a channel of V

Per layer: how much of K and V is cut off or becomes zero, and the signal to noise ratio, all taken in the bf16 run, so
that one layer's damage is not another's. End to end: the divergence of the next-token distribution from the bf16 run's
(Kullback-Leibler, nats a token) and how often both name the same most likely token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from puzzle_trtllm.calibration.kv_scales import storage_sums, through_e4m3
from puzzle_trtllm.kv_scales import channel_exponents, k_channel_exponents

Store = Literal["bf16", "unit", "calibrated", "channel"]
REFERENCE: Store = "bf16"
FP8_STORES: tuple[Store, ...] = ("unit", "calibrated", "channel")
STORES: tuple[Store, ...] = (REFERENCE, *FP8_STORES)

LOGITS_CHUNK = 64
"""Tokens whose logits are in memory at once, twice: at a vocabulary of 201,088 in float32, 51 MB each."""

KvKind = Literal["k", "v"]
StoreScales = Mapping[tuple[Store, KvKind], torch.Tensor]
"""By FP8 store: what K or V of one layer is divided by, float32, broadcast against `[B, heads, T, head_dim]`."""


def scales_of_layer(
    k_scale: float, v_scale: float, k_amax_KDh: torch.Tensor, v_amax_KDh: torch.Tensor
) -> dict[tuple[Store, KvKind], torch.Tensor]:
    """The scales of all FP8 stores, from those that calibration writes and the maxima per head and channel."""
    scales: dict[tuple[Store, KvKind], torch.Tensor] = {}
    exponents = {
        "k": k_channel_exponents(k_amax_KDh.numpy(), k_scale),
        "v": channel_exponents(v_amax_KDh.numpy(), v_scale),
    }
    tensor_scales: tuple[tuple[KvKind, float], ...] = (("k", k_scale), ("v", v_scale))
    for kind, scale in tensor_scales:
        scales["unit", kind] = torch.tensor(1.0)
        scales["calibrated", kind] = torch.tensor(scale, dtype=torch.float32)
        scales["channel", kind] = torch.from_numpy(np.exp2(exponents[kind]).astype(np.float32))[None, :, None, :]
    return scales


class StoredKv:
    """Makes a model that ModelOpt has prepared attend to K and V as a cache would give them back.

    `choose` says which cache, before each forward pass. While it is bf16, what each FP8 store would do to K and V is
    summed up.
    """

    def __init__(self, model: Any, scales: Sequence[StoreScales]) -> None:
        self._store: Store = REFERENCE
        device = next(model.parameters()).device
        self._scales = [{key: scale.to(device) for key, scale in layer.items()} for layer in scales]
        self._sums: list[dict[KvKind, list[torch.Tensor]]] = [{"k": [], "v": []} for _ in scales]
        for i, layer in enumerate(model.model.layers):
            for kind in self._sums[i]:
                quantizer = getattr(layer.self_attn, f"{kind}_bmm_quantizer")
                quantizer.disable()
                quantizer.register_forward_pre_hook(self._hook(i, kind))

    def choose(self, store: Store) -> None:
        """From here on attention sees K and V as `store` gives them back."""
        self._store = store

    def sums(self, layer: int) -> torch.Tensor:
        """float64 `[micro-batches, K and V, FP8 stores, 5]`, see `storage_sums`."""
        k, v = self._sums[layer]["k"], self._sums[layer]["v"]
        if not k:
            return torch.zeros(0, 2, len(FP8_STORES), 5, dtype=torch.float64)
        return torch.stack([torch.stack(k), torch.stack(v)], dim=1)

    def _hook(self, layer: int, kind: KvKind) -> Any:
        scales = {store: self._scales[layer][store, kind] for store in FP8_STORES}

        def hook(quantizer: Any, arguments: Any) -> Any:
            values_BHTD = arguments[0]
            if self._store != REFERENCE:
                return (through_e4m3(values_BHTD, scales[self._store]),)
            sums = [storage_sums(values_BHTD, scales[store]) for store in FP8_STORES]
            self._sums[layer][kind].append(torch.stack(sums))
            return (values_BHTD.to(torch.bfloat16).to(values_BHTD.dtype),)

        return hook


@torch.no_grad()
def compare_outputs(hidden_BTD: Mapping[Store, torch.Tensor], head_VD: torch.Tensor) -> torch.Tensor:
    """What each FP8 store changes in the logits: float64 `[B, FP8 stores, 3]`, by sequence.

    The three are summed over the sequence: tokens, KL(bf16 || store) in nats, tokens whose most likely successor is the
    same. `hidden_BTD` are final hidden states after the norm.
    """
    rows = []
    for sequence in range(hidden_BTD[REFERENCE].shape[0]):
        sums = torch.zeros(len(FP8_STORES), 3, dtype=torch.float64)
        for start in range(0, hidden_BTD[REFERENCE].shape[1], LOGITS_CHUNK):
            chunk = slice(start, start + LOGITS_CHUNK)
            expected_TV = _log_probabilities(hidden_BTD[REFERENCE][sequence, chunk], head_VD)
            for i, store in enumerate(FP8_STORES):
                found_TV = _log_probabilities(hidden_BTD[store][sequence, chunk], head_VD)
                divergence_T = (expected_TV.exp() * (expected_TV - found_TV)).sum(dim=-1).double()
                same = (expected_TV.argmax(dim=-1) == found_TV.argmax(dim=-1)).sum().double()
                sums[i] += torch.stack([torch.tensor(len(divergence_T)).double(), divergence_T.sum().cpu(), same.cpu()])
        rows.append(sums)
    return torch.stack(rows)


def _log_probabilities(hidden_TD: torch.Tensor, head_VD: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(hidden_TD, head_VD).float().log_softmax(dim=-1)
