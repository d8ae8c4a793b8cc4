"""The training loop: three batches a step, one an effort, their gradients added."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import torch
from torch.nn import functional

from puzzle_trtllm.demo.training.data import IGNORED, sample_batch
from puzzle_trtllm.demo.training.dimensions import Dimensions
from puzzle_trtllm.demo.training.model import Abacus, Conditions
from puzzle_trtllm.demo.training.optimizer import make_optimizers
from puzzle_trtllm.demo.training.schedule import (
    Plan,
    balance_loss,
    choose_disposable,
    draw_expert_bias,
    draw_windows,
)

_LOG_EVERY = 50


def train(dims: Dimensions, plan: Plan, seed: int, report: Callable[[str], None]) -> Abacus:
    """Train from nothing. The result is the rounded model: what a checkpoint of it will hold, bit for bit."""
    torch.manual_seed(seed)
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    model = Abacus(dims)
    optimizers = make_optimizers(model, plan.matrix_lr, plan.other_lr)
    base_rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    disposable = choose_disposable(dims, seed)
    sums: dict[str, float] = {}
    start = time.monotonic()
    for step in range(plan.steps):
        model.set_rounded(step >= plan.rounded_from * plan.steps)
        for optimizer, rate in zip(optimizers, base_rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * plan.lr_factor(step)
            optimizer.zero_grad()
        for effort, size in plan.batch_sizes:
            routing: list[torch.Tensor] = []
            conditions = Conditions(
                windows=draw_windows(dims, rng),
                expert_bias=draw_expert_bias(plan, disposable, size, generator),
                routing=routing,
            )
            batch = sample_batch(rng, effort, size, plan.digits(step, effort))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(batch.inputs, conditions)
            loss = functional.cross_entropy(logits.float().flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED)
            balance = balance_loss(routing, disposable, dims.top_k)
            (loss + plan.balance_weight * balance).backward()  # type: ignore[no-untyped-call]
            sums[effort] = sums.get(effort, 0.0) + loss.item()
            sums["balance"] = sums.get("balance", 0.0) + balance.item() / len(plan.batch_sizes)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if (step + 1) % _LOG_EVERY == 0:
            losses = "  ".join(f"{name} {value / _LOG_EVERY:.4f}" for name, value in sums.items())
            report(f"step {step + 1}/{plan.steps}  {time.monotonic() - start:.0f} s  {losses}")
            sums.clear()
    model.set_rounded(True)
    return model.eval()
