"""What a forward pass shows about a layer's experts: whom each token would choose, and what those would answer.

The scores of `expert_scores` need the outputs of the experts that a token is routed to, and of those that would take
their place. Running the layer once without each expert would be E forward passes. Instead each token's first m experts
are run, m a little more than the k that it is routed to, inside the one pass that happens anyway: (m - k) / k more
expert work. The outputs themselves are not kept. Every output of the layer, whichever of the m experts remain, is a
weighted sum of them, and the squared distance of two weighted sums needs only the outputs' inner products:

    || sum_j (u_j - v_j) f_j ||^2 = (u - v)^T G (u - v),   G_ij = f_i . f_j

So a token leaves its ranking (one byte an expert), m router logits and m (m + 1) / 2 inner products, whatever the
hidden size: 208 bytes at 128 experts and m = 5, where one float32 output of gpt-oss-120b has 11,520.

The layer's own output is computed from the first k of the m outputs, so later layers see the plain model: the same sum
to rounding, ties between equal logits going to the lower index.

Legend: T tokens, D hidden, F intermediate, E experts, m choices, k experts a token, P = m (m + 1) / 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from puzzle_trtllm.architecture import SWIGLU_ALPHA
from puzzle_trtllm.calibration.forward import require_finite

_TOKENS_AT_ONCE = 256
"""For the inner products: their float32 copies of outputs stay small."""


@dataclass(frozen=True, kw_only=True)
class TokenChoices:
    """One layer's experts as its tokens see them."""

    ranking: NDArray[Any]
    """`[T, E]`, uint8 (uint16 above 256 experts): each token's experts from most to least preferred; ties by index."""
    logits: NDArray[np.float32]
    """`[T, m]`: router logits of the first m of them."""
    inner_products: NDArray[np.float32]
    """`[T, P]`: inner products of their outputs, the upper triangle by rows."""
    top_k: int
    hidden_size: int

    @property
    def num_tokens(self) -> int:
        return len(self.ranking)

    @property
    def num_experts(self) -> int:
        return int(self.ranking.shape[1])

    @property
    def num_choices(self) -> int:
        """m."""
        return int(self.logits.shape[1])

    @cached_property
    def chosen(self) -> NDArray[np.int64]:
        """`[T, m]`: the first m experts of each token."""
        return self.ranking[:, : self.num_choices].astype(np.int64)

    def gram(self, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        """Inner products `[T, m, m]` of some tokens."""
        packed, m = self.inner_products[tokens].astype(np.float64), self.num_choices
        rows, columns = np.triu_indices(m)
        full = np.empty((len(packed), m, m))
        full[:, rows, columns] = packed
        full[:, columns, rows] = packed
        return full


def observe_choices(
    model: Any, run: Callable[[Any], None], num_choices: Sequence[int], *, first_layer: int = 0
) -> list[TokenChoices]:
    """Run `run(model)` and say what its tokens chose, layer by layer.

    `num_choices[i]` is m of the model's layer i, k to E. Raises CalibrationError naming the layer for router logits or
    expert outputs that are not finite; `first_layer` is the index, in the whole model, of the first layer here.
    """
    observers = [
        _LayerObserver(layer.mlp, m, f"model.layers.{i}.mlp")
        for i, (layer, m) in enumerate(zip(model.model.layers, num_choices, strict=True), first_layer)
    ]
    for layer, observer in zip(model.model.layers, observers, strict=True):
        layer.mlp.forward = observer.forward
    try:
        run(model)
    finally:
        for layer in model.model.layers:
            del layer.mlp.forward
    return [observer.result() for observer in observers]


class _LayerObserver:
    """Stands in for one layer's mixture of experts."""

    def __init__(self, mlp: Any, num_choices: int, name: str) -> None:
        self._router, self._experts, self._m, self._name = mlp.router, mlp.experts, num_choices, name
        self._parts: list[tuple[NDArray[Any], ...]] = []

    def forward(self, hidden_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """As GptOssMLP: the output, and the weights of the chosen experts `[T, k]`."""
        x_TD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
        logits_TE = torch.nn.functional.linear(x_TD, self._router.weight, self._router.bias)
        require_finite(logits_TE, f"{self._name}.router")
        ranking_TE = logits_TE.argsort(dim=-1, descending=True, stable=True)
        chosen_Tm = ranking_TE[:, : self._m]
        logits_Tm = logits_TE.gather(1, chosen_Tm)
        outputs_TmD = _expert_outputs(self._experts, x_TD, chosen_Tm)
        require_finite(outputs_TmD, f"{self._name}.experts")
        small = np.uint8 if logits_TE.shape[1] <= 256 else np.uint16
        ranking, logits = ranking_TE.cpu().numpy().astype(small), logits_Tm.float().cpu().numpy()
        self._parts.append((ranking, logits, _packed_gram(outputs_TmD).cpu().numpy()))
        weights_Tk = logits_Tm[:, : self._router.top_k].softmax(-1)
        output_TD = torch.zeros_like(x_TD)
        for place in range(self._router.top_k):
            output_TD.addcmul_(outputs_TmD[:, place], weights_Tk[:, place, None])
        return output_TD.view_as(hidden_BTD), weights_Tk

    def result(self) -> TokenChoices:
        ranking_TE, logits_Tm, gram_TP = (np.concatenate(part) for part in zip(*self._parts, strict=True))
        return TokenChoices(
            ranking=ranking_TE,
            logits=logits_Tm,
            inner_products=gram_TP,
            top_k=self._router.top_k,
            hidden_size=self._router.weight.shape[1],
        )


def _expert_outputs(experts: Any, x_TD: Tensor, chosen_Tm: Tensor) -> Tensor:
    """`[T, m, D]`: each expert once, on all tokens that have it among their m."""
    outputs_TmD = x_TD.new_empty(*chosen_Tm.shape, x_TD.shape[1])
    rows = outputs_TmD.view(-1, x_TD.shape[1])
    order = chosen_Tm.flatten().argsort(stable=True)
    counts = torch.bincount(chosen_Tm.flatten(), minlength=len(experts.down_proj)).tolist()
    for expert, places in enumerate(torch.split(order, counts)):
        if len(places):
            x = x_TD[places // chosen_Tm.shape[1]]
            gate_up = torch.addmm(experts.gate_up_proj_bias[expert], x, experts.gate_up_proj[expert])
            hidden = _swiglu(gate_up, experts.limit)
            rows[places] = torch.addmm(experts.down_proj_bias[expert], hidden, experts.down_proj[expert])
    return outputs_TmD


def _swiglu(gate_up: Tensor, limit: float) -> Tensor:
    gate, up = gate_up[:, ::2].clamp(max=limit), gate_up[:, 1::2].clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(gate * SWIGLU_ALPHA))


def _packed_gram(outputs_TmD: Tensor) -> Tensor:
    """float32 `[T, P]`."""
    rows, columns = torch.triu_indices(outputs_TmD.shape[1], outputs_TmD.shape[1])
    return torch.cat([(f := part.float()) @ f.mT for part in torch.split(outputs_TmD, _TOKENS_AT_ONCE)])[
        :, rows, columns
    ]
