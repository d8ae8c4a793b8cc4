"""report.json, the table and the page, from the same made-up engines."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from puzzle_trtllm import terminal
from puzzle_trtllm.errors import BenchError, ConfigError
from puzzle_trtllm.scenario import Spread as LengthSpread
from puzzle_trtllm.serve.metrics.statistics import Spread
from puzzle_trtllm.serve.report import EngineMeasurement, make_report, maker
from puzzle_trtllm.serve.report.compare import compare
from puzzle_trtllm.serve.report.document import DEFINITIONS
from puzzle_trtllm.serve.report.files import load_measurement
from puzzle_trtllm.serve.report.frontier import frontier_of
from puzzle_trtllm.serve.report.summary import Report, headline, headline_tiles
from puzzle_trtllm.serve.report.table import engine_table
from tests.serve.measurements import SCENARIO, family, measurement

BASELINES = ["parent_bf16", "parent_fp8"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    document = make_report(family(), baselines=BASELINES, child="child", out=out, extra={"seed": 7}, quiet=True)
    return out, document


def test_a_measurement_of_no_number_is_refused_with_its_file(tmp_path):
    file = family()[0].save(tmp_path / "parent.json")
    file.write_text(file.read_text().replace('"median": 100.0', '"median": NaN', 1))
    with pytest.raises(ConfigError, match=r"parent\.json: not valid JSON: NaN is no finite number"):
        load_measurement("parent", [file])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"median": 100.0', '"median": "NaN"', r"output_tokens_per_s\.median: .*valid number .found 'NaN'"),
        ('"sliding_window": 32', '"sliding_window": 0', r"blocks\.0\.sliding_window: .*greater than .*found 0"),
        ('"weight_bytes": 1000', '"weight_bytes": true', r"weight_bytes: .*valid integer .found True"),
    ],
)
def test_a_measurement_with_a_wrong_value_is_refused_with_its_key(tmp_path, old, new, message):
    file = family()[0].save(tmp_path / "parent.json")
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(ConfigError, match=rf"parent\.json: {message}"):
        load_measurement("parent", [file])


def test_an_engine_that_generated_nothing_has_a_report_without_a_frontier_chart(tmp_path):
    parent, parent_fp8, child = family()
    stalled = child.model_copy(update={"output_tokens_per_s": Spread.of([0.0, 0.0, 0.0])})
    document = make_report([parent, parent_fp8, stalled], baselines=BASELINES, child="child", out=tmp_path, quiet=True)
    assert document["child"]["per_token_speedup"] == 0.0
    assert "Accuracy against speed" not in (tmp_path / "report.html").read_text()


def test_lengths_that_scatter_are_not_told_as_exact_ones(tmp_path):
    scenario = SCENARIO.model_copy(update={"output_spread": LengthSpread(uniform=0.5)})
    engines = [engine.model_copy(update={"scenario": scenario}) for engine in family()]
    make_report(engines, baselines=BASELINES, child="child", out=tmp_path, quiet=True)
    assert "tokens a request: 128 in, about 128 out." in (tmp_path / "report.html").read_text()


def test_every_engine_has_a_colour_that_the_page_defines(tmp_path):
    parent, _, child = family()
    parents = [parent.model_copy(update={"name": f"p{index}"}) for index in range(6)]
    make_report([*parents, child], baselines=["p0"], child="child", out=tmp_path, quiet=True)
    page = (tmp_path / "report.html").read_text()
    for style in re.findall(r'class="dot (\w+)"', page):
        assert f".dot.{style} {{ background" in page


def test_a_page_that_cannot_be_drawn_leaves_no_half_of_a_report(tmp_path, monkeypatch):
    monkeypatch.setattr(maker, "report_page", lambda report: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_report(family(), baselines=BASELINES, child="child", out=tmp_path / "report", quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_the_document_is_what_is_returned(made):
    out, document = made
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(document))


@pytest.mark.parametrize("name", [*BASELINES, "child"])
def test_every_engine_has_the_promised_keys(made, name):
    entry = made[1][name]
    for key in ("weight_bytes", "kv_bytes_per_sequence", "kv_sequence_tokens", "output_tokens_per_s", "memory_bytes"):
        assert isinstance(entry[key], (int, float)), key
    assert len(entry["output_tokens_per_s_rounds"]) == 3
    assert entry["output_tokens_per_s_range"] == [
        min(entry["output_tokens_per_s_rounds"]),
        max(entry["output_tokens_per_s_rounds"]),
    ]
    assert list(entry["efforts"]) == ["low", "medium", "high"]
    for effort in entry["efforts"].values():
        assert {"accuracy", "mean_output_tokens", "requests_per_s", "measured_requests_per_s"} <= set(effort)
        assert effort["requests_per_s"] == pytest.approx(entry["output_tokens_per_s"] / effort["mean_output_tokens"])


def test_the_child_has_its_ratios_to_both_baselines(made):
    child = made[1]["child"]
    assert child["per_token_speedup"] == pytest.approx(2.0)
    assert child["uncapped_per_token_speedup"] == pytest.approx(1.05)
    assert child["efforts"]["high"]["relative_request_rate"] == pytest.approx(1.25)
    assert child["efforts"]["medium"]["accuracy_retention"] == pytest.approx(0.9)
    # Against FP8: 200/160 a token; at high effort (200/160)/(160/100).
    other = child["vs_parent_fp8"]
    assert other["per_token_speedup"] == pytest.approx(1.25)
    assert other["efforts"]["high"]["relative_request_rate"] == pytest.approx(0.78125)
    assert other["efforts"]["high"]["accuracy_retention"] == pytest.approx(1.0)
    assert "vs_parent_bf16" not in child
    assert not any("per_token_speedup" in made[1][name] for name in BASELINES)


def test_a_ratio_over_zero_is_null_with_its_reason(made):
    low = made[1]["child"]["vs_parent_fp8"]["efforts"]["low"]
    assert low["accuracy_retention"] is None
    assert low["accuracy_retention_reason"] == "parent_fp8 solved no problem at low effort"
    assert low["relative_request_rate"] == pytest.approx(1.25)


def test_the_document_carries_its_context(made):
    document = made[1]
    assert document["report"] == {"child": "child", "baselines": BASELINES}
    assert (document["scenario"]["concurrency"], document["extra"], document["notes"]) == (32, {"seed": 7}, [])
    assert document["child"]["blocks"][1] == {"num_local_experts": 8, "sliding_window": 64}
    assert document["definitions"] == dict(DEFINITIONS)


class Page(HTMLParser):
    """Checks nesting and collects what a browser would load."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self, html):
        super().__init__()
        self.stack, self.loads, self.text, self.tags = [], [], [], []
        self.feed(html)
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for key, value in attrs if key in ("src", "href", "xlink:href", "srcset")]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def page_of(engines, out, **options):
    make_report(engines, out=out, quiet=True, **{"baselines": BASELINES, "child": "child", **options})
    return (out / "report.html").read_text()


