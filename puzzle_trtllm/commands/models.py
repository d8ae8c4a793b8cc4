"""`inspect`, `derive`, `verify`: what a model is, and how a child comes from its parent."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from puzzle_trtllm.commands.output import (
    JsonOption,
    OverwriteOption,
    facts_table,
    print_json,
    print_table,
    quoted,
    show_bytes,
    show_count,
)
from puzzle_trtllm.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from puzzle_trtllm.architecture import KvDtype
    from puzzle_trtllm.build.fitting import Fit
    from puzzle_trtllm.build.verify import VerificationReport
    from puzzle_trtllm.inspection import Inspection

BAR_WIDTH = 24


def inspect_command(
    model: Annotated[str, typer.Argument(help="Checkpoint or engine folder, config.json, or hub id.", metavar="PATH")],
    seq_len: Annotated[
        list[int] | None,
        typer.Option("--seq-len", metavar="N ...", help="Sequence lengths for KV bytes (default: the longest)."),
    ] = None,
    kv: Annotated[
        Literal["bf16", "fp8"] | None,
        typer.Option("--kv", help="KV dtype (default: fp8 if the model brings KV scales, else bf16)."),
    ] = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="Also show what fits on this GPU, such as h100-80gb.")
    ] = None,
    gpus: Annotated[int | None, typer.Option("--gpus", help="How many of them (default: 1).")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show a model layer by layer: experts, windows, bytes; and what fits on GPUs.

    Reads config.json and the headers of the safetensors files, never a weight.
    """
    from puzzle_trtllm.inspection import inspect

    if gpu is None and gpus is not None:
        raise ConfigError("which GPU?", key="--gpus", found=gpus, expected="--gpu NAME beside it")
    inspection = inspect(model, seq_lens=seq_len or (), kv_dtype=kv)
    fits = () if gpu is None else _fits(inspection, gpu, 1 if gpus is None else gpus)
    if as_json:
        value = inspection.to_json()
        print_json(value if gpu is None else {**value, "fits": [fit.to_json() for fit in fits]})
    else:
        print_table(
            layers_table(inspection),
            totals_table(inspection),
            *([fits_table(fits, inspection.kv_dtype)] if fits else []),
        )


def _fits(inspection: Inspection, gpu: str, num_gpus: int) -> tuple[Fit, ...]:
    from puzzle_trtllm.build.fitting import fit
    from puzzle_trtllm.gpus import load_gpu

    return fit(
        inspection.architecture,
        gpu=load_gpu(gpu),
        num_gpus=num_gpus,
        kv_dtype=inspection.kv_dtype,
        seq_lens=inspection.kv_sequence_tokens,
    )


def fits_table(fits: tuple[Fit, ...], kv_dtype: KvDtype) -> Table:
    """One row a layout: bytes of one GPU, and the sequences that all of them hold."""
    from rich.table import Table

    first = fits[0]
    gpus = f"{first.layout.num_gpus} x {first.gpu.product}"
    title = f"on {gpus}, {kv_dtype} KV; sequences as TensorRT-LLM holds them, see `plan`"
    table = Table(title=title, title_justify="left")
    table.add_column("layout")
    for column in ("weights a GPU", "KV pool a GPU", *(f"at {tokens:,} tokens" for tokens, _ in first.max_sequences)):
        table.add_column(column, justify="right")
    for fit in fits:
        pool = show_bytes(fit.kv_pool_bytes_per_gpu) if fit.kv_pool_bytes_per_gpu else "does not fit"
        counts = (f"{count:,} sequences" for _, count in fit.max_sequences)
        table.add_row(fit.layout.name, show_bytes(fit.weight_bytes_per_gpu), pool, *counts)
    return table


def layers_table(inspection: Inspection) -> Table:
    """One row a layer; a bar for the experts it keeps."""
    from rich.table import Table

    a, length = inspection.architecture, inspection.kv_sequence_tokens[0]
    most = max(block.num_local_experts for block in a.blocks)
    table = Table(title=f"{inspection.source}: {a.num_layers} layers", title_justify="left")
    for column in ("layer", "experts", "", "window", "weights", f"KV at {length:,} tokens"):
        table.add_column(column, justify="left" if column == "" else "right")
    for layer, block in enumerate(a.blocks):
        filled = round(BAR_WIDTH * block.num_local_experts / most)
        table.add_row(
            str(layer),
            str(block.num_local_experts),
            "█" * filled + "░" * (BAR_WIDTH - filled),
            "full" if block.sliding_window is None else f"{block.sliding_window:,}",
            show_bytes(inspection.layer_weight_bytes(layer)),
            show_bytes(inspection.layer_kv_bytes(layer, length)),
        )
    return table


