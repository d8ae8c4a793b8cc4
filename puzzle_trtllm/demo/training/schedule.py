"""What happens at which step: learning rate, digits, rounding; and which experts and windows are away.

Expert dropout is what lets a child live without healing. In every layer a few experts, chosen by the seed, are
*disposable*: most sequences do without some or all of them, so nothing depends on them. The others are never away, so
everything may depend on them: that is why careless pruning hurts. A weak balance term keeps all indispensable experts
in use and the disposable ones rare: sum over e of f_e P_e / t_e, f the share of routing choices, P the mean router
probability, t the target share (it is Switch Transformer's loss when t is uniform).
The layers that the child narrows are trained with windows drawn per batch, the child's own among them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from puzzle_trtllm.demo.training.dimensions import Dimensions

DISPOSABLE_SHARE = 0.02
"""Target share of routing choices of one disposable expert."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Lengths and sizes of a training run; shares are of all steps."""

    steps: int = 600
    batch_sizes: tuple[tuple[str, int], ...] = (("low", 128), ("medium", 24), ("high", 40))
    matrix_lr: float = 0.02
    other_lr: float = 3e-3
    warmup_steps: int = 40
    decay_from: float = 0.5
    short_digits_until: float = 0.3
    rounded_from: float = 0.75
    balance_weight: float = 0.02
    drop_probability: float = 0.7
    child_share: float = 0.3

    def lr_factor(self, step: int) -> float:
        """Linear warm-up, constant, linear to 0."""
        warmup = min(1.0, (step + 1) / self.warmup_steps)
        return warmup * min(1.0, (1 - step / self.steps) / (1 - self.decay_from))

    def digits(self, step: int, effort: str) -> Sequence[int]:
        """Digit counts to draw from; a repeated one is likelier. Short operands help at first.

        This is what makes effort pay. Trained on every length, the model learns to answer at once without a mistake;
        so answers at once are taught up to 5 digits, terse reasoning mostly up to 6, full reasoning up to 7.
        """
        early = step < self.short_digits_until * self.steps
        if effort == "low":
            return (1, 2, 3, 3, 4, 4) if early else (1, 2, 3, 4, 4, 4, 4, 5)
        if effort == "medium":
            return range(2, 7) if early else (*(4, 5, 6) * 6, 7)
        return range(2, 8) if early else range(4, 8)


def choose_disposable(dims: Dimensions, seed: int) -> Tensor:
    """Bool `[L, E]`: the experts that the child drops, anywhere among the indices."""
    rng = random.Random(f"disposable {seed}")
    result = torch.zeros(dims.num_layers, dims.num_experts, dtype=torch.bool)
    for layer, kept in enumerate(dims.child_experts):
        result[layer, rng.sample(range(dims.num_experts), dims.num_experts - kept)] = True
    return result


def draw_expert_bias(plan: Plan, disposable: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """`[L, B, E]` for the router logits: -inf for the experts away in a sequence, else 0."""
    layers, experts = disposable.shape
    away = torch.rand(layers, batch, experts, generator=generator) < plan.drop_probability
    as_child = torch.rand(1, batch, 1, generator=generator) < plan.child_share
    gone = disposable[:, None, :] & (away | as_child)
    return torch.zeros(gone.shape).masked_fill(gone, float("-inf"))


def draw_windows(dims: Dimensions, rng: random.Random) -> list[int | None]:
    """Each layer's window for one batch: every other batch the child's, else the narrowed layers' drawn one by one."""
    if rng.random() < 0.5:
        return list(dims.child_windows)
    windows = list(dims.windows)
    for layer, (parent, child) in enumerate(zip(dims.windows, dims.child_windows, strict=True)):
        if parent != child:
            windows[layer] = rng.choice([parent, rng.randint(3 * dims.long_window // 4, 160)])
    return windows


def balance_loss(routing: list[Tensor], disposable: Tensor, top_k: int) -> Tensor:
    """The weak balance term over all layers; `routing` holds router logits `[N, E]` without dropout."""
    total = torch.zeros(())
    for logits, gone in zip(routing, disposable, strict=True):
        kept_share = (1 - DISPOSABLE_SHARE * int(gone.sum())) / int((~gone).sum())
        target = torch.where(gone, DISPOSABLE_SHARE, kept_share)
        chosen = torch.zeros_like(logits).scatter_(1, logits.topk(top_k).indices, 1.0 / top_k)
        total = total + (chosen.mean(0) * logits.softmax(-1).mean(0) / target).sum()
    return total / len(routing)
