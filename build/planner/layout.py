"""How a model is dealt out over GPUs.

    tpN    one replica on N GPUs: attention heads and vocabulary are split, and every GPU sees every token
    depN   one replica on N GPUs: attention is whole on every GPU, each with sequences of its own (attention data
           parallelism); better throughput, because no KV head is ever shared or repeated

In both, the experts of every layer are dealt out evenly (expert parallelism): gpt-oss's expert width 2880 is 90 MXFP4
blocks of 32, which 4 and 8 GPUs cannot cut, so "tp8" means TP8 attention with EP8 experts. With more GPUs than N there
are several replicas. The smallest layer limits N: 64 experts cannot be dealt to 128 GPUs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Literal

from puzzle_trtllm.architecture import PuzzleArchitecture
from puzzle_trtllm.build.parallelism import check_kv_heads, check_parallelism
from puzzle_trtllm.engine import EngineConfig
from puzzle_trtllm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Layout:
    """GPUs of one replica, and how many replicas."""

    kind: Literal["tp", "dep"]
    gpus_per_replica: int
    num_replicas: int = 1

    @property
    def name(self) -> str:
        """`tp8`, or `4 x dep2` when there are several replicas."""
        one = f"{self.kind}{self.gpus_per_replica}"
        return one if self.num_replicas == 1 else f"{self.num_replicas} x {one}"

    @property
    def num_gpus(self) -> int:
        return self.gpus_per_replica * self.num_replicas

    @property
    def attention_split(self) -> int:
        """GPUs that share the attention of one sequence."""
        return self.gpus_per_replica if self.kind == "tp" else 1

    @property
    def sequence_split(self) -> int:
        """GPUs that sequences are dealt out to."""
        return self.gpus_per_replica if self.kind == "dep" else 1

    def kv_heads_per_gpu(self, architecture: PuzzleArchitecture) -> int:
        """KV heads on one GPU; with more GPUs than heads each holds a copy of one."""
        return max(1, architecture.num_key_value_heads // self.attention_split)


def parse_layout(name: str, num_gpus: int, architecture: PuzzleArchitecture) -> Layout:
    """`tp8`, `dep4`, ... on `num_gpus`. Raises ConfigError for another word, or ranks that the model cannot have."""
    replica = parse_replica(name)
    size = replica.gpus_per_replica
    if num_gpus % size:
        raise ConfigError(
            "does not divide the GPUs",
            key="parallel",
            found=f"{name} on {num_gpus}",
            expected=f"{size} GPUs or a multiple (--gpus), or another layout",
        )
    layout = replace(replica, num_replicas=num_gpus // size)
    _check(layout, architecture)
    return layout


def parse_replica(name: str) -> Layout:
    """`tp8`, `dep4`, ... as one replica, whatever the model. Raises ConfigError for another word."""
    match = re.fullmatch(r"(tp|dep)([1-9]\d*)", name)
    if match is None:
        raise ConfigError("unknown layout", key="parallel", found=name, expected="tpN or depN, such as tp8 or dep8")
    return Layout(kind="tp" if match[1] == "tp" else "dep", gpus_per_replica=int(match[2]))


def possible_layouts(num_gpus: int, architecture: PuzzleArchitecture) -> tuple[Layout, ...]:
    """Every layout on powers of two (and on all GPUs) that `build` takes; dep1 is tp1.

    KV heads that are repeated, as other engines do, are planned only when they are asked for by name.
    """
    sizes = sorted({1 << power for power in range(num_gpus.bit_length())} | {num_gpus})
    names = [
        f"{kind}{size}"
        for size in sizes
        if num_gpus % size == 0
        for kind in ("tp", "dep")
        if kind + str(size) != "dep1"
    ]
    found = []
    for name in names:
        try:
            layout = parse_layout(name, num_gpus, architecture)
            check_kv_heads(architecture, _llm_args(layout), file=name)
            found.append(layout)
        except ConfigError:
            continue
    return tuple(found)


def _check(layout: Layout, architecture: PuzzleArchitecture) -> None:
    size = layout.gpus_per_replica
    config = EngineConfig(runtime="tensorrt_llm", num_gpus=size, parallel=layout.kind)
    check_parallelism(architecture, config, _llm_args(layout), file=f"{layout.kind}{size}")


def _llm_args(layout: Layout) -> dict[str, Any]:
    size = layout.gpus_per_replica
    return {
        "tensor_parallel_size": size,
        "moe_expert_parallel_size": size,
        "enable_attention_dp": layout.kind == "dep",
    }
