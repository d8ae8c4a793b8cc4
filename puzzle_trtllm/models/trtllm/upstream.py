"""The table: what the plugin relies on in TensorRT-LLM, one row a fact, with the release lines and the upstream file.

TensorRT-LLM cannot run where this project is developed. Its source was read instead, in several versions, and what the
plugin takes for granted is written down here as data: `puzzle-trtllm doctor` checks every row against the installed
TensorRT-LLM, `doctor --source` against a checkout of it, and the tests build a stand-in from exactly these rows. A row
that no longer holds is a line in the doctor's report instead of a crash in a worker.

Lines: "1.2" (files of October 2025 to February 2026), "1.3" (release candidates up to mid-2026), "late" (autumn 2026).
`modules` are tried in order, because import paths moved between lines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Line = Literal["1.2", "1.3", "late"]
ALL_LINES: tuple[Line, ...] = ("1.2", "1.3", "late")

_MODELS = "tensorrt_llm._torch.models"
_EXPERTS = ("tensorrt_llm._torch.modules.fused_moe", "tensorrt_llm._torch.moe.fused_moe")
"""Autumn 2026 moved the package."""
_GPT_OSS = (f"{_MODELS}.modeling_gpt_oss",)
_FILE = "tensorrt_llm/_torch/models/modeling_gpt_oss.py"


@dataclass(frozen=True, kw_only=True)
class Requirement:
    """One fact about upstream."""

    key: str
    """Names the row."""
    modules: tuple[str, ...]
    """Import paths, tried in order."""
    path: str
    """Dotted path inside the module: a class, a function, or Class.method; "" is the whole file, never imported."""
    parameters: tuple[str, ...] = ()
    """Parameters it must accept, in this order; others may follow or stand between."""
    may_have: tuple[str, ...] | None = None
    """What else it may have as parameters, where the plugin replaces it: callers pass what upstream's own takes."""
    mentions: tuple[str, ...] = ()
    """Texts that must occur in its source: attributes and globals that cannot be seen without running it."""
    lines: tuple[Line, ...] = ALL_LINES
    optional: bool = False
    """A missing optional row switches something off; it is reported and no failure."""
    needed_for: str
    source: str
    """Upstream file it was read in."""


