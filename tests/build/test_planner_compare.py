"""The heat map, and `plan` from the command line with everything a user can get wrong."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from puzzle_trtllm.architecture import PuzzleArchitecture
from puzzle_trtllm.build.planner import Load, compare, plan, plan_json
from puzzle_trtllm.build.planner.comparison import Comparison
from puzzle_trtllm.build.planner.heat_map import colour_of, heat_map_svg, load_name, text_colour_of, write_heat_map
from puzzle_trtllm.errors import ConfigError, PuzzleError
from puzzle_trtllm.gpus import load_gpu, load_gpus
from puzzle_trtllm.svg import text_width
from tests.front_door.cli import assert_user_error, invoke, last_json, run

MakeCheckpoint = Callable[..., Path]
DATA = Path(__file__).parents[1] / "data"
PARENT_FILE, CHILD_FILE = DATA / "gpt-oss-120b.config.json", DATA / "gpt-oss-puzzle-88b.config.json"
PARENT, CHILD = PuzzleArchitecture.from_path(PARENT_FILE), PuzzleArchitecture.from_path(CHILD_FILE)
LONG = ("--isl", "65536", "--osl", "65536")


@pytest.fixture(scope="module")
def map_() -> Comparison:
    gpus = {name: gpu for name, gpu in load_gpus().items() if name in ("h100-80gb", "l40s-48gb", "a100-80gb")}
    return compare(PARENT, CHILD, gpus=gpus, loads=[Load(isl=4096, osl=4096), Load(isl=65536, osl=65536)])


def test_a_cell_is_the_ratio_of_two_plans(map_: Comparison) -> None:
    cell = next(c for row in map_.rows for c in row if (c.gpu, c.num_gpus, c.load.isl) == ("h100-80gb", 8, 65536))
    child, parent = (
        plan(model, gpu=load_gpu("h100-80gb"), num_gpus=8, load=Load(isl=65536, osl=65536)).tokens_per_s
        for model in (CHILD, PARENT)
    )
    assert cell.speedup == pytest.approx(child / parent)
    assert cell.text == f"{child / parent:.2f}x"


def test_a_cell_in_json_has_both_rates_and_layouts_and_nothing_where_nothing_fits(map_: Comparison) -> None:
    cells = map_.to_json()["cells"]
    assert [(cell["gpu"], cell["num_gpus"], cell["isl"]) for cell in cells] == [
        (cell.gpu, cell.num_gpus, cell.load.isl) for row in map_.rows for cell in row
    ]
    by_setup = {(cell["gpu"], cell["num_gpus"], cell["isl"]): cell for cell in cells}
    fits, no_room = by_setup["h100-80gb", 8, 65536], by_setup["l40s-48gb", 1, 4096]
    assert fits["speedup"] == pytest.approx(fits["child_tokens_per_s"] / fits["parent_tokens_per_s"])
    setup = {"gpu": load_gpu("h100-80gb"), "num_gpus": 8, "load": Load(isl=65536, osl=65536)}
    for name, model in (("child", CHILD), ("parent", PARENT)):
        p = plan(model, **setup)
        assert (fits[f"{name}_tokens_per_s"], fits[f"{name}_layout"]) == (p.tokens_per_s, p.setup.layout.name)
        assert (fits[f"{name}_kv_dtype"], by_setup["a100-80gb", 8, 65536][f"{name}_kv_dtype"]) == ("fp8", "bf16")
    assert no_room["verdict"] == "no room"
    keys = ("tokens_per_s", "layout", "kv_dtype")
    assert {no_room[f"{model}_{key}"] for model in ("child", "parent") for key in keys} == {None}


def test_long_sequences_and_small_memory_pay_most(map_: Comparison) -> None:
    speedup = {(c.gpu, c.num_gpus, c.load.isl): c.speedup for row in map_.rows for c in row}
    assert (speedup["h100-80gb", 8, 65536] or 0) > (speedup["h100-80gb", 8, 4096] or 9)
    assert (speedup["h100-80gb", 1, 4096] or 0) > (speedup["h100-80gb", 8, 4096] or 9)


def test_where_nothing_fits_the_map_says_so(map_: Comparison) -> None:
    row = next(row for row in map_.rows if (row[0].gpu, row[0].num_gpus) == ("l40s-48gb", 1))
    assert {cell.text for cell in row} == {"no room"}
    assert {cell.speedup for cell in row} == {None}


def test_only_the_child_fits() -> None:
    """51 GiB of memory, made up: the child's 46.56 GiB leave room, the parent's 60.77 GiB do not fit."""
    gpu = replace(load_gpu("h100-80gb"), name="half", memory_bytes=51 * 2**30)
    cell = compare(PARENT, CHILD, gpus={"half": gpu}, nums_gpus=[1], loads=[Load(isl=64, osl=64)]).rows[0][0]
    assert (cell.text, cell.speedup) == ("child only", None)


def test_gpus_without_fp8_compare_bf16_with_bf16(map_: Comparison) -> None:
    cells = [c for row in map_.rows for c in row if c.gpu == "a100-80gb"]
    assert {p.setup.kv_dtype for c in cells for p in (c.child, c.parent) if p} == {"bf16"}


def test_swapped_models_are_found_out() -> None:
    with pytest.raises(ConfigError, match=r"layer 15: has more experts than its parent: are the two swapped\?"):
        compare(CHILD, PARENT, gpus=load_gpus())


def test_the_picture_is_self_contained_and_holds_every_cell(map_: Comparison) -> None:
    svg = heat_map_svg(map_)
    root = ET.fromstring(svg)
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    for cell in (cell for row in map_.rows for cell in row):
        assert cell.text in texts
        assert load_name(cell.load) in texts
    assert "a100-80gb (bf16 KV)" in svg
    assert "http" not in svg.replace("http://www.w3.org/2000/svg", "")
    assert "fp8 KV) over the parent (fp8 KV)" in svg


@pytest.mark.parametrize("num_loads", [1, 2])
def test_a_map_of_few_loads_is_as_wide_as_its_title(map_: Comparison, num_loads: int) -> None:
    root = ET.fromstring(heat_map_svg(replace(map_, rows=tuple(row[:num_loads] for row in map_.rows))))
    for element in root.iter("{http://www.w3.org/2000/svg}text"):
        if element.get("text-anchor") is None:
            end = float(element.get("x", "")) + text_width(element.text or "", float(element.get("font-size", "")))
            assert end <= float(root.get("width", "")), element.text


def test_colours_tell_faster_from_slower() -> None:
    def channels(colour: str) -> tuple[int, ...]:
        return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))

    red, _, blue = channels(colour_of(2.0))
    assert blue > red
    red, _, blue = channels(colour_of(0.6))
    assert red > blue
    assert colour_of(None) not in {colour_of(1.0), colour_of(3.0)}
    assert (text_colour_of(1.1), text_colour_of(3.0)) == ("#111", "#fff")


def test_files_are_svg_or_html(map_: Comparison, tmp_path: Path) -> None:
    assert write_heat_map(map_, tmp_path / "deep" / "map.svg").read_text(encoding="utf-8").startswith("<svg")
    page = write_heat_map(map_, tmp_path / "map.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "<svg" in page
    with pytest.raises(ConfigError, match=r"unknown kind of picture .*map.png"):
        write_heat_map(map_, tmp_path / "map.png")


def test_a_picture_that_cannot_be_written_is_one_line_and_leaves_nothing(map_: Comparison, tmp_path: Path) -> None:
    (tmp_path / "map.svg").mkdir()
    with pytest.raises(PuzzleError, match=r"map\.svg: cannot be written"):
        write_heat_map(map_, tmp_path / "map.svg")
    assert [entry.name for entry in tmp_path.iterdir()] == ["map.svg"]


# -- the command ------------------------------------------------------------------------------------------------------


def test_plan_from_a_shell() -> None:
    done = run("plan", CHILD_FILE, "--gpu", "h100-80gb", "--gpus", "8", *LONG, "--json")
    assert done.returncode == 0, done.stderr
    value = last_json(done.stdout)
    expected = plan(CHILD, gpu=load_gpu("h100-80gb"), num_gpus=8, load=Load(isl=65536, osl=65536))
    assert value == plan_json(expected)
    assert value["assumptions"]["memory_fraction"]["value"] == 0.9


def test_tables_show_memory_sequences_rates_and_on_request_the_assumptions() -> None:
    arguments = ("plan", CHILD_FILE, "--gpus", "8", *LONG, "--parallel", "dep8")
    short, long = invoke(*arguments).stdout, invoke(*arguments, "--explain").stdout
    for word in ("KV cache", "trtllm_v1_equal", "vllm_by_window", "output tok/s", "bound by", "dep8", "--explain"):
        assert word in short
    assert "expert_imbalance" not in short
    assert "expert_imbalance" in long


def test_compare_writes_the_map_and_json(tmp_path: Path) -> None:
    out = tmp_path / "map.html"
    arguments = ("plan", "--compare", PARENT_FILE, CHILD_FILE, "--gpu", "h100-80gb", "--gpus", "8", *LONG)
    value = last_json(invoke(*arguments, "--parent-kv", "bf16", "--out", out, "--json").stdout)
    assert [cell["verdict"] for cell in value["cells"]] == ["3.21x"]
    assert (value["parent_kv_dtype"], value["path"]) == ("bf16", str(out))
    assert out.is_file()
    assert "64K/64K" in invoke(*arguments).stdout


def test_a_demo_sized_model_is_compared_at_the_lengths_it_has(make_checkpoint: MakeCheckpoint) -> None:
    parent = make_checkpoint([(8, 16), (8, None)], max_position_embeddings=2048)
    child = make_checkpoint([(4, 16), (8, 32)], max_position_embeddings=2048)
    value = last_json(invoke("plan", "--compare", parent, child, "--gpu", "h200-141gb", "--gpus", "1", "--json").stdout)
    assert [(cell["isl"], cell["osl"]) for cell in value["cells"]] == [(1024, 1024)]


@pytest.mark.parametrize(
    ("layout", "nums_gpus", "title"),
    [
        ("tp8", [8], "tp8, each at its best batch"),
        ("dep2", [8], "dep2, each at its best batch"),
        ("tp16", [16], "tp16, each at its best batch"),
        (None, [1, 8], "each at its best layout and batch"),
    ],
)
def test_a_layout_is_compared_on_numbers_of_gpus_that_it_divides(
    layout: str | None, nums_gpus: list[int], title: str
) -> None:
    gpus, loads = {"h100-80gb": load_gpu("h100-80gb")}, [Load(isl=1024, osl=1024)]
    found = compare(PARENT, CHILD, gpus=gpus, loads=loads, layout=layout)
    assert [row[0].num_gpus for row in found.rows] == nums_gpus
    assert title in found.title
    assert found.to_json()["layout"] == layout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--gpu", "h100", *LONG), ("gpu: unknown GPU", "found h100", "h100-80gb", "b200-180gb")),
        (("--isl", "65536"), ("--osl: missing",)),
        ((), ("--isl, --osl: missing", "such as --isl 4096 --osl 4096")),
        (("--isl", "65536", "--osl", "99999999"), ("isl + osl", "longer than the model's positions")),
        (("--isl", "0", "--osl", "5"), ("isl: must be at least 1",)),
        (("--gpus", "0", *LONG), ("gpus: must be at least 1",)),
        (("--gpu", "a100-80gb", "--kv", "fp8", *LONG), ("a100-80gb has no FP8", "expected bf16")),
        (("--gpus", "8", "--parallel", "pp8", *LONG), ("unknown layout", "pp8", "tp8 or dep8")),
        (("--gpus", "8", "--parallel", "tp3", *LONG), ("does not divide the GPUs", "found tp3 on 8")),
        (("--parallel", "tp8", *LONG), ("found tp8 on 1, expected 8 GPUs or a multiple (--gpus)",)),
        (("--compare", str(PARENT_FILE), "--parallel", "pp8"), ("unknown layout", "pp8", "tp8 or dep8")),
        (("--compare", str(PARENT_FILE), "--parallel", "tp8", "--gpus", "4"), ("found tp8 on 4",)),
        (("--gpus", "128", "--parallel", "dep128", *LONG), ("moe_expert_parallel_size", "64 experts of layer 15")),
        (("--allocator", "paged", *LONG), ("unknown cache-allocation scheme", "trtllm_v1_tuned")),
        (
            ("--gpu", "l40s-48gb", *LONG),
            ("1 x l40s-48gb, tp1: no room for one sequence of 131072 tokens beside 46.56 GiB of weights",),
        ),
        (("--gpus", "8", "--batch", "4000", *LONG), ("no room for 4000 sequences",)),
        (("--out", "map.svg", *LONG), ("--out: goes with --compare",)),
        (("--parent-kv", "fp8", *LONG), ("--parent-kv: goes with --compare",)),
        (("--compare", str(PARENT_FILE), "--batch", "3"), ("--batch: goes without --compare",)),
        (("--compare", str(PARENT_FILE), "--isl", "5"), ("--osl: missing",)),
        (("--compare", "nowhere/at/all"), ("nowhere/at/all",)),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    assert_user_error(invoke("plan", CHILD_FILE, *arguments), *words)


def test_a_batch_that_was_asked_for_is_not_called_the_best() -> None:
    arguments = ("--gpus", "8", "--parallel", "dep4", "--isl", "1024", "--osl", "1024")
    given = invoke("plan", CHILD_FILE, *arguments, "--batch", "16").stdout
    assert "32 in flight, as given; at most" in given and "best batch" not in given and "reach 90%" not in given
    assert "best batch" in (best := invoke("plan", CHILD_FILE, *arguments).stdout) and "reach 90% of its rate" in best


@pytest.mark.parametrize("batch", [0, -1])
def test_no_sequence_in_flight_is_no_plan(batch: int) -> None:
    assert invoke("plan", CHILD_FILE, "--gpus", "8", "--batch", str(batch), *LONG).exit_code == 2
    with pytest.raises(ConfigError, match=f"batch: must be at least 1 .found {batch}"):
        plan(CHILD, gpu=load_gpu("h100-80gb"), num_gpus=8, load=Load(isl=1024, osl=64), batch=batch)


def test_an_engine_folder_is_planned_as_its_serving_copy(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(CHILD_FILE.read_text(encoding="utf-8"), encoding="utf-8")
    value = last_json(invoke("plan", tmp_path, "--gpus", "8", *LONG, "--parallel", "tp8", "--json").stdout)
    assert [(row["window"], row["layers"]) for row in value["kv_by_window"]] == [(128, 18), (8192, 8), (None, 10)]
    kept = sum(row["layers"] * row["bytes_per_layer"] for row in value["kv_by_window"])
    assert kept == value["kv_bytes_per_sequence"] == CHILD.kv_bytes_per_sequence(131072, "fp8")
    assert 63.9 < value["distinct_experts"]["64"] <= 64
    # a chunk of 8192 tokens and tp8, a layer: 4 x 7/8 x 47 MB over NVLink are 367 us; its experts multiply 206 us
    assert value["prefill_bound"] == "links"


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"model_type": "llama"}', encoding="utf-8")
    assert_user_error(invoke("plan", file, *LONG), "not a gpt-oss model", "llama")
    assert_user_error(invoke("plan", "--compare", CHILD_FILE, PARENT_FILE), "are the two swapped?")


def test_planning_imports_nothing_heavy() -> None:
    import subprocess
    import sys

    program = (
        "import sys\nimport puzzle_trtllm.build.planner, puzzle_trtllm.build.planner.heat_map\n"
        "print(sorted({'torch', 'transformers', 'pandas'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
