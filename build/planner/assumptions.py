"""Everything the planner takes for granted, each with its reason: change one and see what the answer depends on.

A plan is arithmetic on three things: the architecture (exact), the GPU's data sheet (sourced in gpus.yaml), and these.
None of them was fitted but `efficiency`, the one global factor between the roofline and what published runs reached.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

GIB = 2**30


def _assume(default: Any, reason: str) -> Any:
    return field(default=default, metadata={"reason": reason})


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Named values that no config file and no data sheet states."""

    efficiency: float = _assume(
        0.397,
        "measured over roofline: geometric mean over half of NVIDIA's published gpt-oss-120b rows (docs/planner.md)",
    )
    memory_rule: Literal["free", "total"] = _assume(
        "free",
        "TensorRT-LLM gives the KV cache a fraction of what is free after loading; vLLM: a fraction of all, less use",
    )
    memory_fraction: float = _assume(
        0.9, "default of TensorRT-LLM (free_gpu_memory_fraction) and, of all memory, of vLLM"
    )
    context_bytes: int = _assume(
        3 * GIB // 2,
        "CUDA context, NCCL and cuBLAS workspaces of one process; rounded up from what such processes hold",
    )
    graph_bytes: int = _assume(GIB, "CUDA graphs of the decode batch sizes; an order of magnitude, it varies with them")
    max_num_tokens: int = _assume(8192, "TensorRT-LLM's default: tokens a step; sizes activations and prompt chunks")
    max_batch_size: int = _assume(2048, "TensorRT-LLM's default; per GPU under attention data parallelism")
    trtllm_tokens_per_block: int = _assume(32, "TensorRT-LLM's default")
    vllm_tokens_per_block: int = _assume(16, "vLLM's default, and what both allocator logs fit")
    vllm_tokens_in_flight: int = _assume(16384, "max_num_batched_tokens of both allocator logs")
    expert_imbalance: float = _assume(
        1.0, "expert traffic of the busiest GPU over the mean: balanced; trained routers are not quite"
    )
    distinct_expert_factor: float = _assume(
        1.0, "distinct experts touched over what a uniform router touches; a skewed router touches fewer"
    )
    collective_latency_us: float = _assume(
        10.0, "one small collective inside a node with one-shot kernels; larger over PCIe"
    )
    launch_us_per_layer: float = _assume(20.0, "about 10 kernels a layer, 2 us apart, replayed from a CUDA graph")
    prefill_overlap: float = _assume(
        0.0, "share of prompt processing hidden behind decoding: none; chunks ride along but kernels run in turn"
    )


class Stated(NamedTuple):
    """One assumption as `--explain` shows it."""

    name: str
    value: Any
    reason: str


def explain_assumptions(assumptions: Assumptions) -> Iterator[Stated]:
    """Every field with its value and reason; a reason speaks of the default, so a changed value says so."""
    for item in fields(assumptions):
        value, reason = getattr(assumptions, item.name), str(item.metadata["reason"])
        yield Stated(item.name, value, reason if value == item.default else f"given (default {item.default}: {reason})")