REGISTER = Requirement(
    key="register",
    modules=(f"{_MODELS}.modeling_utils",),
    path="register_auto_model",
    parameters=("name",),
    needed_for="registering GptOssPuzzleForCausalLM; looked up by config.architectures[0]",
    source="tensorrt_llm/_torch/models/modeling_utils.py",
)
CAUSAL_LM = Requirement(
    key="causal-lm",
    modules=_GPT_OSS,
    path="GptOssForCausalLM",
    mentions=("__post_init__", "load_weights", "apply_quant_config_exclude_modules", "create_weights"),
    needed_for="the base class: quantization excludes, logits, speculative decoding are inherited",
    source=_FILE,
)
TRANSFORMER = Requirement(
    key="transformer",
    modules=_GPT_OSS,
    path="Transformer.__init__",
    parameters=("model_config",),
    mentions=("self.block", "num_hidden_layers", "TransformerBlock("),
    needed_for="made with zero layers, so that the blocks can be made one by one from their own configs",
    source=_FILE,
)
BLOCK = Requirement(
    key="block",
    modules=_GPT_OSS,
    path="TransformerBlock.__init__",
    parameters=("config", "layer_idx"),
    mentions=("self.attn", "self.mlp", "self.next_layer_layernorm"),
    needed_for="one layer from one config; `use_custom_cublas_mm` is passed on where it exists",
    source=_FILE,
)
TRITON_EXPERTS = Requirement(
    key="triton-experts",
    modules=tuple(f"{package}.fused_moe_triton" for package in _EXPERTS),
    path="TritonFusedMoE",
    optional=True,
    needed_for="moe_config.backend TRITON, the experts on Hopper; deprecated in 1.3. Where it is gone, build with "
    "`llm_args: {moe_config: {backend: CUTLASS}}`",
    source="tensorrt_llm/_torch/modules/fused_moe/fused_moe_triton.py",
)
REQUIREMENTS: tuple[Requirement, ...] = (
    REGISTER,
    CAUSAL_LM,
    TRANSFORMER,
    BLOCK,
    Requirement(
        key="engine-base",
        modules=(f"{_MODELS}.modeling_speculative",),
        path="SpecDecOneEngineForCausalLM.__init__",
        parameters=("model", "model_config"),
        needed_for="the initializer that follows GptOssForCausalLM's own, which only builds its Transformer",
        source="tensorrt_llm/_torch/models/modeling_speculative.py",
    ),
    Requirement(
        key="window-set",
        modules=_GPT_OSS,
        path="AttentionBlock.__init__",
        parameters=("config", "layer_idx"),
        mentions=("self.sliding_window", "self.sinks"),
        needed_for="the window is replaced after the block is made; sinks are a parameter of the block",
        source=_FILE,
    ),
    Requirement(
        key="window-read",
        modules=_GPT_OSS,
        path="AttentionBlock.forward",
        mentions=("self.sliding_window", "self.sinks"),
        needed_for="the window is read at every step, so that replacing the attribute is enough",
        source=_FILE,
    ),
    Requirement(
        key="sinks-load",
        modules=_GPT_OSS,
        path="AttentionBlock.load_weights",
        parameters=("weights",),
        mentions=("sinks", "tp_rank"),
        needed_for="slices the sinks for its rank; is handed [{'sinks': [num_heads]}]",
        source=_FILE,
    ),
    Requirement(
        key="mlp-count",
        modules=_GPT_OSS,
        path="MLPBlock.__init__",
        parameters=("config", "layer_idx"),
        mentions=("num_local_experts", "swiglu_alpha", "swiglu_beta", "swiglu_limit", "moe_ep_size", "self.gate"),
        needed_for="router, experts and SwiGLU tensors follow the config's own count, also under expert parallelism",
        source=_FILE,
    ),
    Requirement(
        key="router-kernel",
        modules=_GPT_OSS,
        path="MLPBlock.compute_gate_output",
        parameters=("x",),
        may_have=("lora_params",),
        mentions=("self.gate",),
        optional=True,
        needed_for="replaced by the plain linear where the width is new; without it there is nothing to replace",
        source=_FILE,
    ),
    Requirement(
        key="attention-dp",
        modules=_GPT_OSS,
        path="MLPBlock.forward_attn_dp",
        mentions=("all_rank_num_tokens",),
        optional=True,
        needed_for="attention data parallelism deals out tokens inside upstream's block, whatever the layer's count",
        source=_FILE,
    ),
    Requirement(
        key="norm-aliases",
        modules=_GPT_OSS,
        path="GptOssForCausalLM",
        mentions=("next_layer_layernorm", "attn.norm"),
        needed_for="placeholder norms are replaced after loading (post_load_weights, later lines: setup_aliases)",
        source=_FILE,
    ),
    Requirement(
        key="model-config",
        modules=("tensorrt_llm._torch.model_config",),
        path="ModelConfig",
        mentions=("pretrained_config", "mapping", "moe_load_balancer", "moe_backend", "quant_config", "extra_attrs"),
        needed_for="shallow copies, one a layer; pretrained_config may be set on a frozen one",
        source="tensorrt_llm/_torch/model_config.py",
    ),
    Requirement(
        key="mapping",
        modules=("tensorrt_llm.mapping",),
        path="Mapping",
        mentions=("tp_size", "pp_size", "moe_ep_size", "moe_tp_size", "enable_attention_dp"),
        needed_for="refusing layouts that cannot be dealt out",
        source="tensorrt_llm/mapping.py",
    ),
    Requirement(
        key="local-experts",
        modules=tuple(f"{package}.fused_moe_cutlass" for package in _EXPERTS),
        path="CutlassFusedMoE",
        mentions=("initial_local_expert_ids",),
        optional=True,
        needed_for="global numbers of the rank's experts, set by each class or by their base MoE; without it every "
        "rank is handed all experts",
        source="tensorrt_llm/_torch/modules/fused_moe/fused_moe_cutlass.py",
    ),
    TRITON_EXPERTS,
    Requirement(
        key="fused-gate-up",
        modules=tuple(f"{package}.interface" for package in _EXPERTS),
        path="MoEWeightLoadingMode",
        mentions=("FUSED_GATE_UP_PROJ",),
        needed_for="the names and layout of the expert dictionary",
        source="tensorrt_llm/_torch/modules/fused_moe/interface.py",
    ),
    Requirement(
        key="unit-kv-scale",
        modules=(
            "tensorrt_llm._torch.attention_backend.trtllm",
            "tensorrt_llm._torch.attention.backends.trtllm",
        ),
        path="TrtllmAttention",
        mentions=("kv_scale",),
        optional=True,
        needed_for="KV scales that stay at 1: why build folds scales into the projections",
        source="tensorrt_llm/_torch/attention_backend/trtllm.py",
    ),
    Requirement(
        key="window-shares",
        modules=("tensorrt_llm._torch.pyexecutor.resource_manager",),
        path="KVCacheManager.calculate_max_num_blocks_for_vswa",
        mentions=("TRTLLM_WINDOW_SIZE_SHARES",),
        optional=True,
        needed_for="memory dealt out to the windows by need; without it in equal parts",
        source="tensorrt_llm/_torch/pyexecutor/resource_manager.py",
    ),
    Requirement(
        key="cache-heads",
        modules=("tensorrt_llm._torch.model_config",),
        path="ModelConfig.get_bindings_model_config",
        mentions=("enable_attention_dp",),
        optional=True,
        needed_for="KV heads counted whole under attention data parallelism (pull request 10330, January 2026). "
        "Without it the cache manager, given windows, asks for as many times its memory as there are ranks: in the "
        "llm_args.yaml of a built engine with `parallel: dep` divide free_gpu_memory_fraction by them, 0.85 becomes "
        "0.1 for 8",
        source="tensorrt_llm/_torch/model_config.py",
    ),
    Requirement(
        key="llm-api",
        modules=("tensorrt_llm.llmapi", "tensorrt_llm", "tensorrt_llm.llmapi.llm"),
        path="LLM",
        needed_for="what the Triton model and `create_llm` start",
        source="tensorrt_llm/llmapi/llm.py",
    ),
    Requirement(
        key="sampling-params",
        modules=("tensorrt_llm.llmapi", "tensorrt_llm", "tensorrt_llm.sampling_params"),
        path="SamplingParams",
        mentions=("max_tokens", "top_k", "top_p", "ignore_eos", "min_tokens", "stop_token_ids", "end_id"),
        needed_for="requests of the Triton model",
        source="tensorrt_llm/sampling_params.py",
    ),
)

