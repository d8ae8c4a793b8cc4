"""What `plan` prints: one GPU's memory, the KV cache by window, sequences by allocator, rates, and the heat map."""

from __future__ import annotations

from typing import TYPE_CHECKING

from puzzle_trtllm.commands.output import facts_table, show_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from puzzle_trtllm.build.planner.assumptions import Assumptions
    from puzzle_trtllm.build.planner.comparison import Comparison
    from puzzle_trtllm.build.planner.planning import Plan

BAR_WIDTH = 24
ALLOCATORS_SHOWN = {
    "ideal": "bytes over bytes, no blocks",
    "trtllm_v1_equal": "TensorRT-LLM V1 as it comes: one equal pool a window",
    "trtllm_v1_tuned": "V1 with TRTLLM_WINDOW_SIZE_SHARES",
    "trtllm_v2": "TensorRT-LLM V2: one pool",
    "vllm": "vLLM, groups by kind of attention (fits public logs)",
    "vllm_by_window": "vLLM, groups by window (its released sources)",
}


def plan_tables(p: Plan) -> list[Table]:
    """All tables of a plan, in reading order."""
    return [memory_table(p), kv_table(p), capacity_table(p), result_table(p)]


def kv_table(p: Plan) -> Table:
    """What a finished sequence keeps, by window."""
    from rich.table import Table

    from puzzle_trtllm.build.planner.description import kv_by_window

    rows = kv_by_window(p.setup, p.load)
    whole = sum(row.layers * row.bytes_per_layer for row in rows)
    table = Table(
        title=f"KV cache of one sequence of {p.load.sequence_tokens:,} tokens, {p.setup.kv_dtype}: {show_bytes(whole)}",
        title_justify="left",
    )
    for column in ("window", "layers", "tokens kept", "a layer", "together", "share"):
        table.add_column(column, justify="right")
    for row in rows:
        together = row.layers * row.bytes_per_layer
        table.add_row(
            "full" if row.window is None else f"{row.window:,}",
            str(row.layers),
            f"{row.tokens_kept:,}",
            show_bytes(row.bytes_per_layer),
            show_bytes(together),
            f"{together / whole:.1%}",
        )
    return table


def memory_table(p: Plan) -> Table:
    """One GPU's memory."""
    m, weights = p.memory, p.memory.weights
    return facts_table(
        f"memory of one {p.setup.gpu.name} under {p.setup.layout.name}",
        [
            ("total", show_bytes(m.total)),
            ("weights", f"{show_bytes(weights.total)} (experts {show_bytes(weights.experts)})"),
            ("context, activations, graphs", " + ".join(map(show_bytes, (m.context, m.activations, m.graphs)))),
            ("KV cache", show_bytes(m.kv_pool)),
        ],
    )


def capacity_table(p: Plan) -> Table:
    """Sequences that fit on all GPUs, by allocator."""
    from rich.table import Table

    table = Table(title=f"sequences of {p.load.sequence_tokens:,} tokens at once", title_justify="left")
    for column in ("allocator", "sequences", "how"):
        table.add_column(column, justify="right" if column == "sequences" else "left")
    for name in p.capacities:
        chosen = "bold" if name == p.allocator else None
        table.add_row(name, f"{p.sequences(name):,}", ALLOCATORS_SHOWN[name], style=chosen)
    return table


def result_table(p: Plan) -> Table:
    """Rates, and where the time goes."""
    from puzzle_trtllm.build.planner.description import distinct_experts, time_shares

    replicas = p.setup.layout.num_replicas
    woken = ", ".join(f"{awake:.0f} of {count}" for count, awake in distinct_experts(p).items())
    bound = f"{p.best.bound}{' and KV capacity: more sequences would be faster' if p.is_capacity_bound else ''}"
    if p.knee is None:
        batch = ("batch", f"{p.num_in_flight:,} in flight, as given; at most {p.max_batch * replicas:,} fit")
    else:
        batch = ("best batch", f"{p.num_in_flight:,} in flight; {p.knee.batch * replicas:,} reach 90% of its rate")
    facts = [
        ("layout", p.setup.layout.name),
        batch,
        ("expected", f"{p.tokens_per_s:,.0f} output tok/s, {p.tokens_per_s_per_gpu:,.0f} a GPU"),
        ("one user sees", f"{p.tokens_per_s / p.num_in_flight:,.1f} tok/s, prompts included"),
        (
            "at the data sheet's peaks",
            f"decode step {p.best.decode_step_s * 1e3:,.1f} ms, {woken} experts a layer awake",
        ),
        ("", f"prompt {p.best.prefill_s_per_request * 1e3:,.1f} ms, bound by {p.best.prefill_bound}"),
        ("bound by", bound),
    ]
    for name, share in time_shares(p.best).items():
        facts.append((f"  {name}", f"{'█' * round(BAR_WIDTH * share):<{BAR_WIDTH}} {share:.1%}"))
    tried = [f"{name} {'no room' if rate is None else f'{rate:,.0f}'}" for name, rate in p.alternatives]
    if tried:
        facts.append(("other layouts, tok/s", ", ".join(tried)))
    title = f"{p.setup.layout.num_gpus} x {p.setup.gpu.name}, {p.load.isl:,} in, {p.load.osl:,} out"
    return facts_table(title, facts)


def assumptions_table(assumptions: Assumptions) -> Table:
    """Every assumption with its reason."""
    from rich.table import Table

    from puzzle_trtllm.build.planner.assumptions import explain_assumptions

    table = Table(title="assumptions", title_justify="left")
    for column in ("name", "value", "because"):
        table.add_column(column, overflow="fold")
    for name, value, reason in explain_assumptions(assumptions):
        table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value), reason)
    return table


def heat_map_table(result: Comparison) -> Table:
    """The heat map for a terminal."""
    from rich.table import Table
    from rich.text import Text

    from puzzle_trtllm.build.planner.heat_map import colour_of, load_name, setup_name, text_colour_of

    table = Table(title=result.title, title_justify="left")
    table.add_column("setup")
    for cell in result.rows[0]:
        table.add_column(load_name(cell.load), justify="center")
    for row in result.rows:
        styles = [f"{text_colour_of(cell.speedup)} on {colour_of(cell.speedup)}" for cell in row]
        cells = [Text(f" {cell.text} ", style=style) for cell, style in zip(row, styles, strict=True)]
        table.add_row(setup_name(row[0]), *cells)
    return table
