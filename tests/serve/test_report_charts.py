"""Scales, ticks and the places of what is drawn."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzle_trtllm.axes import Axis, round_step
from puzzle_trtllm.serve.metrics.units import show_bytes, show_number
from puzzle_trtllm.serve.report.charts.frontier import frontier_chart
from puzzle_trtllm.serve.report.charts.layer_map import layer_map
from puzzle_trtllm.serve.report.charts.length_budget import length_budget_chart
from puzzle_trtllm.serve.report.charts.memory import MOST_SEGMENTS, memory_chart
from puzzle_trtllm.serve.report.charts.throughput import throughput_chart
from puzzle_trtllm.serve.report.compare import compare
from puzzle_trtllm.serve.report.frontier import frontier_of
from puzzle_trtllm.svg import NAME_PX, text_width
from tests.serve.measurements import effort, family, measurement


def test_axes_map_their_ends_and_middles():
    linear = Axis(low=0, high=200, start=10, end=110)
    assert [linear(v) for v in (0, 50, 200)] == [10, 35, 110]
    log = Axis(low=1, high=100, start=0, end=100, logarithmic=True)
    assert [log(v) for v in (1, 10, 100)] == pytest.approx([0, 50, 100])
    upwards = Axis(low=0, high=1, start=300, end=100)
    assert upwards(0.25) == 250


def test_ticks_are_round_and_inside():
    assert Axis(low=0, high=1130, start=0, end=1).ticks() == [0, 500, 1000]
    assert Axis(low=0, high=1.03, start=0, end=1).ticks(6) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    log = Axis(low=0.8, high=24, start=0, end=1, logarithmic=True)
    assert log.ticks() == pytest.approx([1, 2, 5, 10, 20])


@settings(deadline=None)
@given(st.floats(min_value=1e-6, max_value=1e9))
def test_steps_are_one_two_or_five_times_a_power_of_ten_and_never_too_small(rough):
    step = round_step(rough)
    mantissa = float(f"{step:.6e}".split("e")[0])
    assert mantissa in (1.0, 2.0, 5.0)
    assert rough * 0.999 <= step <= rough * 2.5 * 1.001


def drawn(svg, css):
    """Geometry of the shapes with exactly these classes: (x, y, width, height)."""
    pattern = rf'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)" rx="\d" class="{css}">'
    return [tuple(map(float, found)) for found in re.findall(pattern, svg)]


def test_the_memory_chart_draws_weights_and_sequences_to_scale():
    engines = family()
    svg = memory_chart(engines, {"parent_bf16": "s0", "parent_fp8": "s1", "child": "child"})
    (_, _, cap_width, _), *_ = drawn(svg, "empty")
    ((_, _, weights_width, _),) = drawn(svg, "fill child")
    assert weights_width / cap_width == pytest.approx(750 / 2000, abs=1e-3)
    assert [len(drawn(svg, f"fill pale {style}")) for style in ("s0", "s1", "child")] == [3, 6, 10]


def test_the_memory_chart_says_in_words_what_it_draws():
    parent, _, child = family()
    svg = memory_chart([parent, child], {parent.name: "s0", child.name: "child"})
    words = [element.text for element in ElementTree.fromstring(svg).iter("text")]
    assert words[:4] == [
        "parent_bf16",
        "1.95 KiB given",
        "weights 0.98 KiB",
        "room for 3 sequences of 256 tokens (300 B each)",
    ]
    hovers = re.findall(r"<title>([^<]*)</title>", svg)
    assert hovers[:3] == ["1.95 KiB given", "weights: 0.98 KiB", "KV cache of sequence 1: 300 B"]
    ((left, top, weights, _),) = drawn(svg, "fill s0")
    first, *_, last = drawn(svg, "fill pale s0")
    assert left + weights < first[0] < left + weights + 2 and last[0] + last[2] < left + 1.9 * weights
    assert {y for _, y, *_ in drawn(svg, "fill pale child")} == {drawn(svg, "fill child")[0][1]} != {top}


def test_weights_beyond_the_memory_fill_it_and_leave_room_for_nothing():
    engine = measurement("large", [1.0], weight_bytes=2500)
    svg = memory_chart([engine, family()[0]], {"large": "s0", "parent_bf16": "s1"})
    assert drawn(svg, "fill s0")[0][:3] == drawn(svg, "empty")[0][:3]
    assert drawn(svg, "fill pale s0") == []
    assert "room for 0 sequences of 256 tokens" in svg
    assert memory_chart([engine, measurement("free", [1.0], memory_bytes=None)], {}) is None


def test_more_sequences_than_can_be_seen_become_one_block():
    engine = measurement("many", [1.0], kv_bytes_per_sequence=2)
    assert engine.sequences_held > MOST_SEGMENTS
    assert len(drawn(memory_chart([engine], {"many": "child"}), "fill pale child")) == 1


def name_spans(svg):
    """(y, from, to) of every name in a drawing."""
    pattern = (
        r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)"(?: textLength="([\d.]+)"[^>]*)? class="name">([^<]*)<'
    )
    for x, y, anchor, squeezed, name in re.findall(pattern, svg):
        width = float(squeezed or text_width(name, NAME_PX))
        start = float(x) - (width if anchor == "end" else 0)
        yield float(y), start, start + width


@pytest.mark.parametrize("length", [4, 26, 80])
def test_names_of_any_length_are_whole_inside_the_drawing_and_apart(length):
    """As `gpt-oss-puzzle-88B, FP8 KV` has: 26 characters."""
    engines = [engine.model_copy(update={"name": f"{engine.name:x<{length}}"[:length]}) for engine in family()[1:]]
    parent, child = engines
    styles, comparison = {parent.name: "s0", child.name: "child"}, compare(child, parent)
    drawings = [
        throughput_chart(engines, styles, [comparison]),
        memory_chart(engines, styles),
        frontier_chart(engines, styles, baseline=parent),
        length_budget_chart([comparison]),
    ]
    for svg in drawings:
        spans = sorted(name_spans(svg))
        assert spans and all(start >= 0 and end <= 960 for _, start, end in spans)
        assert all(y < next_y or end < start for (y, _, end), (next_y, start, _) in pairwise(spans))
        assert parent.name in svg


def numbers(svg, tag, *names):
    """The named attributes of every element `tag` that has them, as floats."""
    for element in ElementTree.fromstring(svg).iter(tag):
        if set(names) <= set(element.keys()):
            yield tuple(float(element.get(name)) for name in names)


@pytest.mark.parametrize("uncapped", [True, False])
@pytest.mark.parametrize("held", [True, False])
def test_everything_drawn_lies_inside_its_drawing(uncapped, held):
    changes = {} if uncapped else {"uncapped_output_tokens_per_s": None}
    changes |= {} if held else {"memory_bytes": None}
    engines = [engine.model_copy(update=changes) for engine in family()]
    *parents, child = engines
    styles = {engine.name: style for engine, style in zip(engines, ("s0", "s1", "child"), strict=True)}
    comparisons = [compare(child, parent) for parent in parents]
    drawings = [
        throughput_chart(engines, styles, comparisons),
        *([memory_chart(engines, styles)] if held else []),
        frontier_chart(engines, styles, baseline=parents[0]),
        length_budget_chart(comparisons),
        layer_map(child, parents[0]),
    ]
    for svg in drawings:
        left, top, width, height = map(float, ElementTree.fromstring(svg).get("viewBox").split())
        boxes = [(x, y, x + w, y + h) for x, y, w, h in numbers(svg, "rect", "x", "y", "width", "height")]
        boxes += [(x - r, y - r, x + r, y + r) for x, y, r in numbers(svg, "circle", "cx", "cy", "r")]
        boxes += numbers(svg, "line", "x1", "y1", "x2", "y2")
        boxes += [(x, y - 11, x, y + 3) for x, y in numbers(svg, "text", "x", "y")]
        assert width == 960
        for x1, y1, x2, y2 in boxes:
            assert left <= min(x1, x2) <= max(x1, x2) <= width and top <= min(y1, y2) <= max(y1, y2) <= height


def test_the_throughput_chart_draws_medians_ranges_and_rounds_to_scale():
    engines = family()
    styles = {engine.name: style for engine, style in zip(engines, ("s0", "s1", "child"), strict=True)}
    svg = throughput_chart(engines, styles, [compare(engines[2], engines[0])])
    ((left, top, parent, bar),) = drawn(svg, "fill s0")
    ((_, _, fp8, _),), ((_, child_top, child, _),) = drawn(svg, "fill s1"), drawn(svg, "fill child")
    ((_, pale_top, uncapped, thin),) = drawn(svg, "fill pale child")
    assert [width / parent for width in (fp8, child, uncapped)] == pytest.approx([1.6, 2.0, 4.2], rel=1e-3)
    assert child_top + bar < pale_top and thin < bar
    assert pale_top - child_top == drawn(svg, "fill pale s0")[0][1] - top
    unit = parent / 100
    whiskers = re.findall(r'<line x1="([\d.]+)" y1="([\d.]+)" x2="([\d.]+)" y2="[\d.]+" class="whisker">', svg)
    low, middle, high = map(float, whiskers[0])
    assert [(low - left) / unit, (high - left) / unit] == pytest.approx([90, 110], rel=1e-3)
    assert middle == top + bar / 2
    dots = [(x - left) / unit for x, y, _ in numbers(svg, "circle", "cx", "cy", "r") if y == middle]
    assert dots == pytest.approx([100, 90, 110], rel=1e-3)
    words = [element.text for element in ElementTree.fromstring(svg).iter("text")]
    assert {"100 tok/s", "160 tok/s", "200 tok/s · 2.00×", "400 uncapped", "420 uncapped · 1.05×"} <= set(words)
    assert {"BF16 KV · room for 3", "FP8 KV · room for 10"} <= set(words)
    assert "<title>median 100 tok/s; rounds 100, 90.0, 110</title>" in svg


def marks_of(svg):
    """(letter, x, y, classes, hover) of every effort's mark."""
    pattern = (
        r'<circle cx="([\d.]+)" cy="([\d.]+)" r="10" class="([^"]*)"><title>([^<]*)</title></circle><text [^>]*>(\w)<'
    )
    for x, y, css, hover, letter in re.findall(pattern, svg):
        yield letter, float(x), float(y), css, hover