_SERVE = "tensorrt_llm.commands.serve"
_BENCH = "tensorrt_llm.bench.benchmark.throughput"
COMMAND_LINES: tuple[Requirement, ...] = (
    Requirement(
        key="serve-flags",
        modules=(_SERVE,),
        path="",
        mentions=('"--backend"', '"--custom_module_dirs"', '"--extra_llm_api_options"'),
        lines=("1.2",),
        needed_for="launch/trtllm-serve.sh",
        source="tensorrt_llm/commands/serve.py",
    ),
    Requirement(
        key="serve-flags",
        modules=(_SERVE,),
        path="",
        mentions=('"--backend"', '"--custom_module_dirs"', '"--config"'),
        lines=("1.3", "late"),
        needed_for="launch/trtllm-serve.sh",
        source="tensorrt_llm/commands/serve.py",
    ),
    Requirement(
        key="bench-flags",
        modules=(_BENCH,),
        path="",
        mentions=('"--custom_module_dirs"', '"--extra_llm_api_options"', '"--dataset"', '"--concurrency"', '"--tp"'),
        lines=("1.2",),
        needed_for="launch/trtllm-bench.sh",
        source="tensorrt_llm/bench/benchmark/throughput.py",
    ),
    Requirement(
        key="bench-flags",
        modules=(_BENCH,),
        path="",
        mentions=('"--custom_module_dirs"', '"--config"', '"--dataset"', '"--concurrency"', '"--tp"'),
        lines=("1.3", "late"),
        needed_for="launch/trtllm-bench.sh",
        source="tensorrt_llm/bench/benchmark/throughput.py",
    ),
)
"""What the launch scripts rely on; the plugin does not."""
