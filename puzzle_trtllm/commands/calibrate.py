"""`calibrate experts` and `calibrate kv`: what real prompts say about a model's experts and its KV cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from puzzle_trtllm.commands.dataset_options import takes_dataset, warn_if_bundled
from puzzle_trtllm.commands.output import JsonOption, OverwriteOption, facts_table, print_json, print_table

if TYPE_CHECKING:
    from rich.table import Table

    from puzzle_trtllm.calibration.dataset import DataOptions
    from puzzle_trtllm.calibration.experts import ExpertCalibration
    from puzzle_trtllm.calibration.kv import KvCalibration

CheckpointArgument = Annotated[str, typer.Argument(help="Checkpoint folder or hub id.")]
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
    out: Annotated[Path, typer.Argument(help="Importance file to write, *.safetensors.")],
    data: DataOptions,
    stream: StreamOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score experts by the router's ranked-choice votes over real prompts."""
    from puzzle_trtllm.calibration.experts import calibrate_experts

    report = calibrate_experts(
        checkpoint,
        out,
        stream=stream,
        overwrite=overwrite,
        quiet=False,
        **data,
    )
    warn_if_bundled(report.dataset_is_bundled)
    if as_json:
        print_json(
            {
                "path": str(report.out),
                "method": report.method,
                "num_sequences": report.num_sequences,
                "num_tokens": report.num_tokens,
                "dataset_fingerprint": report.dataset_fingerprint,
                "parent_fingerprint": report.parent_fingerprint,
                "votes": [list(layer) for layer in report.votes],
                "never_routed": [list(layer) for layer in report.never_routed],
            }
        )
    else:
        print_table(votes_table(report))


def votes_table(report: ExpertCalibration) -> Table:
    """One row a layer: how unevenly its experts are used."""
    from rich.table import Table

    title = f"{report.out}: {report.method} over {report.num_sequences:,} sequences, {report.num_tokens:,} tokens"
    table = Table(title=title, title_justify="left")
    for column in ("layer", "experts", "busiest", "share", "idlest", "share", "never routed"):
        table.add_column(column, justify="right")
    for layer, (votes, never) in enumerate(zip(report.votes, report.never_routed, strict=True)):
        most, least, total = max(votes), min(votes), sum(votes) or 1
        table.add_row(
            str(layer),
            str(len(votes)),
            str(votes.index(most)),
            f"{most / total:.1%}",
            str(votes.index(least)),
            f"{least / total:.2%}",
            str(len(never)),
        )
    return table


@takes_dataset(max_tokens=262_144)
def kv_command(
    checkpoint: CheckpointArgument,
    out: Annotated[Path, typer.Argument(help="Folder of the calibrated checkpoint, to be made.")],
    data: DataOptions,
    exact: Annotated[bool, typer.Option("--exact", help="Scales amax / 448 instead of powers of two.")] = False,
    stream: StreamOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Learn the FP8 scales of the KV cache with ModelOpt.

    Writes a checkpoint that carries the scales, with a report of what they do to K and V in every layer.
    """
    from puzzle_trtllm.calibration.kv import calibrate_kv

    report = calibrate_kv(
        checkpoint,
        out,
        exact=exact,
        stream=stream,
        overwrite=overwrite,
        quiet=False,
        **data,
    )
    warn_if_bundled(report.dataset_is_bundled)
    if as_json:
        from dataclasses import asdict

        print_json({"path": str(out), **asdict(report)})
        return
    facts = [
        ("folder", str(out)),
        ("data", f"{report.num_sequences:,} sequences, {report.num_tokens:,} tokens ({report.dataset_fingerprint})"),
        ("scale rule", report.scale_rule),
    ]
    print_table(scales_table(report), facts_table("calibrated", facts))


def scales_table(report: KvCalibration) -> Table:
    """One row a layer: maxima, scales, and what storing in FP8 costs with the scale and without it."""
    from rich.table import Table

    table = Table(title="FP8 KV cache: signal to noise with the calibrated scale, and at scale 1", title_justify="left")
    for column in ("layer", "window", "K amax", "K scale", "dB", "at 1", "V amax", "V scale", "dB", "at 1"):
        table.add_column(column, justify="right")
    for layer in report.layers:
        cells = []
        for part in (layer.k, layer.v):
            cells += [f"{part.amax:.4g}", f"{part.scale:.6g}"]
            cells += ["-" if q.snr_db is None else f"{q.snr_db:.1f}" for q in (part.calibrated, part.unit)]
        window = "full" if layer.sliding_window is None else f"{layer.sliding_window:,}"
        table.add_row(str(layer.layer), window, *cells)
    return table