def test_the_frontier_chart_places_rates_by_their_ratio_and_accuracies_with_their_intervals():
    """Rates over the parent's at high effort: parent 10, 2, 1; child 20, 5, 1.25; the axis is logarithmic."""
    parent, _, child = family()
    styles = {parent.name: "s0", child.name: "child"}
    svg = frontier_chart([parent, child], styles, baseline=parent, frontier=frontier_of([parent, child]))
    marks = list(marks_of(svg))
    assert [letter for letter, *_ in marks] == list("LMHLMH")
    (low, _, high), (child_low, _, child_high) = ([x for _, x, *_ in part] for part in (marks[:3], marks[3:]))
    decade = low - high
    assert decade > 0
    assert child_low - low == pytest.approx(decade * math.log10(2), abs=0.05)
    assert child_high - high == pytest.approx(decade * math.log10(1.25), abs=0.05)
    heights = [y for _, _, y, *_ in marks[:3]]  # accuracies 0.4, 0.8 and 0.9
    assert heights[0] - heights[1] == pytest.approx(4 * (heights[1] - heights[2]), abs=0.05)
    assert [css.split()[0] for *_, css, _ in marks] == ["hollow", "fill", "hollow", "fill", "fill", "fill"]
    hovers = [hover for *_, hover in marks]
    assert hovers[0] == (
        "parent_bf16, low effort: accuracy 40.0% (35.0% to 45.0%), 10.0 requests/s (10.0×), 10.0 tokens a request; "
        "dominated by child at low"
    )
    interval = re.search(r'<line x1="[\d.]+" y1="([\d.]+)" x2="[\d.]+" y2="([\d.]+)" class="stroke thin s0">', svg)
    bottom, top = map(float, interval.groups())
    assert (bottom + top) / 2 == pytest.approx(heights[0], abs=0.05)
    assert bottom - top == pytest.approx(heights[1] - heights[2], abs=0.05)  # plus and minus 0.05
    (front,) = re.findall(r'<polyline points="([^"]*)" class="front">', svg)
    assert [float(point.split(",")[0]) for point in front.split()] == sorted(
        x for _, x, _, css, _ in marks if "fill" in css
    )


