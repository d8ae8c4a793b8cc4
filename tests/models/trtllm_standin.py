"""A minimal stand-in for the TensorRT-LLM interfaces in the plugin's table, and for nothing else.

`install(monkeypatch, line)` makes modules from the table's rows alone: each row's import path gets the class or
function of that name from this file. What is not in the table does not exist, so plugin code that relies on more
fails here. The classes keep upstream's construction order, names and slicing rules on a CPU, with no kernels: a loaded
module just holds its tensors. Two lines: in "late" the experts sit in a `backend` child, and blocks take no
`use_custom_cublas_mm`.
"""

from __future__ import annotations

import dataclasses
import sys
import types

import torch
from torch import nn

from puzzle_trtllm.models.trtllm.upstream import REQUIREMENTS

REGISTRY: dict[str, type] = {}


@dataclasses.dataclass
class Mapping:
    tp_size: int = 1
    tp_rank: int = 0
    pp_size: int = 1
    moe_ep_size: int = 1
    moe_ep_rank: int = 0
    moe_tp_size: int = 1
    enable_attention_dp: bool = False


@dataclasses.dataclass
class QuantConfig:
    quant_algo: str | None = None


@dataclasses.dataclass
class ModelConfig:
    pretrained_config: object
    mapping: Mapping = dataclasses.field(default_factory=Mapping)
    quant_config: QuantConfig = dataclasses.field(default_factory=QuantConfig)
    moe_load_balancer: object = None
    moe_backend: str = "CUTLASS"
    extra_attrs: dict = dataclasses.field(default_factory=dict)
    _frozen: bool = False

    def get_bindings_model_config(self):
        """Ranks that share the KV heads."""
        return 1 if self.mapping.enable_attention_dp else self.mapping.tp_size

    def __setattr__(self, key, value):
        if getattr(self, "_frozen", False) and key not in (
            "_frozen",
            "extra_attrs",
            "pretrained_config",
            "quant_config",
        ):
            raise AttributeError(f"Cannot modify ModelConfig.{key}")
        super().__setattr__(key, value)


class MoEWeightLoadingMode:
    FUSED_GATE_UP_PROJ = "fused"


class LLM: ...


class SamplingParams:
    max_tokens = top_k = top_p = ignore_eos = min_tokens = stop_token_ids = end_id = None


class TrtllmAttention:
    kv_scale = 1.0


class KVCacheManager:
    def calculate_max_num_blocks_for_vswa(self):
        return "TRTLLM_WINDOW_SIZE_SHARES"


def register_auto_model(name):
    def decorator(cls):
        REGISTRY[name] = cls
        return cls

    return decorator


class Counted(nn.Module):
    """Counts how often it is filled."""

    def __init__(self):
        super().__init__()
        self.fills = 0


class RMSNorm(nn.Module):
    """No load_weights: its parameter is copied into."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), float("nan")))


class Linear(Counted):
    """Column-sliced where `column` says so; qkv takes three parts, each sliced for its rank."""

    def __init__(self, in_size, out_size, mapping=None, column=False):
        super().__init__()
        self.mapping, self.column = mapping, column
        self.weight = nn.Parameter(torch.full((out_size, in_size), float("nan")))
        self.register_parameter("bias", None)

    def load_weights(self, weights):
        self.fills += 1
        self.weight.data = torch.cat([self._own(part["weight"]) for part in weights])
        if all("bias" in part for part in weights):
            self.bias = nn.Parameter(torch.cat([self._own(part["bias"]) for part in weights]), requires_grad=False)

    def _own(self, tensor):
        if not self.column:
            return tensor
        rows = tensor.shape[0] // self.mapping.tp_size
        return tensor[rows * self.mapping.tp_rank : rows * (self.mapping.tp_rank + 1)]

    def forward(self, x, lora_params=None, layer_idx=None):
        y = nn.functional.linear(x, self.weight, self.bias)
        return y if lora_params is None else y + lora_params["delta"] + layer_idx


class MoE(Counted):
    """Reads its own experts only, by global number, as upstream's fused modules do."""

    def __init__(self, num_experts, mapping, quant_algo):
        super().__init__()
        per_rank = num_experts // mapping.moe_ep_size
        first = per_rank * mapping.moe_ep_rank
        self.initial_local_expert_ids = list(range(first, first + per_rank))
        self.num_experts, self.quant_algo = num_experts, quant_algo
        self.w3_w1_weight = nn.Parameter(torch.empty(0), requires_grad=False)
        self.loaded = None

    def load_weights(self, weights):
        self.fills += 1
        (given,) = weights
        self.loaded = {
            name: {e: values[e].clone() for e in self.initial_local_expert_ids}
            for name, values in given.items()
            if isinstance(values, list)
        }
        if self.quant_algo == "W4A16_MXFP4":
            for e in self.initial_local_expert_ids:
                for name in ("w1", "w2", "w3"):
                    self.loaded.setdefault(name, {})[e] = given[f"{e}.{name}.weight_scale_inv"]


class TritonFusedMoE(MoE): ...


class CutlassFusedMoE(MoE): ...


class ConfigurableMoE(nn.Module):
    """Later lines: a wrapper whose weights live in a child."""

    def __init__(self, *args):
        super().__init__()
        self.backend = MoE(*args)


