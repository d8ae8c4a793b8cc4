"""README.md and docs/ name only what exists: commands, flags, configs, benchmarks, tests, files, links."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from puzzle_trtllm.cli import app
from puzzle_trtllm.engine import ENGINE_CONFIG_FOLDER, load_engine_config

ROOT = Path(__file__).parents[2]
DEPLOY = (ROOT / "docs" / "deploy.md").read_text()
PAGES = {
    file.relative_to(ROOT): file.read_text()
    for file in (ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")))
}
EVERYTHING = "\n".join(PAGES.values())
SHIPPED = {file.stem for file in ENGINE_CONFIG_FOLDER.glob("*.yaml")}


def command_lines(text, *starts):
    """Lines of the code blocks that begin with one of `starts`, in words."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith(starts)]


@pytest.mark.parametrize("line", command_lines(EVERYTHING, "puzzle-trtllm "), ids=" ".join)
def test_every_command_takes_its_flags(line):
    command = get_command(app).commands[line[1]]
    if line[1] == "calibrate":
        command = command.commands[line[2]]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in line if word.startswith("--")} <= known
    if "--config" in line and not line[line.index("--config") + 1].endswith(".yaml"):
        assert line[line.index("--config") + 1] in SHIPPED


def test_configs_are_made_where_the_container_starts(tmp_path):
    """Its working directory is the folder that holds the checkout."""
    (tmp_path / "puzzle-trtllm").symlink_to(ROOT)
    for line in re.findall(r"^sed .*$", DEPLOY, re.MULTILINE):
        subprocess.run(line, shell=True, cwd=tmp_path, check=True)
    made = {file.name: load_engine_config(file) for file in tmp_path.glob("*.yaml")}
    assert made["h100x1-long-bf16.yaml"].kv_dtype == "bf16"
    assert made["h100x16-long-dep.yaml"].num_gpus == 16


def test_every_shipped_deployment_is_listed_with_the_sequences_that_build_lets_in():
    """The golden files hold what `build` writes for the two released models."""
    rows = [re.split(r" *\| *", row) for row in re.findall(r"^\| `(?:h100|h200|b200)x\d.*\|$", DEPLOY, re.MULTILINE)]
    golden = ROOT / "tests" / "data" / "golden" / "deployments"
    expected = {}
    for name in {name for name in SHIPPED if not name.startswith("cpu")}:
        args = [yaml.safe_load((golden / name / model / "llm_args.yaml").read_text()) for model in ("child", "parent")]
        unit = " a GPU" if args[0].get("enable_attention_dp") else ""
        expected[f"`{name}`"] = [f"{one['max_batch_size']}{unit}" for one in args]
    assert {row[1]: row[-3:-1] for row in rows} == expected


def test_the_load_for_eight_gpus_is_more_than_any_engine_takes():
    """A child that is given fewer than it holds is measured below its best."""
    loads = re.findall(r"--scenario long-node --concurrency (\d+) --num-requests (\d+)", DEPLOY)
    rows = re.findall(r"^\| `h100x8-long-(tp|dep)` .*\| (\d+)(?: a GPU)? \| \d+(?: a GPU)? \|$", DEPLOY, re.MULTILINE)
    held = [int(sequences) * (8 if layout == "dep" else 1) for layout, sequences in rows]
    assert len(held) == 2 and loads
    for concurrency, requests in loads:
        assert int(concurrency) > max(held) and int(requests) >= 2 * int(concurrency)


def test_every_file_that_is_named_exists():
    named = re.findall(r"\b(?:tests|puzzle_trtllm|docs)/[\w./-]+\.\w+", EVERYTHING)
    assert named and [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("line", command_lines(EVERYTHING, ".venv/bin/python tests/bench/"), ids=" ".join)
def test_every_benchmark_takes_its_options(line):
    script = (ROOT / line[1]).read_text()
    assert [word for word in line if re.fullmatch(r"--[a-z-]+", word) and f'"{word}"' not in script] == []


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = (ROOT / page).parent / name if name else ROOT / page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text()), target


def anchors(text):
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
