"""`calibrate experts` and `calibrate kv`: what real prompts say about a model's experts and its KV cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from puzzle_trtllm.commands.dataset_options import takes_dataset, warn_if_bundled
from puzzle_trtllm.commands.output import (
    JsonOption,
    OverwriteOption,
    facts_table,
    print_json,
    print_table,
    quoted,
    show_bytes,
)

if TYPE_CHECKING:
    from rich.table import Table

    from puzzle_trtllm.calibration.dataset import DataOptions
    from puzzle_trtllm.calibration.experts import ExpertCalibration
    from puzzle_trtllm.calibration.kv_report import KvCalibration


ComputeDtype = Literal["float32", "bfloat16"]
"""Names of torch dtypes."""

CheckpointArgument = Annotated[str, typer.Argument(help="Checkpoint folder or hub id.", metavar="CHECKPOINT")]
StreamOption = Annotated[
    bool | None,
    typer.Option(
        "--stream/--no-stream",
        help="One layer in memory at a time, hidden states on disk; default: when the model would take most of the "
        "free memory. The result is the same; a killed run goes on where it was.",
        show_default=False,
    ),
]


@takes_dataset(max_tokens=65_536)
def experts_command(
    checkpoint: CheckpointArgument,
    out: Annotated[Path, typer.Argument(help="Importance file to write, *.safetensors.", metavar="OUT")],
    data: DataOptions,
    score: Annotated[
        str | None,
        typer.Option(
            help="What `importance` is: votes (routed tokens; the default), output-error (change of the layer's output "
            "without the expert), router-mass (router weight x output norm), reap (the same per routed token). "
            "All are computed and written; docs/calibration.md compares them."
        ),
    ] = None,
    removal: Annotated[
        str | None,
        typer.Option(
            help="one-shot, or iterative (the default): remove the least important, let its tokens go to their next "
            "choices, repeat."
        ),
    ] = None,
    architecture: Annotated[
        Path | None, typer.Option(help="The child's architecture file: also report what its expert counts cost.")
    ] = None,
    choices: Annotated[
        int | None,
        typer.Option(
            help="Experts run for each token. Default: k + 1; up to 2 k with --architecture, and for iterative removal "
            "by another score than votes."
        ),
    ] = None,
    dtype: Annotated[ComputeDtype, typer.Option(help="What the model computes in.")] = "float32",
    stream: StreamOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score the experts of every layer in one pass over real prompts.

    Writes the file that `derive` reads: one importance an expert, larger means keep.
    """
    _limit_kernel_cache()
    import torch

    from puzzle_trtllm.calibration import experts

    report = experts.calibrate_experts(
        checkpoint,
        out,
        score=cast(Any, experts.DEFAULT_SCORE if score is None else score),  # checked where they are known
        removal=cast(Any, experts.DEFAULT_REMOVAL if removal is None else removal),
        architecture=architecture,
        choices=choices,
        dtype=getattr(torch, dtype),
        stream=stream,
        overwrite=overwrite,
        quiet=False,
        **data,
    )
    warn_if_bundled(report.dataset_is_bundled)
    if as_json:
        print_json(_experts_json(report))
    else:
        derive = f"puzzle-trtllm derive PARENT CHILD --architecture child.json --importance {quoted(report.out)}"
        print_table(importance_table(report), facts_table("scores", [("file", str(report.out)), ("next", derive)]))


def _limit_kernel_cache() -> None:
    from puzzle_trtllm.calibration.kernel_cache import limit_kernel_cache

    limit_kernel_cache()


def _experts_json(report: ExpertCalibration) -> dict[str, Any]:
    return {
        "path": str(report.out),
        "method": report.method,
        "score": report.score,
        "removal": report.removal,
        "choices": list(report.num_choices),
        "num_sequences": report.num_sequences,
        "num_tokens": report.num_tokens,
        "dataset": report.dataset,
        "dataset_fingerprint": report.dataset_fingerprint,
        "parent_fingerprint": report.parent_fingerprint,
        "votes": [list(layer.votes) for layer in report.layers],
        "never_routed": [list(layer.never_routed) for layer in report.layers],
        "layers": [
            {
                "importance": layer.importance.tolist(),
                "scores": {name: values.tolist() for name, values in layer.scores.items()},
                "kept": layer.kept,
                "relative_error": layer.relative_error,
                "share_out_of_choices": layer.share_out_of_choices,
            }
            for layer in report.layers
        ],
    }


def importance_table(report: ExpertCalibration) -> Table:
    """One row a layer: how unevenly its experts are used, who goes first, and what the child's count costs."""
    from rich.table import Table

    title = f"{report.out}: {report.method}; {report.num_sequences:,} sequences, {report.num_tokens:,} tokens"
    table = Table(title=title, title_justify="left")
    child = ("kept", "output error", "approx.") if report.layers[0].kept is not None else ()
    for column in ("layer", "experts", "busiest", "share", "idlest", "share", "unrouted", "first to go", *child):
        table.add_column(column, justify="right")
    for number, layer in enumerate(report.layers):
        most, least, total = max(layer.votes), min(layer.votes), sum(layer.votes) or 1
        row = [number, len(layer.votes), layer.votes.index(most), f"{most / total:.1%}"]
        row += [layer.votes.index(least), f"{least / total:.2%}", len(layer.never_routed), layer.least_important]
        if layer.kept is not None:
            row += [layer.kept, f"{layer.relative_error:.2%}", f"{layer.share_out_of_choices:.1%}"]
        table.add_row(*map(str, row))
    return table


