"""docs/deploy.md and docs/verification.md name only what exists: commands, flags, configs, tests, files."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from typer.main import get_command

from puzzle_trtllm.cli import app
from puzzle_trtllm.engine import ENGINE_CONFIG_FOLDER, load_engine_config

ROOT = Path(__file__).parents[2]
DEPLOY, VERIFICATION = ((ROOT / "docs" / name).read_text() for name in ("deploy.md", "verification.md"))
SHIPPED = {file.stem for file in ENGINE_CONFIG_FOLDER.glob("*.yaml")}


def command_lines(text):
    blocks = "\n".join(re.findall(r"```\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in blocks.splitlines() if line.startswith("puzzle-trtllm ")]


@pytest.mark.parametrize("line", command_lines(DEPLOY), ids=" ".join)
def test_every_command_takes_its_flags(line):
    command = get_command(app).commands[line[1]]
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


def test_every_shipped_deployment_is_listed():
    listed = set(re.findall(r"`((?:h100|h200|b200)x\d[a-z-]*)`", DEPLOY))
    assert listed == {name for name in SHIPPED if not name.startswith("cpu")}


def test_every_file_that_is_named_exists():
    named = re.findall(r"`((?:tests|puzzle_trtllm|docs)/[\w./-]+)`", DEPLOY + VERIFICATION)
    assert named and [name for name in named if not (ROOT / name).exists()] == []
