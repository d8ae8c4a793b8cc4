"""`plan`: what a deployment will hold and deliver, or where a child pays, before any GPU is rented."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from puzzle_trtllm.commands.output import JsonOption, print_json, print_table
from puzzle_trtllm.errors import PuzzleError

if TYPE_CHECKING:
    from puzzle_trtllm.architecture import KvDtype, PuzzleArchitecture
    from puzzle_trtllm.build.planner.assumptions import Assumptions
    from puzzle_trtllm.build.planner.comparison import Comparison
    from puzzle_trtllm.build.planner.planning import Plan


def plan_command(
    architecture: Annotated[
        str, typer.Argument(help="Checkpoint or engine folder, config.json, or hub id.", metavar="ARCHITECTURE")
    ],
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="Such as h100-80gb, the default; with --compare all.")
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option("--gpus", help="How many (default: 1; with --compare 1 and 8, those that --parallel divides)."),
    ] = None,
    isl: Annotated[int | None, typer.Option("--isl", help="Prompt tokens a request; needed without --compare.")] = None,
    osl: Annotated[int | None, typer.Option("--osl", help="Generated tokens a request; likewise.")] = None,
    kv: Annotated[
        Literal["bf16", "fp8"] | None, typer.Option("--kv", help="KV dtype (default: fp8 where the GPU has it).")
    ] = None,
    parallel: Annotated[
        str | None, typer.Option("--parallel", help="tp8, dep8, ... (default: the fastest that fits).")
    ] = None,
    allocator: Annotated[
        str, typer.Option("--allocator", help="How the KV pool is cut up: a name in a plan's table of sequences.")
    ] = "trtllm_v1_tuned",
    batch: Annotated[
        int | None, typer.Option("--batch", min=1, help="Sequences in flight a replica (default: the best number).")
    ] = None,
    memory_rule: Annotated[
        Literal["free", "total"],
        typer.Option("--memory-rule", help="KV memory: a fraction of what is free, or of all."),
    ] = "free",
    compare: Annotated[
        str | None,
        typer.Option("--compare", metavar="PARENT", help="Instead: speedup over this parent, by GPU and length."),
    ] = None,
    parent_kv: Annotated[
        Literal["bf16", "fp8"] | None, typer.Option("--parent-kv", help="The parent's KV dtype (default: as --kv).")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="With --compare: the heat map as .svg or .html.")] = None,
    show_assumptions: Annotated[
        bool, typer.Option("--explain", help="Also list every assumption with its value and reason.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Plan a deployment without a GPU.

    Weights, KV cache, sequences that fit, the best batch, expected tok/s and what bounds it; or with --compare a heat
    map of a child's speedup. Predictions: docs/planner.md holds them against published measurements.
    """
    from puzzle_trtllm.build.planner import Assumptions, plan_json
    from puzzle_trtllm.commands.plan_tables import assumptions_table, plan_tables

    model, assumptions = read_architecture(architecture), Assumptions(memory_rule=memory_rule)
    if compare is not None:
        if batch is not None:
            raise PuzzleError("goes without --compare", key="--batch", found=batch)
        result = _compare(
            read_architecture(compare),
            model,
            gpu=gpu,
            gpus=gpus,
            isl=isl,
            osl=osl,
            kv=kv,
            parent_kv=parent_kv,
            parallel=parallel,
            allocator=allocator,
            assumptions=assumptions,
        )
        _show_comparison(result, assumptions, out, show_assumptions, as_json=as_json)
        return
    for option, value in (("--parent-kv", parent_kv), ("--out", out)):
        if value is not None:
            raise PuzzleError("goes with --compare", key=option, found=value)
    p = _plan(
        model,
        gpu="h100-80gb" if gpu is None else gpu,
        gpus=gpus,
        isl=isl,
        osl=osl,
        kv=kv,
        parallel=parallel,
        allocator=allocator,
        batch=batch,
        assumptions=assumptions,
    )
    if as_json:
        print_json(plan_json(p))
        return
    print_table(*plan_tables(p), *([assumptions_table(assumptions)] if show_assumptions else []))
    if not show_assumptions:
        print("Every number rests on stated assumptions: --explain lists them; docs/planner.md shows the errors.")


