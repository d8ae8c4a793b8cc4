"""From LLM arguments to a running engine core: device, dtypes, and how the memory is divided.

`dtype: auto` computes in bfloat16 where the processor has instructions for it (AVX512-BF16 or AMX) and in float32
elsewhere; the weights are the same bytes either way. The KV cache of `dtype: auto` is BF16, as the checkpoint's; an
explicit `dtype: float32` makes the cache float32 too (for exactness tests).
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch

from puzzle_trtllm.architecture import PuzzleArchitecture
from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.errors import EngineError
from puzzle_trtllm.free_memory import free_memory_bytes
from puzzle_trtllm.kv_layout import KvLayout, plan_layout
from puzzle_trtllm.models.reference.decode_graphs import DecodeGraphs, cuda_recorder, default_batch_sizes
from puzzle_trtllm.models.reference.dummy import DummyCheckpoint
from puzzle_trtllm.models.reference.kernels import Kernels
from puzzle_trtllm.models.reference.kernels.choice import choose_kernels, compute_dtype, explain_compute_dtype
from puzzle_trtllm.models.reference.kv_cache import PagedKvCache
from puzzle_trtllm.models.reference.model import ReferenceModel
from puzzle_trtllm.models.reference.rank_group import ALONE, Ranks
from puzzle_trtllm.models.reference.weights import WeightLoader
from puzzle_trtllm.serve.runtimes.reference.arguments import EngineArguments
from puzzle_trtllm.serve.runtimes.reference.engine import ReferenceEngine
from puzzle_trtllm.serve.runtimes.reference.scheduler import Scheduler
from puzzle_trtllm.sharding import Shard, count_shard_bytes

MAX_DEQUANTIZED_BYTES = 1 << 30
"""The torch kernels hold experts dequantized up to this many bytes, because expanding them every step costs more than
it saves; those of larger models stay MXFP4 and are expanded as they are used. Native kernels read MXFP4 as it is."""

SINGLE_THREAD_BYTES = 16 << 20
"""Models that hold less than this run on one thread: their operations are too short to be worth sharing, and a spinning
second thread would take the core that the server and its clients need."""

_log = logging.getLogger(__name__)


def load_engine(arguments: EngineArguments, ranks: Ranks = ALONE) -> tuple[ReferenceEngine, dict[str, Any]]:
    """Load the serving copy, or this rank's part, and make an engine. Raises PuzzleError in one line.

    Gives with it the facts that were chosen: device, dtypes, blocks of each pool, bytes held, and each rank's.
    """
    architecture = PuzzleArchitecture.from_path(arguments.model)
    shard = Shard(architecture=architecture, parallelism=arguments.parallelism, rank=ranks.rank)
    device = _choose_device(ranks)
    dtype = compute_dtype(arguments.dtype, device)
    max_seq_len = arguments.max_seq_len
    dequantize = _dequantized_bytes(architecture, dtype) <= MAX_DEQUANTIZED_BYTES
    dummy = arguments.load_format == "dummy"
    checkpoint = DummyCheckpoint(architecture, device) if dummy else Checkpoint.open(Path(arguments.model))
    kernels = choose_kernels(arguments.kernels, device, dequantize_experts=dequantize)
    weights = WeightLoader(checkpoint=checkpoint, dtype=dtype, device=device, kernels=kernels, shard=shard).load()
    is_small = device.type == "cpu" and weights.num_bytes < SINGLE_THREAD_BYTES
    torch.set_num_threads(1 if is_small else max(1, torch.get_num_threads() // ranks.local_size))
    layout = _plan_cache(arguments, shard.local, device, ranks)
    cache = PagedKvCache(layout, device, reuse=arguments.kv_cache_config.enable_block_reuse)
    model = ReferenceModel(weights, kernels, max_seq_len=max_seq_len, ranks=ranks)
    graph_sizes = _graph_batch_sizes(arguments, architecture, kernels, ranks)
    recorded = None
    if graph_sizes:
        recorded = DecodeGraphs(model, cache, batch_sizes=graph_sizes, record=cuda_recorder())
    facts = {
        "rank": ranks.rank,
        "pid": os.getpid(),
        "device": str(device),
        "compute_dtype": explain_compute_dtype(arguments.dtype, device),
        "kernels": kernels.name,
        "cuda_graph_batch_sizes": graph_sizes,
        "num_threads": torch.get_num_threads(),
        "query_heads": shard.local.num_attention_heads,
        "kv_heads": shard.local.num_key_value_heads,
        "experts": [len(layer.held_experts) for layer in weights.layers],
        "expert_width": shard.local.intermediate_size,
        "checkpoint_weight_bytes": count_shard_bytes(shard),
        "held_weight_bytes": weights.num_bytes,
        "kv_dtype": str(layout.dtype).removeprefix("torch."),
        "max_seq_len": max_seq_len,
        "num_blocks": {str(window): count for window, count in layout.num_blocks.items()},
        "kv_cache_bytes": layout.num_bytes,
    }
    _log.info("engine ready: %s", ", ".join(f"{key}={value}" for key, value in facts.items()))
    scheduler = Scheduler(cache, max_batch_size=arguments.max_batch_size, max_num_tokens=arguments.max_num_tokens)
    return ReferenceEngine(recorded or model, scheduler, ranks), {**facts, "ranks": ranks.collect(facts)}


def _choose_device(ranks: Ranks) -> torch.device:
    """A GPU of this rank's own, or the CPU. Raises EngineError when there are GPUs, but too few."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if torch.cuda.device_count() < ranks.local_size:
        found, expected = ranks.local_size, torch.cuda.device_count()
        raise EngineError("more ranks than GPUs", key="tensor_parallel_size", found=found, expected=expected)
    torch.cuda.set_device(ranks.local_rank)
    return torch.device("cuda", ranks.local_rank)


