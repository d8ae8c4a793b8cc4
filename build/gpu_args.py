"""What the GPU decides: the kernels of the experts, how many sequences fit, and what follows from their number.

`moe_config.backend: AUTO` knows only the architecture name GptOssForCausalLM; any other name silently gets CUTLASS. So
the backend is always said. On Hopper it is TRITON, whose experts are dealt out whole (expert parallelism): "TP8" there
means tensor_parallel_size 8 with moe_expert_parallel_size 8, and the expert width of 2880 is 90 MXFP4 blocks, which 4
or 8 GPUs cannot cut anyway. On Blackwell it is TRTLLM.

Memory: the planner's arithmetic (puzzle_trtllm.build.planner). A plan leaves room for the logits of TensorRT-LLM's
default batch of 2,048, 1.5 GiB; an engine gets a batch limit of its own, so it may hold a sequence more than planned.
"""

from __future__ import annotations

from dataclasses import dataclass

from puzzle_trtllm.architecture import PuzzleArchitecture
from puzzle_trtllm.build.derived_values import Values
from puzzle_trtllm.build.planner.assumptions import Assumptions
from puzzle_trtllm.build.planner.kv_cache import KvGeometry
from puzzle_trtllm.build.planner.layout import Layout
from puzzle_trtllm.build.planner.memory import plan_memory
from puzzle_trtllm.build.window_shares import V1Load, held_tokens
from puzzle_trtllm.engine import EngineConfig
from puzzle_trtllm.errors import ConfigError
from puzzle_trtllm.gpus import Gpu, load_gpu
from puzzle_trtllm.scenario import Scenario

MOE_BACKENDS = (
    (("h100", "h200"), "TRITON", "Hopper: the Triton kernels multiply MXFP4 experts, dealt out whole"),
    (("b200", "b300", "gb200", "gb300"), "TRTLLM", "Blackwell: TensorRT-LLM's own MXFP4 kernels"),
)
"""By the beginning of a GPU's name."""
OTHER_BACKEND = ("CUTLASS", "the only one left for this GPU; unverified with gpt-oss there")
FREE_FRACTION = {"tp": 0.9, "dep": 0.85}
"""dep: gathered tokens of all ranks need room beside the cache; NVIDIA's own 8-GPU configs say 0.85."""
CAPACITY_POLICY = "GUARANTEED_NO_EVICT"
DEFAULT_TOKENS_PER_BLOCK = 32
MAX_SEQUENCES = 1024
SMOOTH_STREAMS = 32
STREAM_INTERVAL = 10


@dataclass(frozen=True, kw_only=True)
class Room:
    """What one GPU has for sequences."""

    gpu: Gpu
    pool_bytes: int
    sequence_bytes: int
    """KV bytes that one sequence is counted with on one GPU, in whole blocks."""
    num_sequences: int
    shares: list[float]
    """Of the pool, by ascending window."""
    num_ranks: int
    """GPUs that sequences are dealt out to: all under dep, else 1."""


def the_gpu(config: EngineConfig, file: str) -> Gpu:
    """The engine config's GPU. Raises ConfigError when it names none, or one that is not in the table."""
    if config.gpu is None:
        raise ConfigError(
            "missing key: memory and the expert kernels depend on it",
            file=file,
            key="gpu",
            expected="such as h100-80gb",
        )
    try:
        return load_gpu(config.gpu)
    except ConfigError as error:
        raise ConfigError(str(error), file=file) from None


def moe_backend(gpu: Gpu) -> tuple[str, str]:
    """(backend, reason)."""
    for prefixes, backend, reason in MOE_BACKENDS:
        if gpu.name.startswith(prefixes):
            return backend, reason
    return OTHER_BACKEND


