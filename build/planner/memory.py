"""What is left of a GPU for the KV cache: memory - context - weights - activations - CUDA graphs, times a fraction.

Two rules exist. TensorRT-LLM takes a fraction of what is FREE once the model is loaded; vLLM takes a fraction of ALL
memory and subtracts what is used. On eight GPUs they nearly agree. On one 80 GB GPU, where the parent's 61 GiB leave
little, the second rule leaves it half of what the first does, and with it half the speedup of the child is decided.
"""

from __future__ import annotations

from dataclasses import dataclass

from puzzle_trtllm.architecture import PuzzleArchitecture
from puzzle_trtllm.build.planner.assumptions import Assumptions
from puzzle_trtllm.build.planner.layout import Layout
from puzzle_trtllm.build.planner.weights import SplitBy, WeightBytes, weights_per_gpu
from puzzle_trtllm.gpus import Gpu
from puzzle_trtllm.tensors import DTYPE_BYTES

BF16_BYTES = DTYPE_BYTES["BF16"]
LOGIT_BYTES = DTYPE_BYTES["F32"]
"""Logits are sampled in float32."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """One GPU's memory, bytes."""

    total: int
    context: int
    weights: WeightBytes
    activations: int
    graphs: int
    kv_pool: int
    """What the KV cache gets; 0 when nothing is left."""

    @property
    def unused(self) -> int:
        """Kept back by the memory rule; negative when the model does not fit at all."""
        return self.total - self.context - self.weights.total - self.activations - self.graphs - self.kv_pool


def plan_memory(
    architecture: PuzzleArchitecture,
    gpu: Gpu,
    layout: Layout,
    assumptions: Assumptions,
    whole: dict[SplitBy, int] | None = None,
) -> MemoryPlan:
    """Memory of one GPU under `layout`; `whole` as in `weights_per_gpu`."""
    weights = weights_per_gpu(architecture, layout, whole)
    activations = activation_bytes(architecture, layout, assumptions)
    used = assumptions.context_bytes + weights.total + activations + assumptions.graph_bytes
    if assumptions.memory_rule == "free":
        pool = assumptions.memory_fraction * (gpu.memory_bytes - used)
    else:
        pool = assumptions.memory_fraction * gpu.memory_bytes - used
    return MemoryPlan(
        total=gpu.memory_bytes,
        context=assumptions.context_bytes,
        weights=weights,
        activations=activations,
        graphs=assumptions.graph_bytes,
        kv_pool=max(0, int(pool)),
    )


def activation_bytes(a: PuzzleArchitecture, layout: Layout, assumptions: Assumptions) -> int:
    """The largest moment of a step: inside a layer's experts with a full step of tokens, or at the logits.

    Experts, BF16, a token: residual and normed input, and for each of its k experts gate and up (2F), their product (F)
    and the output (D). Under depN the inputs of all ranks are gathered; of their experts each GPU computes its part.
    Logits, float32: one row of the vocabulary (its part, under tpN) for every sequence of a full batch.
    """
    gathered = (layout.sequence_split - 1) * a.hidden_size
    experts = a.experts_per_token * (3 * a.intermediate_size + a.hidden_size)
    per_token = BF16_BYTES * (2 * a.hidden_size + gathered + experts)
    vocabulary = a.vocab_size // layout.attention_split
    rows = min(assumptions.max_batch_size, assumptions.max_num_tokens)
    return max(assumptions.max_num_tokens * per_token, rows * vocabulary * LOGIT_BYTES)
