"""Every ratio of a comparison by hand, and what must not be compared."""

from __future__ import annotations

import pytest

from puzzle_trtllm.errors import BenchError
from puzzle_trtllm.scenario import Scenario
from puzzle_trtllm.serve.bench.result import Turn
from puzzle_trtllm.serve.evaluate.result import Decoding
from puzzle_trtllm.serve.metrics.provenance import Hardware
from puzzle_trtllm.serve.metrics.records import RequestCounts
from puzzle_trtllm.serve.metrics.statistics import Spread
from puzzle_trtllm.serve.metrics.units import show_number
from puzzle_trtllm.serve.report.compare import compare
from puzzle_trtllm.serve.report.document import comparison_entry
from puzzle_trtllm.serve.report.maker import assemble_report
from puzzle_trtllm.serve.report.markdown import render_markdown
from puzzle_trtllm.serve.report.measurement import LayerBlock
from puzzle_trtllm.serve.report.notes import notes_on
from puzzle_trtllm.serve.report.summary import headline
from puzzle_trtllm.serve.report.table import engine_table
from tests.serve.measurements import EVALUATION, PROVENANCE, SCENARIO, effort, family, measurement

PARENT, PARENT_FP8, CHILD = family()


def test_per_token_speedup_is_the_ratio_of_medians():
    result = compare(CHILD, PARENT)
    assert result.per_token_speedup.value == pytest.approx(200 / 100)
    # Round by round: 200/100, 198/90, 220/110.
    assert result.per_token_speedup_range == pytest.approx((2.0, 2.2))
    assert result.uncapped_per_token_speedup.value == pytest.approx(420 / 400)
    assert compare(CHILD, PARENT_FP8).uncapped_per_token_speedup is None


@pytest.mark.parametrize("turns", [None, [Turn(comparison="another", round=index) for index in range(3)]])
def test_rounds_that_were_not_measured_in_turn_are_not_paired(turns):
    apart = CHILD.model_copy(update={"turns": turns})
    result, paired = compare(apart, PARENT), compare(CHILD, PARENT)
    assert result.per_token_speedup_range is None
    assert result.per_token_speedup.value == paired.per_token_speedup.value
    # Rounds 200, 198, 220 over 100, 90, 110: any of one may now meet any of the other.
    assert result.per_token_speedup.interval.high == pytest.approx(220 / 90)
    assert paired.per_token_speedup.interval.high == pytest.approx(198 / 90)


def test_a_baseline_that_stalled_in_a_round_has_no_range_of_ratios():
    stalled = PARENT.model_copy(update={"output_tokens_per_s": Spread.of([100.0, 0.0, 110.0])})
    result = compare(CHILD, stalled)
    assert (result.per_token_speedup_range, result.per_token_speedup.value) == (None, 2.0)


def test_request_rate_takes_the_length_of_the_answers_into_account():
    # requests/s: child 200/10, 200/40, 200/160; parent 100/10, 100/50, 100/100.
    rates = {name: e.relative_request_rate.value for name, e in compare(CHILD, PARENT).efforts.items()}
    assert rates == pytest.approx({"low": 20 / 10, "medium": 5 / 2, "high": 1.25 / 1})
    lengths = {name: e.relative_output_tokens.value for name, e in compare(CHILD, PARENT).efforts.items()}
    assert lengths == pytest.approx({"low": 1.0, "medium": 0.8, "high": 1.6})


def test_twice_the_speed_with_twice_the_length_is_no_gain():
    slow = measurement("slow", [100.0], efforts={"high": effort(0.9, 100)})
    fast = measurement("fast", [200.0], efforts={"high": effort(0.9, 200)})
    assert compare(fast, slow).efforts["high"].relative_request_rate.value == pytest.approx(1.0)


