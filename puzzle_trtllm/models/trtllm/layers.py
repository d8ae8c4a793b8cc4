"""What each layer decides, read from the config object that TensorRT-LLM loaded, and which layouts cannot run.

Upstream's gpt-oss builds every layer from one config: `num_local_experts` experts, a window on even layers. A Puzzle
child says both per layer in `block_configs`. So each layer is built from a copy of the model config whose
`pretrained_config` carries the layer's own expert count: router width, the fused MoE, and the SwiGLU tensors (one entry
per local expert) all follow from it. The window is an attribute of the attention block, set after it is made.

The copies are shallow on purpose. `extra_attrs` of the model config is where layers register themselves by reference;
a deep copy would register them in a dictionary that nobody reads.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from puzzle_trtllm.architecture import BlockConfig, read_block_configs
from puzzle_trtllm.errors import EngineError
from puzzle_trtllm.mxfp4 import BLOCK_SIZE

W4A16_MXFP4 = "W4A16_MXFP4"
"""Upstream's name for MXFP4 experts below Blackwell: weights of 4 bits, activations of 16."""
UPSTREAM_NUM_EXPERTS = frozenset({32, 128})
"""Router widths of OpenAI's own models (20b, 120b), for which upstream's small-batch router kernel is known to work."""


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """One layer."""

    layer: int
    num_experts: int
    window: int | None
    """Tokens a query sees, its own included; None is full attention."""

    @property
    def plain_router(self) -> bool:
        """True where the router must not use upstream's kernel for few tokens, which nobody has tried at this width."""
        return self.num_experts not in UPSTREAM_NUM_EXPERTS


def layer_plans(pretrained_config: Any) -> tuple[LayerPlan, ...]:
    """One plan a layer; without `block_configs`, those of a plain gpt-oss. Raises ArchitectureError."""
    names = ("num_hidden_layers", "num_local_experts", "sliding_window", "layer_types", "block_configs")
    values = {name: getattr(pretrained_config, name, None) for name in names}
    blocks: Sequence[BlockConfig] = read_block_configs(
        {name: value for name, value in values.items() if value is not None}, source="the model's config"
    )
    return tuple(
        LayerPlan(layer=i, num_experts=block.num_local_experts, window=block.sliding_window)
        for i, block in enumerate(blocks)
    )


def check_layout(plans: Sequence[LayerPlan], model_config: Any) -> None:
    """Raise EngineError for a mapping that this model cannot be dealt out to."""
    mapping, config = model_config.mapping, model_config.pretrained_config
    _check(mapping.pp_size == 1, "pipeline_parallel_size", mapping.pp_size, "1")
    _check(
        getattr(model_config, "moe_load_balancer", None) is None,
        "moe_config.load_balancer",
        "set",
        "none: expert load balancing needs one expert count for all layers",
    )
    for plan in plans:
        key = f"moe_expert_parallel_size on layer {plan.layer}"
        expected = f"a divisor of its {plan.num_experts} experts"
        _check(plan.num_experts % mapping.moe_ep_size == 0, key, mapping.moe_ep_size, expected)
    if _halves_blocks(model_config):
        blocks = config.intermediate_size // BLOCK_SIZE
        expected = f"a divisor of the experts' {blocks} MXFP4 blocks: CUTLASS gives cut ones wrong scales here"
        _check(blocks % mapping.moe_tp_size == 0, "moe_tensor_parallel_size", mapping.moe_tp_size, expected)
    if not mapping.enable_attention_dp:
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        expected = f"a divisor of {heads} heads and {kv_heads} KV heads (repeated KV heads are not supported)"
        divides = heads % mapping.tp_size == 0 and kv_heads % mapping.tp_size == 0
        _check(divides, "tensor_parallel_size", mapping.tp_size, expected)


def _halves_blocks(model_config: Any) -> bool:
    """True where upstream cuts values and scales of `down_proj` at different places (build/expert_layout.py)."""
    algo = getattr(model_config.quant_config, "quant_algo", None)
    return bool(algo == W4A16_MXFP4 and model_config.moe_backend.upper() == "CUTLASS")


def config_of_layer(model_config: Any, plan: LayerPlan) -> Any:
    """`model_config` for one layer: the very same object where the count is the shared one, else a shallow copy."""
    shared = model_config.pretrained_config
    if shared.num_local_experts == plan.num_experts:
        return model_config
    return with_pretrained(model_config, num_local_experts=plan.num_experts)


def with_pretrained(model_config: Any, **values: Any) -> Any:
    """A shallow copy of a model config whose pretrained config differs in `values`."""
    own = copy.copy(model_config)
    own.pretrained_config = copy.copy(model_config.pretrained_config)
    for name, value in values.items():
        setattr(own.pretrained_config, name, value)
    return own


def _check(holds: bool, key: str, found: object, expected: str) -> None:
    if not holds:
        raise EngineError("this layout cannot run a Puzzle child", key=key, found=found, expected=expected)