def _graph_batch_sizes(
    arguments: EngineArguments, architecture: PuzzleArchitecture, kernels: Kernels, ranks: Ranks
) -> list[int]:
    """Decode batches to record. Only steps that never wait for the GPU can be: Triton's kernels, MXFP4 experts, one
    rank."""
    config, most = arguments.cuda_graph_config, arguments.max_batch_size
    if config is None or kernels.name != "triton" or architecture.experts_format != "mxfp4" or ranks.size > 1:
        return []
    sizes = config.get("batch_sizes") or default_batch_sizes(min(config.get("max_batch_size") or most, most))
    return sorted({min(size, most) for size in sizes})


def _plan_cache(
    arguments: EngineArguments, architecture: PuzzleArchitecture, device: torch.device, ranks: Ranks
) -> KvLayout:
    """The same number of blocks on every rank, each with its own KV heads."""
    kv, max_seq_len = arguments.kv_cache_config, arguments.max_seq_len
    if kv.dtype not in ("auto", "fp8"):
        raise EngineError("unknown", key="kv_cache_config.dtype", found=kv.dtype, expected="auto or fp8")
    given = kv.max_attention_window or [max_seq_len]
    for i, block in enumerate(architecture.blocks):
        found, needed = given[i % len(given)], min(block.sliding_window or max_seq_len, max_seq_len)
        if found < needed:
            key = f"kv_cache_config.max_attention_window[{i}]"
            raise EngineError("smaller than the model's window", key=key, found=found, expected=f"at least {needed}")
    uncompressed = torch.float32 if arguments.dtype == "float32" else torch.bfloat16
    budget = kv.max_gpu_total_bytes or int(kv.free_gpu_memory_fraction * _free_bytes(device, ranks))
    layout = plan_layout(
        architecture,
        tokens_per_block=kv.tokens_per_block,
        dtype=torch.float8_e4m3fn if kv.dtype == "fp8" else uncompressed,
        budget_bytes=budget,
        sequence_tokens=max_seq_len,
        max_sequences=arguments.max_batch_size,
        reuse=kv.enable_block_reuse,
    )
    if min(layout.num_blocks.values()) == 0:
        raise EngineError(
            f"too small for one sequence of {max_seq_len} tokens",
            key="kv_cache_config.max_gpu_total_bytes",
            found=f"{budget} bytes",
        )
    return layout


def _dequantized_bytes(architecture: PuzzleArchitecture, dtype: torch.dtype) -> int:
    experts = sum(block.num_local_experts for block in architecture.blocks)
    return experts * 3 * architecture.hidden_size * architecture.intermediate_size * dtype.itemsize


def _free_bytes(device: torch.device, ranks: Ranks) -> int:
    """Of a GPU, or this rank's share of the machine's memory; the least of all ranks, once all hold their weights."""
    ranks.collect(None)
    if device.type == "cuda":
        free = int(torch.cuda.mem_get_info(device)[0])
    else:
        free = (free_memory_bytes() or 0) // ranks.local_size
    return min(ranks.collect(free))