def test_the_page_is_well_formed_and_loads_nothing(made):
    html = (made[0] / "report.html").read_text()
    page = Page(html)
    assert page.loads == []
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not re.search(r"https?://|url\(|@import", html)
    assert page.tags.count("svg") == 5  # throughput, memory, frontier, length budget, layer map
    assert "prefers-color-scheme: dark" in html


def test_the_page_says_what_was_measured(made):
    text = " ".join(" ".join(Page((made[0] / "report.html").read_text()).text).split())
    assert (
        "Given 1.95 KiB for weights and KV cache, child generates 2.00× the tokens per second of parent_bf16 and 1.25× "
        "those of parent_fp8. Without a memory limit the ratio to parent_bf16 is 1.05×. At high effort it answers "
        "1.25× the requests of parent_bf16 and keeps 100.0% of its accuracy." in text
    )
    assert "room for 10 sequences of 256 tokens (120 B each)" in text
    assert "window × layers: 32 × 2, 64 × 1, full × 1" in text


def summed_up(engines, baselines=BASELINES):
    """(headline, tiles) of a report on these engines, the last one being the child."""
    child = engines[-1]
    comparisons = [compare(child, next(e for e in engines if e.name == name)) for name in baselines]
    report = Report(title="t", engines=tuple(engines), child=child, comparisons=tuple(comparisons), notes=())
    tiles = {tile.caption: (tile.figure, tile.detail) for tile in headline_tiles(report)}
    return headline(report), tiles