def test_accuracy_retention_and_bytes():
    result = compare(CHILD, PARENT)
    retained = {name: e.accuracy_retention.value for name, e in result.efforts.items()}
    assert retained == pytest.approx({"low": 1.25, "medium": 0.9, "high": 1.0})
    assert (result.weight_bytes_ratio.value, result.kv_bytes_per_sequence_ratio.value) == (0.75, 0.4)


def test_a_ratio_over_zero_has_a_reason_instead_of_a_value():
    retention = compare(CHILD, PARENT_FP8).efforts["low"].accuracy_retention
    assert (retention.value, retention.reason) == (None, "parent_fp8 solved no problem at low effort")


def test_sequences_held_are_what_fits_beside_the_weights():
    # (2000 - 1000) // 300, (2000 - 1000) // 150, (2000 - 750) // 120.
    assert [engine.sequences_held for engine in family()] == [3, 6, 10]
    assert measurement("open", [1.0], memory_bytes=None).sequences_held is None
    assert measurement("tight", [1.0], memory_bytes=900).sequences_held == 0


def test_several_ranks_hold_a_part_of_a_sequence_each_so_none_are_counted():
    """memory_bytes is what each rank was given; the weights and a sequence's bytes are those of all of them."""
    assert measurement("tp2", [1.0], num_ranks=2).sequences_held is None


@pytest.mark.parametrize(
    ("ours", "theirs", "told"),
    [
        ({"num_ranks": 8}, {"num_instances": 8}, None),
        ({"num_ranks": 8}, {}, "8 and 1."),
        (
            {"num_ranks": 2, "num_instances": 2},
            {"num_ranks": 8},
            "4 and 8.",
        ),
    ],
)
def test_more_gpus_are_told(ours, theirs, told):
    engines = [PARENT.model_copy(update=theirs), CHILD.model_copy(update=ours)]
    notes = notes_on(engines, baselines=["parent_bf16"], child="child")
    assert len(notes) == (1 if told else 0)
    if told:
        assert notes[0].startswith(f"child and parent_bf16 ran on different numbers of GPUs or ranks: {told} Ratios")


def test_a_child_on_more_gpus_has_a_speedup_for_each_of_them():
    # 200 tok/s on 8 GPUs against 100 on 2 x 1: twice in all, half for each.
    child = CHILD.model_copy(update={"num_ranks": 8})
    parent = PARENT.model_copy(update={"num_instances": 2})
    result = compare(child, parent)
    assert (result.per_token_speedup.value, result.per_gpu_speedup.value) == (2.0, 0.5)
    assert comparison_entry(result)["per_gpu_speedup"] == 0.5
    report = assemble_report([parent, child], baselines=["parent_bf16"], child="child", title="t")
    assert "For each GPU or rank the ratio to parent_bf16 is 0.50×." in headline(report)
    assert "| tokens/s, each GPU or rank | 0.50× |" in render_markdown(report)
    labels = list(engine_table(report).columns[0].cells)
    assert labels[labels.index("speedup vs parent_bf16") + 1] == "  each GPU or rank"
    assert compare(CHILD, PARENT).per_gpu_speedup is None