def test_the_frontier_chart_names_its_axes_and_their_ticks():
    parent, _, child = family()
    svg = frontier_chart([parent, child], {parent.name: "s0", child.name: "child"}, baseline=parent)
    words = {element.text for element in ElementTree.fromstring(svg).iter("text")}
    assert {"request rate relative to parent_bf16 at high effort", "accuracy"} <= words
    assert {"0%", "20%", "100%", "1×", "2×", "5×", "10×", "20×"} <= words


def test_rates_that_are_near_stand_on_a_linear_axis_from_zero():
    near = {"low": effort(0.5, 100), "high": effort(0.9, 200)}
    engine = measurement("one", [100.0], efforts=near)
    svg = frontier_chart([engine], {"one": "child"}, baseline=engine)
    (_, low, *_), (_, high, *_) = marks_of(svg)
    assert (low - 74) / (high - 74) == pytest.approx(2, abs=0.01)
    nothing = measurement("one", [100.0], efforts={})
    assert frontier_chart([nothing], {"one": "child"}, baseline=nothing) is None


def test_the_length_budget_reaches_to_the_speedup_and_marks_each_efforts_length():
    """The child writes 1, 0.8 and 1.6 times as many tokens, at 2 times the speed."""
    parent, _, child = family()
    svg = length_budget_chart([compare(child, parent)])
    ((left, _, width, _),) = drawn(svg, "fill pale child")
    marks = {letter: (x - left) / width * 2 for letter, x, *_ in marks_of(svg)}
    assert marks == pytest.approx({"L": 1.0, "M": 0.8, "H": 1.6}, abs=0.01)
    hovers = {letter: hover for letter, *_, hover in marks_of(svg)}
    assert hovers["H"] == "high effort: 1.60× as long; may change by +25% until no request is gained"
    words = [element.text for element in ElementTree.fromstring(svg).iter("text")]
    assert {"vs parent_bf16", "gone at 2.00×", "1×", "2×"} <= set(words)


def test_the_layer_map_draws_experts_to_scale_over_the_parents():
    parent, _, child = family()
    svg = layer_map(child, parent)
    # Child: 8, 8, 4, 6 of 8 experts as upper bars; the one full-attention layer adds a solid lower bar, drawn last.
    heights = [height for *_, height in drawn(svg, "fill child")]
    *experts, full = heights
    assert [height / experts[0] for height in experts] == pytest.approx([1, 1, 0.5, 0.75])
    windows = [height for *_, height in drawn(svg, "fill pale child")]
    assert windows[0] == windows[2] < windows[1] < full  # 32, 64, 32 tokens, and full attention


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (512, "512 B"),
        (1024, "1.00 KiB"),
        (65_254_000_000, "60.8 GiB"),
        (1000, "0.98 KiB"),
        (153 * 2**20, "153 MiB"),
    ],
)
def test_bytes_are_written_in_binary_units(count, text):
    assert show_bytes(count) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.1234, "0.123"), (4.56, "4.56"), (78.94, "78.9"), (1234.5, "1,234"), (0.0, "0.000")]
)
def test_numbers_are_written_with_three_digits(value, text):
    assert show_number(value) == text
