"""abacus' dimensions, the child architecture that it is trained to survive, and its config.json.

Six layers: a short window on the even ones, full attention on the odd ones, as in gpt-oss. The child keeps layer 1
full (the one place that can look back at the problem from the end of a long check), turns layers 3 and 5 into long
windows, and drops experts from layer 2 on, more in late layers than in early ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from puzzle_trtllm.demo.training.vocabulary import PAD_ID, RETURN_ID, VOCAB_SIZE


@dataclass(frozen=True, kw_only=True)
class Dimensions:
    """Sizes of the model; D hidden, F intermediate, H heads, K kv heads, Dh head_dim, E experts, V vocabulary."""

    num_layers: int = 6
    hidden: int = 128
    intermediate: int = 128
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    num_experts: int = 8
    top_k: int = 2
    vocab_size: int = VOCAB_SIZE
    short_window: int = 16
    long_window: int = 80
    swiglu_limit: float = 7.0
    rms_norm_eps: float = 1e-5

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The parent's window of each layer; None is full attention."""
        return tuple(self.short_window if i % 2 == 0 else None for i in range(self.num_layers))

    @property
    def child_windows(self) -> tuple[int | None, ...]:
        """The child's window of each layer: full attention stays on layer 1 only."""
        return tuple(self.long_window if w is None and i != 1 else w for i, w in enumerate(self.windows))

    @property
    def child_experts(self) -> tuple[int, ...]:
        """How many experts the child keeps in each layer."""
        return (8, 8, 6, 6, 5, 4)

    def child_architecture(self) -> dict[str, object]:
        """The child architecture file: one entry a layer."""
        layers = zip(self.child_experts, self.child_windows, strict=True)
        return {"block_configs": [{"num_local_experts": n, "sliding_window": w} for n, w in layers]}

    def config(self) -> dict[str, object]:
        """config.json in the style of the released gpt-oss."""
        return {
            "architectures": ["GptOssForCausalLM"],
            "model_type": "gpt_oss",
            "attention_bias": True,
            "attention_dropout": 0.0,
            "dtype": "bfloat16",
            "eos_token_id": RETURN_ID,
            "experts_per_token": self.top_k,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initial_context_length": 256,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate,
            "layer_types": ["full_attention" if w is None else "sliding_attention" for w in self.windows],
            "max_position_embeddings": 512,
            "num_attention_heads": self.num_heads,
            "num_experts_per_tok": self.top_k,
            "num_hidden_layers": self.num_layers,
            "num_key_value_heads": self.num_kv_heads,
            "num_local_experts": self.num_experts,
            "output_router_logits": False,
            "pad_token_id": PAD_ID,
            "quantization_config": {
                "quant_method": "mxfp4",
                "modules_to_not_convert": [
                    "model.layers.*.self_attn",
                    "model.layers.*.mlp.router",
                    "model.embed_tokens",
                    "lm_head",
                ],
            },
            "rms_norm_eps": self.rms_norm_eps,
            "rope_scaling": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 2.0,
                "original_max_position_embeddings": 256,
                "rope_type": "yarn",
                "truncate": False,
            },
            "rope_theta": 10000,
            "router_aux_loss_coef": 0.9,
            "sliding_window": self.short_window,
            "swiglu_limit": self.swiglu_limit,
            "tie_word_embeddings": False,
            "use_cache": True,
            "vocab_size": self.vocab_size,
        }
