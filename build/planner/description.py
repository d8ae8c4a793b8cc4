"""A plan in plain values, for JSON and for tables: units in the names, nothing computed twice."""

from __future__ import annotations

from typing import Any, NamedTuple

from puzzle_trtllm.build.planner.allocators import tuned_shares
from puzzle_trtllm.build.planner.assumptions import explain_assumptions
from puzzle_trtllm.build.planner.planning import Plan
from puzzle_trtllm.build.planner.roofline import Setup
from puzzle_trtllm.build.planner.routing import expected_distinct_experts
from puzzle_trtllm.build.planner.throughput import Estimate, Load


def plan_json(p: Plan) -> dict[str, Any]:
    """Plan as plain values; units in the names."""
    setup, weights, replicas = p.setup, p.memory.weights, p.setup.layout.num_replicas
    shares = tuned_shares(setup.kv, p.memory.kv_pool, p.load.sequence_tokens, setup.assumptions)
    return {
        "gpu": setup.gpu.name,
        "num_gpus": setup.layout.num_gpus,
        "layout": setup.layout.name,
        "num_replicas": replicas,
        "isl": p.load.isl,
        "osl": p.load.osl,
        "kv_dtype": setup.kv_dtype,
        "allocator": p.allocator,
        "weight_bytes_per_gpu": weights.total,
        "expert_bytes_per_gpu": weights.experts,
        "activation_bytes_per_gpu": p.memory.activations,
        "graph_bytes_per_gpu": p.memory.graphs,
        "context_bytes_per_gpu": p.memory.context,
        "kv_pool_bytes_per_gpu": p.memory.kv_pool,
        "kv_bytes_per_sequence": setup.architecture.kv_bytes_per_sequence(p.load.sequence_tokens, setup.kv_dtype),
        "kv_by_window": [row._asdict() for row in kv_by_window(setup, p.load)],
        "distinct_experts": {str(count): woken for count, woken in distinct_experts(p).items()},
        "max_sequences": {name: p.sequences(name) for name in p.capacities},
        "trtllm_window_size_shares": {str(window): share for window, share in shares.items()},
        "best_batch": p.num_in_flight,
        "knee_batch": None if p.knee is None else p.knee.batch * replicas,
        "decode_step_ms": p.best.decode_step_s * 1e3,
        "prefill_ms_per_request": p.best.prefill_s_per_request * 1e3,
        "prefill_bound": p.best.prefill_bound,
        "output_tokens_per_s": p.tokens_per_s,
        "output_tokens_per_s_per_gpu": p.tokens_per_s_per_gpu,
        "roofline_tokens_per_s": p.best.roofline_tokens_per_s * replicas,
        "bound": p.best.bound,
        "is_capacity_bound": p.is_capacity_bound,
        "time_share": time_shares(p.best),
        "alternatives": dict(p.alternatives),
        "assumptions": {s.name: {"value": s.value, "reason": s.reason} for s in explain_assumptions(setup.assumptions)},
    }


class KvRow(NamedTuple):
    """The layers of one window."""

    window: int | None
    layers: int
    tokens_kept: int
    """Of a finished sequence."""
    bytes_per_layer: int
    """All GPUs of the sequence together."""


def kv_by_window(setup: Setup, load: Load) -> tuple[KvRow, ...]:
    """KV bytes of one finished sequence by window; layers x bytes_per_layer adds up to kv_bytes_per_sequence."""
    per_token = setup.architecture.kv_bytes_per_token_and_layer(setup.kv_dtype)
    kept = {
        window: min(window or load.sequence_tokens, load.sequence_tokens) for window, _ in setup.kv.layers_by_window
    }
    return tuple(
        KvRow(window=window, layers=layers, tokens_kept=kept[window], bytes_per_layer=kept[window] * per_token)
        for window, layers in setup.kv.layers_by_window
    )


def distinct_experts(p: Plan) -> dict[int, float]:
    """Experts that a decode step of the best batch wakes in a layer, by the layer's expert count."""
    a = p.setup.architecture
    return {
        block.num_local_experts: expected_distinct_experts(block.num_local_experts, a.experts_per_token, p.best.batch)
        for block, _ in p.setup.layers_by_block
    }


def time_shares(e: Estimate) -> dict[str, float]:
    """Share of a request's time by resource, largest first."""
    total = sum(e.seconds_per_request.values())
    ranked = sorted(e.seconds_per_request.items(), key=lambda item: -item[1])
    return {name: seconds / total for name, seconds in ranked if seconds}