def read_architecture(path: str) -> PuzzleArchitecture:
    """From a folder, an engine, a config.json, or a hub id (only its config is fetched)."""
    from puzzle_trtllm.architecture import PuzzleArchitecture
    from puzzle_trtllm.checkpoint import resolve_folder

    place = Path(path)
    if place.is_file():
        return PuzzleArchitecture.from_path(place)
    model = place / "model"
    if (model / "config.json").is_file() and not (place / "config.json").is_file():
        return PuzzleArchitecture.from_path(model)
    return PuzzleArchitecture.from_path(resolve_folder(path, weights=False))


def _plan(
    model: PuzzleArchitecture,
    *,
    gpu: str,
    gpus: int | None,
    isl: int | None,
    osl: int | None,
    kv: KvDtype | None,
    parallel: str | None,
    allocator: str,
    batch: int | None,
    assumptions: Assumptions,
) -> Plan:
    from puzzle_trtllm.build.planner.planning import plan
    from puzzle_trtllm.build.planner.throughput import Load
    from puzzle_trtllm.gpus import load_gpu

    if isl is None or osl is None:
        missing = [option for option, value in (("--isl", isl), ("--osl", osl)) if value is None]
        raise PuzzleError(
            "missing", key=", ".join(missing), expected="tokens, such as --isl 4096 --osl 4096; or --compare PARENT"
        )
    card = load_gpu(gpu)
    return plan(
        model,
        gpu=card,
        num_gpus=1 if gpus is None else gpus,
        load=Load(isl=isl, osl=osl),
        kv_dtype=kv or ("bf16" if card.fp8_flops_per_s is None else "fp8"),
        layout=parallel,
        allocator=allocator,
        batch=batch,
        assumptions=assumptions,
    )


def _compare(
    parent: PuzzleArchitecture,
    child: PuzzleArchitecture,
    *,
    gpu: str | None,
    gpus: int | None,
    isl: int | None,
    osl: int | None,
    kv: KvDtype | None,
    parent_kv: KvDtype | None,
    parallel: str | None,
    allocator: str,
    assumptions: Assumptions,
) -> Comparison:
    from puzzle_trtllm.build.planner.comparison import DEFAULT_LOADS, compare
    from puzzle_trtllm.build.planner.throughput import Load
    from puzzle_trtllm.gpus import load_gpu, load_gpus

    if (isl is None) != (osl is None):
        raise PuzzleError("missing", key="--isl" if isl is None else "--osl", expected="both or neither")
    longest = min(parent.max_position_embeddings, child.max_position_embeddings)
    fitting = [load for load in DEFAULT_LOADS if load.sequence_tokens <= longest]
    loads = [Load(isl=isl, osl=osl)] if isl is not None and osl is not None else fitting
    if not loads:
        raise PuzzleError("missing", key="--isl", expected=f"lengths within the model's {longest} positions")
    return compare(
        parent,
        child,
        gpus=load_gpus() if gpu is None else {gpu: load_gpu(gpu)},
        nums_gpus=None if gpus is None else (gpus,),
        loads=loads,
        kv_dtype=kv or "fp8",
        parent_kv_dtype=parent_kv or kv or "fp8",
        layout=parallel,
        allocator=allocator,
        assumptions=assumptions,
    )


def _show_comparison(
    result: Comparison, assumptions: Assumptions, out: Path | None, show_assumptions: bool, *, as_json: bool
) -> None:
    from puzzle_trtllm.build.planner.heat_map import write_heat_map
    from puzzle_trtllm.commands.plan_tables import assumptions_table, heat_map_table

    if out is not None:
        write_heat_map(result, out)
    if as_json:
        print_json({**result.to_json(), "path": None if out is None else str(out)})
        return
    print_table(heat_map_table(result), *([assumptions_table(assumptions)] if show_assumptions else []))
    if out is not None:
        print(f"heat map: {out}")