@takes_dataset(max_tokens=262_144)
def kv_command(
    checkpoint: CheckpointArgument,
    out: Annotated[Path, typer.Argument(help="Folder of the calibrated checkpoint, to be made.", metavar="OUT")],
    data: DataOptions,
    exact: Annotated[bool, typer.Option("--exact", help="Scales amax / 448 instead of powers of two.")] = False,
    held_out: Annotated[
        str | None,
        typer.Option(
            help="Sequences to set aside and measure on, or a file to read instead. Default: an eighth, 32 at most."
        ),
    ] = None,
    quality: Annotated[
        bool, typer.Option("--quality/--no-quality", help="Measure what FP8 costs: four more passes of held-out text.")
    ] = True,
    seq_len: Annotated[
        list[int] | None,
        typer.Option("--seq-len", min=1, metavar="N ...", help="Lengths at which to tell what FP8 saves."),
    ] = None,
    dtype: Annotated[ComputeDtype, typer.Option(help="What the model computes in.")] = "float32",
    ranks: Annotated[
        int, typer.Option(min=1, help="Processes that share the data (torchrun works too); the result is the same.")
    ] = 1,
    device: Annotated[str, typer.Option(help="cpu, or cuda: one GPU a rank.")] = "cpu",
    stream: StreamOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Learn the FP8 scales of the KV cache with ModelOpt.

    Writes a checkpoint that carries the scales, and kv_report.json and .html: what they do to K and V in every layer,
    what FP8 changes in the output on held-out text, with and without calibration, and how many bytes it saves.
    """
    _limit_kernel_cache()
    import torch

    from puzzle_trtllm.calibration.kv import calibrate_kv
    from puzzle_trtllm.calibration.ranks import is_first_process

    report = calibrate_kv(
        checkpoint,
        out,
        held_out=int(held_out) if held_out is not None and held_out.removeprefix("-").isdecimal() else held_out,
        quality=quality,
        seq_lens=seq_len or (),
        exact=exact,
        dtype=getattr(torch, dtype),
        ranks=ranks,
        device=device,
        stream=stream,
        overwrite=overwrite,
        quiet=False,
        **data,
    )
    if not is_first_process():
        return
    warn_if_bundled(report.dataset_is_bundled)
    if as_json:
        from dataclasses import asdict

        print_json({"path": str(out), **asdict(report)})
        return
    saved = ", ".join(f"{show_bytes(b)} a sequence of {int(n):,} tokens" for n, b in report.saved_bytes.items())
    facts = [
        ("folder", str(out)),
        ("data", f"{report.num_sequences:,} sequences, {report.num_tokens:,} tokens ({report.dataset_fingerprint})"),
        ("scale rule", report.scale_rule),
        ("FP8 saves", saved),
        ("report", str(out / "kv_report.html")),
    ]
    if report.held_out is None:
        facts.append(("quality", f"not measured: {report.held_out_missing}"))
    facts.append(("next", f"puzzle-trtllm build {quoted(out)} ENGINE --config NAME"))
    print_table(scales_table(report), *held_out_tables(report), facts_table("calibrated", facts))


def scales_table(report: KvCalibration) -> Table:
    """One row a layer: maxima, scales, what FP8 leaves with the scale and without it, and the bytes it saves."""
    from rich.table import Table

    longest = max(report.saved_bytes, key=int)
    title = f"FP8 KV cache: dB with the calibrated scale, and at scale 1; saved at {int(longest):,} tokens a sequence"
    table = Table(title=title, title_justify="left")
    for column in ("layer", "window", "K amax", "K scale", "dB", "at 1", "V amax", "V scale", "dB", "at 1", "saved"):
        table.add_column(column, justify="right")
    for layer in report.layers:
        cells = []
        for part in (layer.k, layer.v):
            cells += [f"{part.amax:.4g}", f"{part.scale:.6g}"]
            qualities = (part.calibrated, part.unit)
            cells += ["-" if q is None or q.snr_db is None else f"{q.snr_db:.1f}" for q in qualities]
        window = "full" if layer.sliding_window is None else f"{layer.sliding_window:,}"
        table.add_row(str(layer.layer), window, *cells, show_bytes(layer.saved_bytes[longest]))
    return table


def held_out_tables(report: KvCalibration) -> list[Table]:
    """What FP8 changes in the output, one row a way to store K and V; none where nothing was measured."""
    from rich.table import Table

    if report.held_out is None:
        return []
    held_out = report.held_out
    title = f"Against BF16 KV on held-out text: {held_out.num_sequences:,} sequences, {held_out.num_tokens:,} tokens"
    table = Table(title=title, title_justify="left")
    for column in ("FP8 store", "KL, nats/token", "same top token", "KL minus unit's", "standard error"):
        table.add_column(column, justify="right")
    for name, store in held_out.stores.items():
        error = store.kl_over_unit_standard_error
        table.add_row(
            name,
            f"{store.kl:.4g}",
            f"{store.top1_agreement:.3%}",
            f"{store.kl_over_unit:+.3g}",
            "-" if error is None else f"{error:.2g}",
        )
    return [table]
