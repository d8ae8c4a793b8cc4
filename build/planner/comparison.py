"""Where a child pays: its speedup over the parent for every GPU setup and every load, as one heat map.

A cell is (child's expected output tok/s) / (parent's), each with the best layout it can have there, or the one given.
The efficiency factor cancels; what does not are the KV dtypes (stated for both), the allocator and the memory rule.
Cells where the parent does not fit, or neither does, say so instead of a number: "only the child fits" is the
strongest answer of all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from puzzle_trtllm.architecture import KvDtype, PuzzleArchitecture
from puzzle_trtllm.build.planner.allocators import DEFAULT_ALLOCATOR
from puzzle_trtllm.build.planner.assumptions import Assumptions
from puzzle_trtllm.build.planner.layout import parse_replica
from puzzle_trtllm.build.planner.planning import NoRoomError, Plan, plan
from puzzle_trtllm.build.planner.throughput import Load
from puzzle_trtllm.errors import ConfigError
from puzzle_trtllm.gpus import Gpu

DEFAULT_LOADS = (
    Load(isl=1024, osl=1024),
    Load(isl=4096, osl=4096),
    Load(isl=32768, osl=1024),
    Load(isl=1024, osl=32768),
    Load(isl=65536, osl=65536),
)
DEFAULT_NUM_GPUS = (1, 8)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One setup under one load."""

    gpu: str
    num_gpus: int
    load: Load
    child: Plan | None
    parent: Plan | None

    @property
    def speedup(self) -> float | None:
        """Child over parent in expected output tok/s; None unless both fit."""
        if self.child is None or self.parent is None:
            return None
        return self.child.tokens_per_s / self.parent.tokens_per_s

    @property
    def text(self) -> str:
        """What the map shows."""
        if self.speedup is not None:
            return f"{self.speedup:.2f}x"
        return "child only" if self.child else "parent only" if self.parent else "no room"

    def to_json(self) -> dict[str, Any]:
        def rate(p: Plan | None) -> float | None:
            return None if p is None else p.tokens_per_s

        def name(p: Plan | None) -> str | None:
            return None if p is None else p.setup.layout.name

        def dtype(p: Plan | None) -> KvDtype | None:
            return None if p is None else p.setup.kv_dtype

        return {
            "gpu": self.gpu,
            "num_gpus": self.num_gpus,
            "isl": self.load.isl,
            "osl": self.load.osl,
            "speedup": self.speedup,
            "verdict": self.text,
            "child_tokens_per_s": rate(self.child),
            "parent_tokens_per_s": rate(self.parent),
            "child_layout": name(self.child),
            "parent_layout": name(self.parent),
            "child_kv_dtype": dtype(self.child),
            "parent_kv_dtype": dtype(self.parent),
        }


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The map: one row a setup, one column a load."""

    rows: tuple[tuple[Cell, ...], ...]
    kv_dtype: KvDtype
    parent_kv_dtype: KvDtype
    allocator: str
    layout: str | None = None
    """The layout of both everywhere; None where each has its best."""

    @property
    def title(self) -> str:
        """States what the ratio depends on."""
        best = "each at its best layout and batch" if self.layout is None else f"{self.layout}, each at its best batch"
        return (
            f"speedup of the child ({self.kv_dtype} KV) over the parent ({self.parent_kv_dtype} KV) in output tok/s; "
            f"{best}, KV pool cut by {self.allocator}"
        )

    def to_json(self) -> dict[str, Any]:
        """The JSON object of `plan --compare --json`."""
        return {
            "kv_dtype": self.kv_dtype,
            "parent_kv_dtype": self.parent_kv_dtype,
            "allocator": self.allocator,
            "layout": self.layout,
            "cells": [cell.to_json() for row in self.rows for cell in row],
        }


def compare(
    parent: PuzzleArchitecture,
    child: PuzzleArchitecture,
    *,
    gpus: Mapping[str, Gpu],
    nums_gpus: Sequence[int] | None = None,
    loads: Sequence[Load] = DEFAULT_LOADS,
    kv_dtype: KvDtype = "fp8",
    parent_kv_dtype: KvDtype = "fp8",
    layout: str | None = None,
    allocator: str = DEFAULT_ALLOCATOR,
    assumptions: Assumptions | None = None,
) -> Comparison:
    """Plan both models everywhere. A GPU without FP8 gets a BF16 cache for both.

    nums_gpus: default: 1 and 8, or with a `layout` those of them that it divides, and else one replica of it.

    Raises ConfigError when the two swapped places (the "child" holds more weights) or do not belong together.
    """
    check_pair(parent, child)

    def attempt(a: PuzzleArchitecture, gpu: Gpu, num_gpus: int, load: Load, wanted: KvDtype) -> Plan | None:
        dtype: KvDtype = "bf16" if gpu.fp8_flops_per_s is None else wanted
        try:
            return plan(
                a,
                gpu=gpu,
                num_gpus=num_gpus,
                load=load,
                kv_dtype=dtype,
                layout=layout,
                allocator=allocator,
                assumptions=assumptions,
            )
        except NoRoomError:
            return None

    return Comparison(
        rows=tuple(
            tuple(
                Cell(
                    gpu=gpu.name,
                    num_gpus=num_gpus,
                    load=load,
                    child=attempt(child, gpu, num_gpus, load, kv_dtype),
                    parent=attempt(parent, gpu, num_gpus, load, parent_kv_dtype),
                )
                for load in loads
            )
            for gpu in gpus.values()
            for num_gpus in (_default_nums_gpus(layout) if nums_gpus is None else nums_gpus)
        ),
        kv_dtype=kv_dtype,
        parent_kv_dtype=parent_kv_dtype,
        allocator=allocator,
        layout=layout,
    )


def _default_nums_gpus(layout: str | None) -> Sequence[int]:
    if layout is None:
        return DEFAULT_NUM_GPUS
    size = parse_replica(layout).gpus_per_replica
    return [num_gpus for num_gpus in DEFAULT_NUM_GPUS if num_gpus % size == 0] or [size]


def check_pair(parent: PuzzleArchitecture, child: PuzzleArchitecture) -> None:
    """Raise ConfigError unless `child` can have come from `parent` by taking experts and context away."""
    if parent.num_layers != child.num_layers or parent.hidden_size != child.hidden_size:
        found = f"{child.num_layers} layers of {child.hidden_size}"
        expected = f"{parent.num_layers} layers of {parent.hidden_size}"
        raise ConfigError("is no child of the parent", key="architecture", found=found, expected=expected)
    for layer, (theirs, ours) in enumerate(zip(parent.blocks, child.blocks, strict=True)):
        if ours.num_local_experts > theirs.num_local_experts:
            raise ConfigError(
                "has more experts than its parent: are the two swapped?",
                key=f"layer {layer}",
                found=ours.num_local_experts,
                expected=f"at most {theirs.num_local_experts}",
            )
