"""What others have published, as data, to hold the planner against. Nothing in here comes from the planner.

- BYTES: the checkpoints' sizes and parameter counts (NVIDIA's model card, OpenAI's gpt-oss-120b).
- ALLOCATOR_LOGS: two public vLLM logs, RTX PRO 6000 96 GB, FP8 KV, 131,072 tokens a request.
- THROUGHPUTS: NVIDIA's table for gpt-oss-120b (TensorRT-LLM, trtllm-bench at maximum load), output tok/s a GPU. The KV
  dtype of those runs is not printed; NVIDIA's guidance is FP8 on Blackwell and "auto" (BF16) on Hopper, assumed here.
- SPEEDUPS: the paper's (arXiv 2602.11937) child over parent. Not published: batch, engine settings, layout, and the
  parent's KV dtype. The abstract's 2.82x names no length; 64K/64K and the 2.44x beside it are from a secondary report.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from puzzle_trtllm.architecture import KvDtype
from puzzle_trtllm.build.planner.assumptions import Assumptions
from puzzle_trtllm.build.planner.throughput import Load


@dataclass(frozen=True, kw_only=True)
class AllocatorLog:
    """What a vLLM server printed at start."""

    model: Literal["parent", "child"]
    pool_gib: float
    """"Available KV cache memory", printed with two decimals."""
    num_tokens: int
    """"GPU KV cache size"."""
    concurrency: float
    """"Maximum concurrency" for 131,072 tokens a request, printed with two decimals."""


ALLOCATOR_LOGS = (
    AllocatorLog(model="child", pool_gib=38.72, num_tokens=2_819_653, concurrency=21.51),
    AllocatorLog(model="parent", pool_gib=16.57, num_tokens=857_331, concurrency=6.54),
)
LOG_SEQUENCE_TOKENS = 131_072


@dataclass(frozen=True, kw_only=True)
class PublishedBytes:
    """One published size and what it is of."""

    model: Literal["parent", "child"]
    what: Literal["weights GiB", "parameters B", "parameters with scales B", "active parameters B"]
    printed: str


BYTES = (
    PublishedBytes(model="parent", what="weights GiB", printed="60.77"),
    PublishedBytes(model="child", what="weights GiB", printed="46.56"),
    PublishedBytes(model="parent", what="parameters B", printed="116.83"),
    PublishedBytes(model="child", what="parameters B", printed="88.15"),
    PublishedBytes(model="child", what="parameters with scales B", printed="90.84"),
    PublishedBytes(model="parent", what="active parameters B", printed="5.13"),
    PublishedBytes(model="child", what="active parameters B", printed="5.13"),
)


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """One published row of the parent."""

    gpu: str
    layout: str
    load: Load
    kv_dtype: KvDtype
    """Assumed, not printed."""
    tokens_per_s_per_gpu: float


def _rows(isl: int, osl: int, **by_gpu: float) -> tuple[Throughput, ...]:
    load = Load(isl=isl, osl=osl)
    setups: dict[str, tuple[str, str, KvDtype]] = {
        "h100": ("h100-80gb", "dep4", "bf16"),
        "h200": ("h200-141gb", "tp1", "bf16"),
        "b200": ("b200-180gb", "dep2", "fp8"),
    }
    return tuple(
        Throughput(
            gpu=setups[name][0],
            layout=setups[name][1],
            load=load,
            kv_dtype=setups[name][2],
            tokens_per_s_per_gpu=rate,
        )
        for name, rate in by_gpu.items()
    )


THROUGHPUTS = (
    *_rows(1024, 1024, h100=4715, h200=6798, b200=25870),
    *_rows(8192, 1024, h100=1169, h200=1828, b200=6111),
    *_rows(32768, 1024, h100=333, h200=519, b200=1392),
    *_rows(1024, 32768, h100=1177, b200=6279),
)
"""In the order of the published table. The efficiency is fitted on the 1st, 3rd, 5th, ... row; the others test it."""

PUBLISHED_CONFIG = Assumptions(max_batch_size=720, max_num_tokens=16384)
"""From NVIDIA's throughput config for gpt-oss-120b (tp2 ep2 attention_dp); assumed for every row."""


@dataclass(frozen=True, kw_only=True)
class Speedup:
    """One headline of the paper: the child's tok/s over the parent's."""

    name: str
    num_gpus: int
    load: Load
    ratio: float
    note: str = ""


SPEEDUPS = (
    Speedup(name="8 x H100, 64K/64K", num_gpus=8, load=Load(isl=65536, osl=65536), ratio=1.63),
    Speedup(name="8 x H100, 4K/4K", num_gpus=8, load=Load(isl=4096, osl=4096), ratio=1.22),
    Speedup(
        name="1 x H100, 64K/64K",
        num_gpus=1,
        load=Load(isl=65536, osl=65536),
        ratio=2.82,
        note="the abstract names no length for 2.82x; a secondary report says long context",
    ),
    Speedup(
        name="1 x H100, 4K/4K",
        num_gpus=1,
        load=Load(isl=4096, osl=4096),
        ratio=2.44,
        note="2.44x is from that secondary report, not from the paper's abstract",
    ),
)
SPEEDUP_GPU = "h100-80gb"