def find_room(
    architecture: PuzzleArchitecture,
    config: EngineConfig,
    values: Values,
    scenario: Scenario,
    *,
    max_num_tokens: int,
    file: str,
) -> Room:
    """How many sequences of max_seq_len one GPU holds. Raises ConfigError when it holds none."""
    gpu = the_gpu(config, file)
    size = int(values.get("tensor_parallel_size"))
    layout = Layout(kind=config.parallel, gpus_per_replica=size)
    fraction = values.get("kv_cache_config.free_gpu_memory_fraction") or FREE_FRACTION[config.parallel]
    assumptions = Assumptions(memory_fraction=fraction, max_num_tokens=max_num_tokens, max_batch_size=128)
    memory = plan_memory(architecture, gpu, layout, assumptions)
    pool, limit, remedy = memory.kv_pool, "num_gpus", "more GPUs"
    if config.memory_bytes is not None and config.memory_bytes - memory.weights.total < pool:
        pool, limit, remedy = max(0, config.memory_bytes - memory.weights.total), "memory_bytes", "more memory_bytes"
    load = _v1_load(architecture, values, scenario, max_num_tokens)
    kv = KvGeometry.of(architecture, config.kv_dtype, layout)
    block_bytes = load.tokens_per_block * kv.bytes_per_token_and_layer
    shares = load.shares(pool // block_bytes)
    num_sequences = load.sequences(pool // block_bytes, shares)
    if num_sequences == 0:
        needed = sum(layers * load.needed(window, 1) for window, layers in load.layers.items()) * block_bytes
        smaller = "" if config.kv_dtype == "fp8" else ", kv_dtype fp8"
        raise ConfigError(
            f"{size} x {gpu.name} cannot hold one sequence of {values.get('max_seq_len')} tokens",
            file=file,
            key=limit,
            found=f"{pool / 2**30:.1f} GiB for the KV cache beside {memory.weights.total / 2**30:.1f} GiB of weights",
            expected=f"at least {needed / 2**30:.2f} GiB: {remedy}{smaller}, or shorter sequences",
        )
    return Room(
        gpu=gpu,
        pool_bytes=pool,
        sequence_bytes=sum(layers * load.reserved(window) for window, layers in load.layers.items()) * block_bytes,
        num_sequences=num_sequences,
        shares=shares,
        num_ranks=layout.sequence_split,
    )


def batch_size(room: Room) -> tuple[int, str]:
    """max_batch_size and why; under attention data parallelism it counts for one rank."""
    held = f"{room.pool_bytes / 2**30:.1f} GiB for the KV cache / {room.sequence_bytes / 2**30:.3f} GiB a sequence"
    held += f" on each {room.gpu.name}"
    if len(room.shares) > 1:
        held += ", beside prompts laid out whole in window layers"
    if room.num_sequences > MAX_SEQUENCES:
        return MAX_SEQUENCES, f"more would fit ({held}), but CUDA graphs of larger batches take memory too"
    return room.num_sequences, f"what fits: {held}"


def put_gpu_args(values: Values, scenario: Scenario, room: Room) -> None:
    """Kernels, CUDA graphs and streaming."""
    backend, reason = moe_backend(room.gpu)
    values.put("moe_config.backend", backend, reason)
    values.put("attn_backend", "TRTLLM", "the backend that knows gpt-oss's attention sinks")
    batch = int(values.get("max_batch_size"))
    if not values.is_overridden("cuda_graph_config"):
        values.put("cuda_graph_config.batch_sizes", graph_sizes(batch), f"small steps up to max_batch_size, {batch}")
        values.put(
            "cuda_graph_config.enable_padding", True, "a batch between two sizes runs padded, not without a graph"
        )
    streams = scenario.concurrency
    if streams > SMOOTH_STREAMS:
        reason = f"scenario {scenario.name}: {streams} streams; a message for every token would keep the host busier"
        reason += " than the GPU"
        values.put("stream_interval", STREAM_INTERVAL, reason)
    else:
        values.put("stream_interval", 1, f"scenario {scenario.name}: {streams} streams, every token at once")


def graph_sizes(max_batch_size: int) -> list[int]:
    """1, 2, 4, then steps of 8 to 128 and of 64 beyond; the last is the batch limit itself."""
    sizes = [1, 2, 4, *range(8, 129, 8), *range(192, max(193, max_batch_size), 64)]
    return [*(size for size in sizes if size < max_batch_size), max_batch_size]


def _v1_load(a: PuzzleArchitecture, values: Values, scenario: Scenario, max_num_tokens: int) -> V1Load:
    """The scenario's sequences, as TensorRT-LLM's V1 manager will count them."""
    longest: int = values.get("max_seq_len")
    policy = values.get("scheduler_config.capacity_scheduler_policy", CAPACITY_POLICY)
    windows = values.get("kv_cache_config.max_attention_window")
    return V1Load(
        windows=tuple(min(window or longest, longest) for window in windows or (b.sliding_window for b in a.blocks)),
        longest=longest,
        held=min(held_tokens(scenario.input_tokens, scenario.output_tokens, policy), longest),
        chunk=max_num_tokens,
        tokens_per_block=values.get("kv_cache_config.tokens_per_block") or DEFAULT_TOKENS_PER_BLOCK,
        evicts=policy != CAPACITY_POLICY,
    )
