"""Dominance, by hand and by definition; intervals and both normalisations of a comparison; the Markdown report."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from puzzle_trtllm.serve.report import make_report, resampling
from puzzle_trtllm.serve.report.charts.length_budget import length_budget_chart
from puzzle_trtllm.serve.report.compare import compare
from puzzle_trtllm.serve.report.document import report_document
from puzzle_trtllm.serve.report.frontier import dominates, frontier_of
from puzzle_trtllm.serve.report.resampling import resample_efforts
from tests.serve.measurements import effort, family, measurement

PARENT, PARENT_FP8, CHILD = family()


def with_outcomes(accuracy_of, tokens_of, size=40):
    """An effort whose single answers are kept; its summary is theirs."""
    outcomes = {f"p{i}": (accuracy_of(i), tokens_of(i)) for i in range(size)}
    accuracy = sum(right for right, _ in outcomes.values()) / size
    tokens = sum(count for _, count in outcomes.values()) / size
    return effort(accuracy, tokens).model_copy(update={"outcomes": outcomes})


def test_a_point_is_dominated_by_what_is_no_worse_in_both_and_better_in_one():
    points = {(p.engine, p.effort): p for p in frontier_of([PARENT, CHILD])}
    # requests/s and accuracy: parent L 10, .4  M 2, .8  H 1, .9; child L 20, .5  M 5, .72  H 1.25, .9.
    assert points["parent_bf16", "low"].dominated_by == (("child", "low"),)
    assert points["parent_bf16", "high"].dominated_by == (("child", "high"),)
    assert points["parent_bf16", "medium"].is_on_frontier  # slower than the child's medium, and more accurate
    assert all(points["child", name].is_on_frontier for name in ("low", "medium", "high"))
    assert points["child", "low"].dominated_share is None  # no single answers were kept


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 4)), min_size=1, max_size=8))
def test_dominance_is_an_order_and_something_is_always_on_the_frontier(points):
    for a in points:
        assert not dominates(a, a)
        for b in points:
            assert not (dominates(a, b) and dominates(b, a))
            for c in points:
                assert not (dominates(a, b) and dominates(b, c)) or dominates(a, c)
    assert any(not any(dominates(other, point) for other in points) for point in points)


def test_the_share_of_resamples_tells_a_safe_verdict_from_chance():
    slow = measurement("slow", [100.0] * 3, efforts={"high": with_outcomes(lambda i: i % 2 == 0, lambda i: 100 + i)})
    fast = measurement("fast", [300.0] * 3, efforts={"high": with_outcomes(lambda i: i % 2 == 0, lambda i: 100 + i)})
    better = measurement("better", [100.0] * 3, efforts={"high": with_outcomes(lambda i: i != 0, lambda i: 100 + i)})
    even = measurement("even", [100.0] * 3, efforts={"high": with_outcomes(lambda i: i % 2 == 1, lambda i: 100 + i)})
    shares = {p.engine: p.dominated_share for p in frontier_of([slow, fast, better])}
    assert shares == {"slow": 1.0, "fast": 0.0, "better": 0.0}
    chance = [p.dominated_share for p in frontier_of([slow, even])]
    assert all(0.3 < share < 0.7 for share in chance)


def test_who_answers_as_well_in_fewer_tokens_dominates_and_equals_do_not():
    def right(i):
        return i % 2 == 0

    short = measurement("short", [100.0] * 3, efforts={"high": with_outcomes(right, lambda i: 100 + i)})
    long = measurement("long", [100.0] * 3, efforts={"high": with_outcomes(right, lambda i: 200 + i)})
    twin = short.model_copy(update={"name": "twin"})
    shares = {p.engine: p.dominated_share for p in frontier_of([short, long, twin])}
    assert shares == {"short": 0.0, "long": 1.0, "twin": 0.0}


def test_an_engine_without_single_answers_leaves_no_share_of_resamples():
    kept = {"high": with_outcomes(lambda i: i % 2 == 0, lambda i: 100 + i)}
    engines = [measurement("kept", [100.0] * 3, efforts=kept), CHILD]
    assert [point.dominated_share for point in frontier_of(engines)] == [None] * 4
    assert set(resample_efforts(engines)) == {("kept", "high")}


def test_one_draw_of_problems_counts_for_every_engine_that_answered_them(monkeypatch):
    """Problems in the order of their names, whatever order the answers came in: the draws are of places in it."""
    draws = np.array([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 2, 1]])
    monkeypatch.setattr(resampling, "draw_counts", lambda size: draws)
    both = effort(0.5, 20).model_copy(update={"outcomes": {"b": (True, 20), "c": (False, 60), "a": (True, 10)}})
    lost_c = effort(0.5, 20).model_copy(update={"outcomes": {"b": (True, 21), "a": (False, 11)}})
    engines = [measurement(name, [1.0], efforts={"low": e}) for name, e in (("both", both), ("lost", lost_c))]
    found = resample_efforts(engines)
    assert found["both", "low"].accuracy == pytest.approx([1, 1, 0, 2 / 3])
    assert found["both", "low"].mean_output_tokens == pytest.approx([10, 20, 60, 100 / 3])
    assert found["lost", "low"].accuracy == pytest.approx([0, 1, np.nan, 1], nan_ok=True)
    assert found["lost", "low"].mean_output_tokens == pytest.approx([11, 21, np.nan, 21], nan_ok=True)


def test_both_normalisations():
    efforts = compare(CHILD, PARENT).efforts
    # child 200/10, 200/40, 200/160; the parent at high effort 100/100.
    to_high = {name: result.relative_request_rate_to_high.value for name, result in efforts.items()}
    assert to_high == pytest.approx({"low": 20.0, "medium": 5.0, "high": 1.25})
    only_low = {"efforts": {"low": effort(0.4, 10)}}
    ratio = compare(CHILD.model_copy(update=only_low), PARENT.model_copy(update=only_low)).efforts["low"]
    assert ratio.relative_request_rate_to_high.value is None
    assert ratio.relative_request_rate_to_high.reason == "parent_bf16 was not evaluated at high effort"


def test_break_even_is_where_length_has_eaten_the_speedup():
    comparison = compare(CHILD, PARENT)
    assert comparison.break_even_length_ratio.value == pytest.approx(2.0)
    headroom = {name: result.length_headroom for name, result in comparison.efforts.items()}
    # 2 / (10/10), 2 / (40/50), 2 / (160/100), each - 1
    assert headroom == pytest.approx({"low": 1.0, "medium": 1.5, "high": 0.25})
    longer = effort(0.9, 100 * 2.0)
    at_the_limit = CHILD.model_copy(update={"efforts": {**CHILD.efforts, "high": longer}})
    assert compare(at_the_limit, PARENT).efforts["high"].relative_request_rate.value == pytest.approx(1.0)


def test_rounds_that_were_not_measured_in_turn_meet_by_chance():
    kept = {"high": with_outcomes(lambda i: i % 2 == 0, lambda i: 100 + i)}
    slow = measurement("slow", [100.0, 200.0, 300.0], efforts=kept)
    fast = measurement("fast", [110.0, 220.0, 330.0], efforts=kept)
    shares = {p.engine: p.dominated_share for p in frontier_of([slow, fast])}
    assert shares == {"slow": 1.0, "fast": 0.0}  # the noise is common
    apart = frontier_of([slow, fast.model_copy(update={"turns": None})])
    assert all(0.2 < point.dominated_share < 0.8 for point in apart)


def test_intervals_come_from_single_answers_and_say_so_where_there_are_none():
    ours = {"high": with_outcomes(lambda i: i % 4 != 0, lambda i: 100 + 3 * i)}
    theirs = {"high": with_outcomes(lambda i: i % 5 != 0, lambda i: 90 + 2 * i)}
    child = measurement("child", [200.0, 210.0, 190.0], efforts=ours)
    parent = measurement("parent", [100.0, 100.0, 101.0], efforts=theirs)
    result = compare(child, parent)
    for ratio in (
        result.per_token_speedup,
        result.efforts["high"].relative_request_rate,
        result.efforts["high"].accuracy_retention,
        result.efforts["high"].relative_output_tokens,
    ):
        assert ratio.interval.low < ratio.value < ratio.interval.high
    bare = compare(CHILD, PARENT).efforts["high"].accuracy_retention
    assert bare.interval.reason == "the measurement keeps no single answers"
    one_round = compare(measurement("child", [200.0], efforts=ours), parent)
    assert one_round.per_token_speedup.interval.reason == "throughput was measured in a single round"


def test_intervals_are_the_childs_over_the_baselines():
    """The child is right half as often, twice as long and thrice as fast, at every problem: no interval may hold the
    reciprocal."""
    brief = with_outcomes(lambda i: i % 2 == 0, lambda i: 50 + i % 2)
    ours = {"low": brief, "high": with_outcomes(lambda i: i % 2 == 0, lambda i: 200 + i % 2)}
    theirs = {"low": brief, "high": with_outcomes(lambda i: i % 20 != 1, lambda i: 100 + i % 3)}
    child = measurement("child", [300.0, 301.0, 302.0], efforts=ours)
    result = compare(child, measurement("parent", [100.0, 101.0, 101.0], efforts=theirs))
    high = result.efforts["high"]
    assert 2.9 < result.per_token_speedup.interval.low < result.per_token_speedup.interval.high < 3.1
    assert 0.3 < high.accuracy_retention.interval.low < high.accuracy_retention.interval.high < 0.8
    assert 1.9 < high.relative_output_tokens.interval.low < high.relative_output_tokens.interval.high < 2.1
    for rate in (high.relative_request_rate, high.relative_request_rate_to_high):
        assert 1.4 < rate.interval.low < rate.interval.high < 1.6
    low = result.efforts["low"]
    assert 2.9 < low.relative_request_rate.interval.low < low.relative_request_rate.interval.high < 3.1
    to_high = low.relative_request_rate_to_high  # thrice as fast, and half as long as the baseline at high effort
    assert 5.8 < to_high.interval.low < to_high.value < to_high.interval.high < 6.3


def test_two_rounds_have_an_interval_one_has_none():
    two, one = measurement("two", [100.0, 120.0]), measurement("one", [100.0])
    interval = compare(two, measurement("parent", [100.0, 100.0])).per_token_speedup.interval
    assert (interval.low, interval.high) == pytest.approx((1.0, 1.2))
    for pair in ((two, one), (one, two)):
        assert compare(*pair).per_token_speedup.interval.low is None


def test_report_json_and_markdown_say_all_of_it(tmp_path):
    make_report(family(), baselines=["parent_bf16", "parent_fp8"], child="child", out=tmp_path, quiet=True)
    document = json.loads((tmp_path / "report.json").read_text())
    high = document["child"]["efforts"]["high"]
    assert (high["relative_request_rate"], high["relative_request_rate_to_high"]) == (1.25, 1.25)
    assert (high["relative_request_rate_interval"], high["length_headroom"]) == (None, 0.25)
    assert document["child"]["break_even_length_ratio"] == 2.0
    dominated = {(p["engine"], p["effort"]) for p in document["frontier"] if not p["on_frontier"]}
    assert ("parent_bf16", "low") in dominated
    text = (tmp_path / "report.md").read_text()
    assert "| high | requests/s, same effort | 1.25× |" in text
    assert "| parent_bf16 | low | 40.0% | 10.0 | dominated by child low | – |" in text
    widths = {line.count(" | ") for line in text.split("## By")[0].splitlines() if line.startswith("| ")}
    assert len(widths) == 1


def test_the_markdown_has_every_engine_effort_and_baseline_with_the_notes_first(tmp_path):
    parent, parent_fp8, child = family()
    child = child.model_copy(update={"repeats_prompts": True, "memory_bytes": 3000})
    make_report(
        [parent, parent_fp8, child], baselines=["parent_bf16", "parent_fp8"], child="child", out=tmp_path, quiet=True
    )
    text = (tmp_path / "report.md").read_text()
    introduction, by_effort, bf16, fp8, frontier = text.split("\n## ")
    assert "> - child: rounds had the same prompts" in introduction
    assert "> - child and parent_fp8 were given different memory." in introduction
    for line in (
        "| engine | weights | KV of 256 tokens | sequences that fit | tokens/s (range of rounds) |",
        "| parent_bf16 | 0.98 KiB | 300 B | 3 | 100 (90.0 to 110) |",
        "| child | 750 B | 120 B | 18 | 200 (198 to 220) |",
    ):
        assert line in introduction
    assert by_effort.count("\n| ") == 2 + 9
    assert "| high | child | 90.0% (85.0 to 95.0%) | 160.0 | 1.25 |" in by_effort
    assert bf16.startswith("child against parent_bf16") and fp8.startswith("child against parent_fp8")
    for line in (
        "|  | tokens/s | 1.25× (1.25 to 1.32) |",
        "|  | break-even length ratio | 1.25× the baseline's tokens a request |",
        "| high | requests/s, same effort | 0.78× |",
        "| high | requests/s, to its high effort | 0.78× |",
        "| high | tokens a request | 1.60× |",
        "| high | length headroom | -22% |",
        "| high | accuracy retained | 1.00× |",
        "| low | accuracy retained | – (parent_fp8 solved no problem at low effort) |",
    ):
        assert line in fp8
    assert "| parent_bf16 | high | 90.0% | 1.00 | dominated by parent_fp8 high, child high | – |" in frontier
    assert "| child | medium | 72.0% | 5.00 | on the frontier | – |" in frontier


def test_the_markdown_of_engines_without_an_evaluation_ends_with_the_engines(tmp_path):
    bare = [engine.model_copy(update={"efforts": {}, "evaluation": None}) for engine in family()]
    make_report(bare, baselines=["parent_bf16", "parent_fp8"], child="child", out=tmp_path, quiet=True)
    assert "## " not in (tmp_path / "report.md").read_text()


def test_report_json_has_every_baseline_and_its_intervals_or_why_there_are_none():
    ours = {"high": with_outcomes(lambda i: i % 4 != 0, lambda i: 100 + 3 * i)}
    theirs = {"high": with_outcomes(lambda i: i % 5 != 0, lambda i: 90 + 2 * i)}
    child = measurement("child", [200.0, 210.0, 190.0], efforts=ours)
    parents = [measurement(name, [100.0, 100.0, 101.0], efforts=theirs) for name in ("p0", "p1", "p2")]
    parents.append(measurement("once", [100.0], efforts={"high": effort(0.8, 100)}))
    comparisons = [compare(child, parent) for parent in parents]
    document = report_document([*parents, child], comparisons, child="child", notes=["n"], extra={})
    assert (document["kind"], document["schema_version"], document["notes"]) == ("report", 1, ["n"])
    entries = [document["child"], *(document["child"][f"vs_{name}"] for name in ("p1", "p2"))]
    for entry, comparison in zip(entries, comparisons, strict=False):
        retention = comparison.efforts["high"].accuracy_retention
        high = entry["efforts"]["high"]
        assert high["accuracy_retention"] == retention.value
        assert high["accuracy_retention_interval"] == [retention.interval.low, retention.interval.high]
        assert entry["per_token_speedup_range"] == list(comparison.per_token_speedup_range)
    once = document["child"]["vs_once"]
    assert (once["per_token_speedup"], once["per_token_speedup_range"]) == (2.0, None)
    assert once["per_token_speedup_interval"] is None
    assert once["per_token_speedup_interval_reason"] == "throughput was measured in a single round"
    high = once["efforts"]["high"]
    assert high["accuracy_retention_interval_reason"] == "the measurement keeps no single answers"


def test_the_length_budget_marks_every_effort_or_is_left_out():
    svg = length_budget_chart([compare(CHILD, PARENT), compare(CHILD, PARENT_FP8)])
    assert svg.count("<circle") == 6
    assert "gone at 2.00×" in svg and "gone at 1.25×" in svg
    assert "high effort: 1.60× as long; may change by -22%" in svg  # against the FP8 parent: 1.25 / 1.6
    assert length_budget_chart([]) is None