def totals_table(inspection: Inspection) -> Table:
    """Parameters, bytes, and the KV cache at every length asked for."""
    a, dtype = inspection.architecture, inspection.kv_dtype
    facts = [
        ("parameters", f"{show_count(inspection.parameters)} ({inspection.parameters:,})"),
        ("weights", f"{show_bytes(inspection.weight_bytes)} ({a.experts_format} experts)"),
        ("router", f"top {a.experts_per_token} of each layer's experts"),
        (f"KV cache a token ({dtype})", f"{show_bytes(a.kv_bytes_per_token(dtype))}, before any window fills"),
    ]
    for length in inspection.kv_sequence_tokens:
        kept = a.kv_bytes_per_sequence(length, dtype)
        share = kept / (length * a.kv_bytes_per_token(dtype))
        facts.append((f"KV cache at {length:,} tokens", f"{show_bytes(kept)} ({share:.1%} of full attention's)"))
    return facts_table("totals", facts)


def derive_command(
    parent: Annotated[str, typer.Argument(help="gpt-oss checkpoint folder or hub id.", metavar="PARENT")],
    out: Annotated[Path, typer.Argument(help="Folder of the child, to be made.", metavar="OUT")],
    architecture: Annotated[
        Path, typer.Option("--architecture", help="JSON with block_configs, one entry a layer; or a config.json.")
    ],
    importance: Annotated[
        Path, typer.Option("--importance", help="Expert scores, as `calibrate experts` writes them.")
    ],
    experts: Annotated[
        Literal["mxfp4", "bf16", "keep"], typer.Option("--experts", help="Format of the child's experts.")
    ] = "keep",
    max_shard_bytes: Annotated[
        int, typer.Option("--max-shard-bytes", min=1, help="Largest size of a shard.")
    ] = 5_000_000_000,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Derive a Puzzle child from its parent.

    The child is the parent's bytes without the experts that matter least; its windows are set in config.json. Killed in
    the middle, the same command goes on at its last finished shard.
    """
    from puzzle_trtllm.architecture import PuzzleArchitecture
    from puzzle_trtllm.build.derive import derive
    from puzzle_trtllm.inspection import inspect
    from puzzle_trtllm.tensors import count_weight_bytes

    record = derive(
        parent,
        out,
        architecture=architecture,
        importance=importance,
        experts=experts,
        overwrite=overwrite,
        max_shard_bytes=max_shard_bytes,
        quiet=False,
    )
    child, parent_bytes = inspect(out), count_weight_bytes(PuzzleArchitecture.from_path(record.parent_path))
    if as_json:
        print_json({"path": str(out), "weight_bytes": child.weight_bytes, **record.model_dump(mode="json")})
        return
    saved = 1 - child.weight_bytes / parent_bytes
    summary = f"{show_bytes(child.weight_bytes)}, {saved:.1%} less than the parent's {show_bytes(parent_bytes)}"
    calibrate = f"puzzle-trtllm calibrate kv {quoted(out)} {quoted(f'{out}-kv')}"
    facts = [("folder", str(out)), ("weights", summary), ("next", calibrate)]
    print_table(layers_table(child), facts_table("child", facts))


def verify_command(
    child: Annotated[str, typer.Argument(help="A child: one that `derive` made, or anyone else's.", metavar="CHILD")],
    against: Annotated[str, typer.Option("--against", help="Its parent: checkpoint folder or hub id.")],
    as_json: JsonOption = False,
) -> None:
    """Prove a child's bytes to be its parent's.

    Compares every byte, but for what its derivation.json says was left out. A child without one may have been trained
    on: its experts are found by their bytes and must be an exact subset of the parent's, other tensors that differ are
    listed. A difference is exit code 2.
    """
    from puzzle_trtllm.build.verify import verify

    report = verify(child, against=against, quiet=False)
    if not report.identical:
        raise CheckpointError(f"differs from its parent: {report.first_difference}", file=report.child)
    if as_json:
        print_json(
            {
                "child": str(report.child),
                "parent": str(report.parent),
                "identical": not (report.retrained or report.config_changes),
                "has_record": report.has_record,
                "num_tensors": report.num_tensors,
                "num_bytes": report.num_bytes,
                "added_scales": list(report.added_scales),
                "kept_experts": [list(kept) for kept in report.kept_experts],
                "retrained": list(report.retrained),
                "config_changes": list(report.config_changes),
            }
        )
        return
    print_table(facts_table("verified", _verified_facts(report)))


def _verified_facts(report: VerificationReport) -> list[tuple[str, str]]:
    facts = [
        ("child", str(report.child)),
        ("parent", str(report.parent)),
        ("compared", f"{report.num_tensors} tensors, {show_bytes(report.num_bytes)}: identical"),
    ]
    if not report.has_record:
        kept = sum(len(kept) for kept in report.kept_experts)
        facts.append(("experts, routers", f"{kept} experts in {len(report.kept_experts)} layers, all the parent's"))
    if report.retrained:
        names = list(report.retrained[:3]) + ["..."] * (len(report.retrained) > 3)
        facts.append(("retrained", f"{len(report.retrained)} tensors: {', '.join(names)}"))
    facts += [("changed", line) for line in report.config_changes]
    if report.added_scales:
        facts.append(("added since", f"{len(report.added_scales)} KV scales"))
    return facts
