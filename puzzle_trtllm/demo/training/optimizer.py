"""Muon for matrices, AdamW for the rest.

Muon (K. Jordan, 2024) takes the momentum of a matrix's gradient and replaces it by the nearest orthogonal matrix, so
that rare directions learn as fast as common ones. Five Newton-Schulz steps X <- aX + (bA + cA^2)X, A = XX^T, come close
enough; stacked expert matrices are handled as a batch. On this model it needs a fraction of AdamW's steps.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_MOMENTUM = 0.95


def orthogonalize(matrix: Tensor) -> Tensor:
    """Roughly U V^T of `[..., m, n]` = U S V^T: all singular values end between about 0.7 and 1.2."""
    a, b, c = _NEWTON_SCHULZ
    x = matrix / (torch.linalg.matrix_norm(matrix, keepdim=True) + 1e-7)
    transposed = x.shape[-2] > x.shape[-1]
    x = (x.mT if transposed else x).bfloat16()
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = (x.mT if transposed else x).float()
    return result


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized, scaled by sqrt(max(1, rows / columns)), with decoupled weight decay."""

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                buffer = self.state[param].setdefault("momentum", torch.zeros_like(param))
                buffer.lerp_(param.grad, 1 - _MOMENTUM)
                update = orthogonalize(param.grad.lerp(buffer, _MOMENTUM))
                scale = max(1.0, param.shape[-2] / param.shape[-1]) ** 0.5
                param.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


def make_optimizers(model: nn.Module, matrix_lr: float, other_lr: float) -> list[torch.optim.Optimizer]:
    """Muon on the matrices inside the layers; AdamW on embeddings, output, router, norms, biases and sinks."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, param in model.named_parameters():
        inside = name.endswith(("_proj.weight", "experts.gate_up_proj", "experts.down_proj"))
        (matrices if inside else others).append(param)
    adam = torch.optim.AdamW(others, lr=other_lr, betas=(0.9, 0.98), weight_decay=0.0)
    return [Muon(matrices, lr=matrix_lr, weight_decay=0.01), adam]
