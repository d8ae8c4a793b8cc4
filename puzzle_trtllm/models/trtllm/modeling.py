"""`GptOssPuzzleForCausalLM` for TensorRT-LLM: importing this module registers it.

Registration at import is TensorRT-LLM's own contract, and the one import side effect of this project: in 1.2 a worker
unpickles the class and so imports this module; later lines send its name and import it when the architecture is looked
up. It is the only module here that imports tensorrt_llm.

Everything that a layer does is upstream's code, constructed from a config of the layer's own. What is ours: which
config each block is made from, the window of each block, the router kernel at new widths, and the loader. A model whose
layers are all alike takes the same path and comes out as upstream would have built it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

from puzzle_trtllm.families import GPT_OSS_PUZZLE
from puzzle_trtllm.models.trtllm.layers import (
    LayerPlan,
    check_layout,
    config_of_layer,
    layer_plans,
    with_pretrained,
)
from puzzle_trtllm.models.trtllm.loading import load_checkpoint
from puzzle_trtllm.models.trtllm.symbols import accepts, resolve
from puzzle_trtllm.models.trtllm.upstream import CAUSAL_LM, REGISTER

_gpt_oss: Any = sys.modules[resolve(CAUSAL_LM).__module__]
_register: Callable[[str], Callable[[type], type]] = resolve(REGISTER)


class PuzzleTransformer(_gpt_oss.Transformer):  # type: ignore[misc]
    """Upstream's decoder, with each block made from its own config."""

    def __init__(self, model_config: Any) -> None:
        # With zero layers upstream makes everything but the blocks.
        super().__init__(with_pretrained(model_config, num_hidden_layers=0))
        self.model_config = model_config
        plans = layer_plans(model_config.pretrained_config)
        self.block = torch.nn.ModuleList([self._make_block(plan) for plan in plans])

    def _make_block(self, plan: LayerPlan) -> Any:
        block_class = _gpt_oss.TransformerBlock
        options: dict[str, Any] = {}
        if accepts(block_class.__init__, "use_custom_cublas_mm"):
            options["use_custom_cublas_mm"] = getattr(self, "use_custom_cublas_mm", False)
        block = block_class(config_of_layer(self.model_config, plan), plan.layer, **options)
        block.attn.sliding_window = plan.window
        if plan.plain_router and hasattr(block.mlp, "compute_gate_output"):
            block.mlp.compute_gate_output = _plain_router(block.mlp)
        return block


def _plain_router(mlp: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    # A function, not the module itself: assigned to a module, `mlp.gate` would be registered a second time.
    def compute_gate_output(x: torch.Tensor, lora_params: Mapping[str, Any] | None = None) -> torch.Tensor:
        # Lines with LoRA in gpt-oss pass it by name at every step, mostly as None.
        options = {"lora_params": lora_params, "layer_idx": mlp.layer_idx} if lora_params else {}
        logits: torch.Tensor = mlp.gate(x, **options)
        return logits

    return compute_gate_output


@_register(GPT_OSS_PUZZLE.causal_lm)
class GptOssPuzzleForCausalLM(_gpt_oss.GptOssForCausalLM):  # type: ignore[misc]
    """A Puzzle child of gpt-oss; the checkpoint is a serving copy made by `puzzle-trtllm build`."""

    def __init__(self, model_config: Any) -> None:
        config = model_config.pretrained_config
        if getattr(config, "torch_dtype", None) is None:
            config.torch_dtype = torch.bfloat16
        check_layout(layer_plans(config), model_config)
        # Past GptOssForCausalLM.__init__, which would build its own Transformer and remap a legacy config.
        super(_gpt_oss.GptOssForCausalLM, self).__init__(PuzzleTransformer(model_config), model_config=model_config)

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Load Hugging Face tensors; raises when a module or tensor is left over."""
        load_checkpoint(
            self.named_modules(),
            weights,
            layer_plans(self.model_config.pretrained_config),
            dtype=self.model_config.pretrained_config.torch_dtype,
            quant_algo=getattr(self.model_config.quant_config, "quant_algo", None),
        )