def other_load(**changes):
    return {"scenario": Scenario.model_validate(SCENARIO.model_dump() | changes)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            other_load(output_tokens=64),
            r"child: scenario: measured under another scenario than parent_bf16 "
            r"\(found tiny 128/64 at 32, 64 requests, expected tiny 128/128 at 32, 64 requests\)",
        ),
        (other_load(concurrency=8), "measured under another scenario"),
        (
            other_load(input_spread={"uniform": 0.5}, output_spread={"normal": 8}),
            r"found tiny 128 \(uniform 0.5\)/128 \(normal 8\) at 32, 64 requests, expected tiny 128/128 at 32",
        ),
        (other_load(output_spread={"uniform": 1}), r"found tiny 128/128 \(uniform 1\) at 32"),
        (
            other_load(trace={"file": "t.jsonl", "sha256": "ab" * 32, "longest_sequence": 256, "shared_blocks": True}),
            r"found tiny 128/128 at 32, 64 requests of trace t.jsonl \(sha256 abababababab, shared blocks\)",
        ),
        ({"kv_sequence_tokens": 128}, "KV bytes are stated at another length"),
        ({"requests": RequestCounts(failed=64)}, r"child: zero successful requests \(64 failed\)"),
        (
            {"evaluation": EVALUATION.model_copy(update={"problems_fingerprint": "xyz"})},
            r"problems_fingerprint: evaluated differently from parent_bf16 \(found xyz, expected abc\)",
        ),
        ({"evaluation": EVALUATION.model_copy(update={"max_tokens": 80})}, "max_tokens: evaluated differently"),
        (
            {"evaluation": EVALUATION.model_copy(update={"decoding": Decoding(temperature=1.0)})},
            r"decoding: evaluated differently .*\(found temperature 1, top_p 1, seed 0, expected greedy\)",
        ),
        ({"efforts": {"low": effort(0.5, 10)}}, "child: medium: missing metric: not evaluated at this effort"),
        ({"efforts": {**CHILD.efforts, "max": effort(1, 9)}}, "parent_bf16: max: missing metric"),
        ({"blocks": CHILD.blocks[:2]}, r"another number of layers \(found 2, expected 4\)"),
    ],
)
def test_what_would_mislead_is_refused_in_one_line(changes, message):
    with pytest.raises(BenchError, match=message) as caught:
        compare(CHILD.model_copy(update=changes), PARENT)
    assert "\n" not in str(caught.value)


def test_names_and_warm_ups_of_a_scenario_may_differ():
    compare(CHILD.model_copy(update=other_load(name="alias", warmup_requests=4, description="x")), PARENT)


@pytest.mark.parametrize("unknown", [[CHILD], [PARENT], [CHILD, PARENT]])
def test_evaluations_that_are_not_described_are_believed(unknown):
    child, parent = (
        engine.model_copy(update={"evaluation": None}) if engine in unknown else engine for engine in (CHILD, PARENT)
    )
    assert compare(child, parent).efforts["high"].accuracy_retention.value == pytest.approx(1.0)


def test_a_swapped_pair_is_noticed():
    with pytest.raises(BenchError, match=r"more experts than in child: are child and baseline swapped\?"):
        compare(PARENT, CHILD)


def test_a_clean_comparison_needs_no_note():
    assert notes_on(family(), baselines=["parent_bf16", "parent_fp8"], child="child") == []


@pytest.mark.parametrize(("tokens", "told"), [(63, True), (64, False), (256, False), (257, True)])
def test_answers_much_shorter_or_longer_than_the_load_were_not_served_at_this_rate(tokens, told):
    child = CHILD.model_copy(update={"efforts": {**CHILD.efforts, "high": effort(0.9, tokens)}})
    note = (
        "child: throughput was measured with answers of 128 tokens, and at high effort "
        f"they have {show_number(tokens)}: requests per second are throughput / length, no rate that was served."
    )
    assert notes_on([PARENT, child], baselines=["parent_bf16"], child="child") == ([note] if told else [])


@pytest.mark.parametrize(("cpu", "told"), [(None, False), (0.8, False), (0.93, True)])
def test_a_client_that_may_have_been_the_limit_is_told(cpu, told):
    notes = notes_on(
        [PARENT, CHILD.model_copy(update={"busiest_client_cpu": cpu})], baselines=["parent_bf16"], child="child"
    )
    assert notes == (
        [
            "child: a process of the client used 93% of a core, so the client's own speed may be in the throughput "
            "(bench --workers)."
        ]
        if told
        else []
    )