def test_the_headline_figures_are_the_childs_against_the_first_baseline():
    assert summed_up(family())[1] == {
        "tokens per second": ("2.00×", "2.00× to 2.20× over rounds"),
        "requests per second, high effort": ("1.25×", "160 tokens a request against 100"),
        "accuracy retained, high effort": ("100.0%", "90.0% against 90.0%"),
        "weights": ("−25%", "750 B against 0.98 KiB"),
        "KV cache of a sequence": ("−60%", "120 B against 300 B"),
    }


def test_a_headline_figure_that_grew_says_so_and_what_was_not_measured_has_none():
    parent = measurement("parent", [100.0], efforts={}, evaluation=None)
    child = measurement("child", [150.0], efforts={}, evaluation=None, weight_bytes=1100)
    text, tiles = summed_up([parent, child], ["parent"])
    assert tiles == {
        "tokens per second": ("1.50×", "against parent"),  # one round has no range
        "weights": ("+10%", "1.07 KiB against 0.98 KiB"),
        "KV cache of a sequence": ("+0%", "300 B against 300 B"),
    }
    assert text == ("Given 1.95 KiB for weights and KV cache, child generates 1.50× the tokens per second of parent.")


def test_rounds_that_were_not_measured_in_turn_have_no_range_in_the_headline():
    parent, _, child = family()
    tiles = summed_up([parent, child.model_copy(update={"turns": None})], ["parent_bf16"])[1]
    assert tiles["tokens per second"] == ("2.00×", "against parent_bf16")


@pytest.mark.parametrize(
    ("changes", "given"),
    [
        ({"memory_bytes": 3000}, ""),  # other memory than the baseline's
        ({"memory_bytes": None}, ""),
        ({"num_ranks": 2}, "Given 1.95 KiB on each GPU for weights and KV cache, "),
    ],
)
def test_the_headline_names_the_memory_that_both_were_given(changes, given):
    parent, _, child = family()
    text, _ = summed_up([parent, child.model_copy(update=changes)], ["parent_bf16"])
    assert text.startswith(f"{given}child generates 2.00× the tokens per second of parent_bf16.")


def rows_of(engines):
    """The printed table against both baselines, cell by cell."""
    child = engines[-1]
    comparisons = tuple(compare(child, engine) for engine in engines[:-1])
    report = Report(
        title="t", engines=tuple(engines), child=child, comparisons=comparisons, notes=(), frontier=frontier_of(engines)
    )
    columns = ([str(cell) for cell in column.cells] for column in engine_table(report).columns)
    return [tuple(row) for row in zip(*columns, strict=True)]


def test_every_row_of_the_table_by_hand():
    rows = rows_of(family())
    efforts = {row[0]: index for index, row in enumerate(rows) if row[0].endswith(" effort") and not any(row[1:])}
    assert list(efforts) == ["low effort", "medium effort", "high effort"]
    assert rows[: efforts["low effort"]] == [
        ("weights", "0.98 KiB", "0.98 KiB", "750 B"),
        ("KV cache, 256 tokens", "300 B", "150 B", "120 B"),
        ("memory given", "1.95 KiB", "1.95 KiB", "1.95 KiB"),
        ("  sequences that fit", "3", "6", "10"),
        ("TTFT ms, p50 / p95", "2.00 / 2.90", "2.00 / 2.90", "2.00 / 2.90"),
        ("tokens/s, median", "100", "160", "200"),
        ("  range of rounds", "90.0 to 110", "150 to 170", "198 to 220"),
        ("  no memory limit", "400", "–", "420"),
        ("speedup vs parent_bf16", "", "", "2.00×"),
        ("  no memory limit", "", "", "1.05×"),
        ("speedup vs parent_fp8", "", "", "1.25×"),
    ]
    assert rows[efforts["high effort"] + 1 :] == [
        ("  accuracy", "90.0%", "90.0%", "90.0%"),
        ("  95% interval", "85.0 to 95.0%", "85.0 to 95.0%", "85.0 to 95.0%"),
        ("  tokens/request", "100.0", "100.0", "160.0"),
        ("  requests/s", "1.00", "1.60", "1.25"),
        ("  rate vs parent_bf16", "", "", "1.25×"),
        ("    95% interval", "", "", "–"),
        ("    vs its high effort", "", "", "1.25×"),
        ("  accuracy vs parent_bf16", "", "", "100.0%"),
        ("  rate vs parent_fp8", "", "", "0.78×"),
        ("    95% interval", "", "", "–"),
        ("    vs its high effort", "", "", "0.78×"),
        ("  accuracy vs parent_fp8", "", "", "100.0%"),
        ("  accuracy and speed", "dominated", "frontier", "dominated"),
    ]
    # Against the FP8 parent's medium effort nobody is as accurate as fast; it solved nothing at low effort.
    assert rows[efforts["high effort"] - 1] == ("  accuracy and speed", "dominated", "frontier", "frontier")
    assert rows[efforts["medium effort"] - 2] == ("  accuracy vs parent_fp8", "", "", "–")


