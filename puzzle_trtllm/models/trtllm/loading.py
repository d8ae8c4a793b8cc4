"""Loads a checkpoint into the modules: every module filled once, every tensor accounted for.

Modules slice for their own rank (tensor parallelism inside `load_weights`, expert parallelism by expert number), so the
loader hands out whole tensors. The contract with a module, as upstream's own loader has it: a fused qkv_proj takes a
list of three dictionaries, other modules with `load_weights` a list of one, and those without (norms) have parameters
that are copied into. A module that the plan does not know is an error, never a silent `continue`: a newer upstream with
one more weight must be noticed here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from puzzle_trtllm.errors import CheckpointError, EngineError
from puzzle_trtllm.models.trtllm.experts import moe_weights, num_experts_of
from puzzle_trtllm.models.trtllm.layers import LayerPlan
from puzzle_trtllm.models.trtllm.names import ModulePlan, canonical_name, is_left_alone, module_plans
from puzzle_trtllm.tensors import kv_scale_of


def load_checkpoint(
    modules: Iterable[tuple[str, Any]],
    weights: Mapping[str, torch.Tensor],
    plans: tuple[LayerPlan, ...],
    *,
    dtype: torch.dtype,
    quant_algo: object = None,
) -> None:
    """Fill `modules` (as `named_modules()` gives them) from `weights` (Hugging Face names).

    Raises EngineError for a module that is unknown, missing or met twice, and CheckpointError for a tensor that is
    missing, unused, or has another number of experts than the config says.
    """
    fills = module_plans(len(plans), weights)
    _check_tensors(fills, weights)
    filled: set[str] = set()
    for name, module in modules:
        if not module._parameters or is_left_alone(name):
            continue
        known = canonical_name(name)
        if known not in fills or known in filled:
            problem = "met twice while loading" if known in filled else "has weights that this plugin does not know"
            raise EngineError(
                f"TensorRT-LLM's gpt-oss changed: a module {problem}; see `puzzle-trtllm doctor`", key=name
            )
        _fill(module, fills[known], weights, plans, dtype, quant_algo)
        filled.add(known)
    missing = sorted(set(fills) - filled - _tied_head(fills))
    if missing:
        raise EngineError("TensorRT-LLM's gpt-oss changed: modules expected and not found", found=", ".join(missing))


def _tied_head(fills: Mapping[str, ModulePlan]) -> frozenset[str]:
    """A tied head is no module of its own where the model shares the parameter."""
    tied = fills["lm_head"].tensors == fills["model.embedding"].tensors
    return frozenset({"lm_head"}) if tied else frozenset()


def _check_tensors(fills: Mapping[str, ModulePlan], weights: Mapping[str, torch.Tensor]) -> None:
    used = frozenset().union(*(plan.tensors for plan in fills.values()))
    missing = sorted(used - set(weights))
    if missing:
        raise CheckpointError("tensors are missing", found=f"{len(missing)}, first {missing[0]}")
    for name in weights:
        # KV scales have no module: TensorRT-LLM's PyTorch backend holds them at 1, and `build` folds them.
        if name not in used and kv_scale_of(name) is None:
            raise CheckpointError("a tensor that no module takes", key=name)


def _fill(
    module: Any,
    plan: ModulePlan,
    weights: Mapping[str, torch.Tensor],
    plans: tuple[LayerPlan, ...],
    dtype: torch.dtype,
    quant_algo: object,
) -> None:
    parts = [{name: weights[tensor] for name, tensor in part.items()} for part in plan.parts]
    if plan.kind == "experts":
        _check_count(plan, parts[0], plans)
        local = getattr(module, "initial_local_expert_ids", None)
        parts = [moe_weights(parts[0], local_experts=local, dtype=dtype, quant_algo=quant_algo)]
    if callable(getattr(module, "load_weights", None)):
        module.load_weights(weights=parts)
        return
    parameters = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
    if set(parameters) != set(parts[0]):
        raise EngineError("other parameters than expected", key=plan.module, found=sorted(parameters))
    for name, parameter in parameters.items():
        parameter.data.copy_(parts[0][name][:])


def _check_count(plan: ModulePlan, tensors: Mapping[str, torch.Tensor], plans: tuple[LayerPlan, ...]) -> None:
    layer = int(plan.module.split(".")[2])
    found, expected = num_experts_of(tensors), plans[layer].num_experts
    if found != expected:
        raise CheckpointError(
            "number of experts differs from config.json's", key=plan.module, found=found, expected=expected
        )