class AttentionBlock(Counted):
    def __init__(self, config, layer_idx=0):
        super().__init__()
        c = config.pretrained_config
        shared = Mapping() if config.mapping.enable_attention_dp else config.mapping
        self.tp_rank, self.num_heads = shared.tp_rank, c.num_attention_heads // shared.tp_size
        qkv = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
        self.qkv_proj = Linear(c.hidden_size, qkv, shared, column=True)
        self.o_proj = Linear(c.num_attention_heads * c.head_dim, c.hidden_size)
        self.sliding_window = c.sliding_window if layer_idx % 2 == 0 else None
        self.sinks = nn.Parameter(torch.full((self.num_heads,), float("nan")))
        self.norm = RMSNorm(c.hidden_size)
        config.extra_attrs.setdefault("attn_layers", {})[layer_idx] = self

    def forward(self, x):
        return x, self.sliding_window, self.sinks

    def load_weights(self, weights):
        self.fills += 1
        first = self.num_heads * self.tp_rank
        self.sinks.data = weights[0]["sinks"][first : first + self.num_heads].float()


class MLPBlock(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        c = config.pretrained_config
        per_rank = c.num_local_experts // config.mapping.moe_ep_size
        self.layer_idx = layer_idx
        self.norm = RMSNorm(c.hidden_size)
        self.gate = Linear(c.hidden_size, c.num_local_experts)
        self.swiglu_alpha = torch.full((per_rank,), 1.702)
        self.swiglu_beta = torch.full((per_rank,), 1.0)
        self.swiglu_limit = torch.full((per_rank,), 7.0)
        moe = ConfigurableMoE if LINE == "late" else MoE
        self.experts = moe(c.num_local_experts, config.mapping, config.quant_config.quant_algo)

    def compute_gate_output(self, x, lora_params=None):
        return self.gate(x) * 0 + 1  # the kernel for few tokens, told apart from the plain linear

    def forward_attn_dp(self, x, all_rank_num_tokens):
        return "allgather", x, all_rank_num_tokens


class TransformerBlock(nn.Module):
    def __init__(self, config, layer_idx, use_custom_cublas_mm=False):
        super().__init__()
        size = config.pretrained_config.hidden_size
        self.input_layernorm = RMSNorm(size)
        self.attn = AttentionBlock(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(size)
        self.mlp = MLPBlock(config, layer_idx)
        self.next_layer_layernorm = RMSNorm(size)
        self.use_custom_cublas_mm = use_custom_cublas_mm


class LateTransformerBlock(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        size = config.pretrained_config.hidden_size
        self.input_layernorm = RMSNorm(size)
        self.attn = AttentionBlock(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(size)
        self.mlp = MLPBlock(config, layer_idx)
        self.next_layer_layernorm = RMSNorm(size)


class Transformer(nn.Module):
    def __init__(self, model_config):
        super().__init__()
        self.model_config = model_config
        c = model_config.pretrained_config
        self.use_custom_cublas_mm = True
        self.embedding = Linear(c.hidden_size, c.vocab_size)
        self.embed_tokens = self.embedding
        self.block = nn.ModuleList(
            [TransformerBlock(model_config, i) for i in range(c.num_hidden_layers)],
        )
        self.norm = RMSNorm(c.hidden_size)


class SpecDecOneEngineForCausalLM(nn.Module):
    def __init__(self, model, model_config):
        super().__init__()
        self.model, self.model_config = model, model_config
        self.lm_head = Linear(model_config.pretrained_config.hidden_size, model_config.pretrained_config.vocab_size)
        self.__post_init__()

    def apply_quant_config_exclude_modules(self):
        """create_weights comes after it."""


class GptOssForCausalLM(SpecDecOneEngineForCausalLM):
    def __init__(self, model_config):
        super().__init__(Transformer(model_config), model_config=model_config)

    def __post_init__(self):
        super().apply_quant_config_exclude_modules()
        self.post_init_done = True

    def load_weights(self, weights):
        raise AssertionError("upstream's loader reads one expert count for all layers")

    def post_load_weights(self):
        """Upstream: next_layer_layernorm of a block becomes the attn.norm of the next."""


LINE = "1.2"


def install(monkeypatch, line):
    """Put the stand-in where the table says TensorRT-LLM is; `line` is "1.2" or "late"."""
    own = sys.modules[__name__]
    monkeypatch.setattr(own, "LINE", line)
    if line == "late":
        monkeypatch.setattr(own, "TransformerBlock", LateTransformerBlock)
    REGISTRY.clear()
    for row in REQUIREMENTS:
        name = row.modules[-1] if line == "late" else row.modules[0]
        head = row.path.split(".")[0]
        if name not in sys.modules:
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setattr(sys.modules[name], head, getattr(own, head), raising=False)
    for name in [name for name in sys.modules if name.startswith("tensorrt_llm")]:
        parts = name.split(".")
        for end in range(1, len(parts)):
            parent = ".".join(parts[:end])
            if parent not in sys.modules:
                monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.delitem(sys.modules, "puzzle_trtllm.models.trtllm.modeling", raising=False)