def test_notes_say_what_a_reader_must_know():
    elsewhere = PROVENANCE.model_copy(
        update={"hardware": Hardware(cpu_model="other", cpu_cores=8, memory_bytes=None, gpus=[])}
    )
    child = CHILD.model_copy(
        update={
            "requests": RequestCounts(completed=190, failed=2),
            "output_tokens_per_s": Spread.of([105.0, 120.0]),
            "turns": None,
            "kv_fold": "none",
            "memory_bytes": 3000,
            "lengths": "nominal",
            "token_counts": "tokenizer",
            "provenance": elsewhere,
            "efforts": {**CHILD.efforts, "high": effort(0.9, 160, completed=90, truncated=7, failed=3)},
        }
    )
    notes = notes_on([PARENT, child], baselines=["parent_bf16"], child="child")
    for part in (
        "child: the load ended with 190 completed, 2 failed.",
        "FP8 KV cache with unit scales",
        "prompt and answer lengths are nominal",
        "so its text was encoded again",
        "child, high effort: 90 completed, 7 truncated, 3 failed; accuracy is over answered problems.",
        "child, high effort: 7 of 97 answers ran out of tokens. Their mean length counts them as they were cut",
        "the ranges of their rounds overlap",
        "were given different memory",
        "measured on different machines",
    ):
        assert any(part in note for note in notes), part
    assert len(notes) == 9


def test_other_versions_are_told():
    upgraded = PROVENANCE.model_copy(update={"versions": {**PROVENANCE.versions, "python": "3.12", "torch": "2.9"}})
    child = CHILD.model_copy(update={"provenance": upgraded})
    notes = notes_on([PARENT, child], baselines=["parent_bf16"], child="child")
    assert [note for note in notes if "versions" in note] == [
        "child and parent_bf16 were measured with different versions: python 3.12 and 3.11; torch 2.9 and none."
    ]


@pytest.mark.parametrize(
    ("rounds", "overlap"),
    [([111.0, 120.0], False), ([110.0, 120.0], True), ([80.0, 90.0], True), ([80.0, 89.0], False)],
)
def test_rounds_apart_from_the_baselines_range_resolve_the_difference_whoever_is_ahead(rounds, overlap):
    """The parent's are 90 to 110; rounds that were not measured in turn."""
    child = CHILD.model_copy(update={"output_tokens_per_s": Spread.of(rounds), "turns": None})
    told = [note for note in notes_on([PARENT, child], baselines=["parent_bf16"], child="child") if "overlap" in note]
    assert len(told) == overlap


def test_every_baseline_has_its_notes_and_bf16_needs_no_scales():
    other = PARENT.model_copy(update={"name": "other", "memory_bytes": 3000, "kv_fold": "none"})
    notes = notes_on([PARENT, other, CHILD], baselines=["parent_bf16", "other"], child="child")
    assert notes == ["child and other were given different memory."]


def test_a_single_round_is_told_because_intervals_of_request_rates_leave_it_out():
    single = measurement("single", [100.0])
    assert notes_on([PARENT, single], baselines=["parent_bf16"], child="single")[0] == (
        "single: throughput was measured in a single round, and no interval says how far another may lie."
    )


@pytest.mark.parametrize(
    ("rounds", "notes"),
    [
        ([150.0, 135.0, 165.0], []),
        ([110.0, 99.0, 121.0], []),
        (
            [150.0, 90.0, 165.0],  # once as fast as the parent
            [
                "child and parent_bf16: not every round had the same one ahead, so their difference in throughput is "
                "not resolved."
            ],
        ),
        (
            [110.0, 85.0, 121.0],
            [
                "child and parent_bf16: not every round had the same one ahead, so their difference in throughput is "
                "not resolved."
            ],
        ),
    ],
)
def test_rounds_in_turn_are_told_apart_pair_by_pair(rounds, notes):
    """The parent's are 100, 90, 110: a machine that drifts by a fifth does not blur a child that is always 1.1 times as
    fast beside it."""
    child = CHILD.model_copy(update={"output_tokens_per_s": Spread.of(rounds)})
    assert notes_on([PARENT, child], baselines=["parent_bf16"], child="child") == notes


def test_a_layer_block_reads_a_configs_own_entry():
    assert LayerBlock.model_validate({"num_local_experts": 8, "sliding_window": None}).sliding_window is None