def test_a_fact_that_no_engine_has_gives_no_row():
    bare = {"memory_bytes": None, "uncapped_output_tokens_per_s": None, "latencies": {}, "efforts": {}}
    rows = rows_of([engine.model_copy(update=bare) for engine in family()])
    assert [row[0] for row in rows] == [
        "weights", "KV cache, 256 tokens", "tokens/s, median", "  range of rounds", "speedup vs parent_bf16",
        "speedup vs parent_fp8",
    ]  # fmt: skip


def test_the_table_cuts_no_name_where_there_is_no_terminal(tmp_path, capsys):
    places = [f"parent-fp8-on-{place}" for place in ("h100", "h200", "b200", "gb200")]
    names = {"parent_bf16": places[0], "parent_fp8": places[1], "child": places[2]}
    engines = [e.model_copy(update={"name": names[e.name]}) for e in family()]
    engines.append(engines[0].model_copy(update={"name": places[3]}))
    make_report(engines, out=tmp_path, baselines=[places[0], places[1], places[3]], child=places[2])
    header = capsys.readouterr().out.splitlines()[2]
    assert [name for name in places if name not in header] == []


def test_names_are_escaped_everywhere(tmp_path):
    engines = [e.model_copy(update={"name": e.name.replace("child", "<b>&child")}) for e in family()]
    html = page_of(engines, tmp_path, child="<b>&child")
    Page(html)
    assert "<b>&" not in html
    assert "&lt;b&gt;&amp;child" in html


def test_without_an_evaluation_or_a_memory_cap_the_page_leaves_those_parts_out(tmp_path):
    bare = {"efforts": {}, "evaluation": None, "memory_bytes": None, "uncapped_output_tokens_per_s": None}
    engines = [engine.model_copy(update=bare) for engine in family()]
    html = page_of(engines, tmp_path)
    assert Page(html).tags.count("svg") == 2  # throughput and layer map
    assert "accuracy" not in " ".join(Page(html).text).split("How each number is defined")[0]


def test_the_table_shows_every_engine_in_80_columns(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(terminal, "WIDTH_OF_NO_TERMINAL", 80)
    make_report(family(), baselines=BASELINES, child="child", out=tmp_path)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    rows = {line.split("│")[1].strip(): line for line in printed.splitlines() if line.startswith("│")}
    assert rows["tokens/s, median"].split("│")[2:5] == [f" {v:>13} " for v in ("100", "160", "200")]
    assert "2.00×" in rows["speedup vs parent_bf16"]
    assert "1.25×" in rows["speedup vs parent_fp8"]


def test_a_measurement_survives_its_file(tmp_path):
    for engine in family():
        assert EngineMeasurement.load(engine.save(tmp_path / f"{engine.name}.json")) == engine


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["a", "a"], {"baselines": ["a"], "child": "a"}, "a: two engines of one name"),
        (["a", "notes"], {"baselines": ["a"], "child": "notes"}, "notes: no engine may have this name"),
        (["a", "b"], {"baselines": ["c"], "child": "b"}, r"c: no such engine \(expected one of: a, b\)"),
        (["a", "b"], {"baselines": [], "child": "b"}, "b: no baseline to compare with"),
        (["a", "b"], {"baselines": ["b"], "child": "b"}, "b: compared with itself"),
    ],
)
def test_names_that_do_not_fit_are_refused_and_nothing_is_written(tmp_path, names, options, message):
    engines = [measurement(name, [1.0]) for name in names]
    with pytest.raises(BenchError, match=message):
        make_report(engines, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
