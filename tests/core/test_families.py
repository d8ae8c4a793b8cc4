"""The registry of families: what the stages know by name comes from one entry each."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from puzzle_trtllm.architecture import PuzzleArchitecture
from puzzle_trtllm.build.serving_copy import serving_family
from puzzle_trtllm.errors import ArchitectureError
from puzzle_trtllm.families import FAMILIES, GPT_OSS, GPT_OSS_PUZZLE, family_of

DATA = Path(__file__).parents[1] / "data"
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("file", "family"), [("gpt-oss-120b.config.json", GPT_OSS), ("gpt-oss-puzzle-88b.config.json", GPT_OSS_PUZZLE)]
)
def test_released_models_have_their_family_read_and_served(file, family):
    config = json.loads((DATA / file).read_text())
    assert family_of(config, file) is family
    assert serving_family(PuzzleArchitecture.from_path(DATA / file)) is family


def test_blocks_win_over_the_type():
    assert family_of({"model_type": "gpt_oss", "block_configs": []}, "x") is GPT_OSS_PUZZLE


def test_another_family_is_one_line_that_names_the_known_ones():
    with pytest.raises(ArchitectureError, match=r"^c: model_type: .*found nemotron-nas, expected gpt_oss or gpt_oss_p"):
        family_of({"model_type": "nemotron-nas"}, "c")


def test_every_family_that_needs_a_model_for_tensorrt_llm_has_one():
    assert all(FAMILIES[family.serving_model_type].trtllm_model is None for family in FAMILIES.values())
    for family in FAMILIES.values():
        if family.trtllm_model is not None:
            assert importlib.util.find_spec(family.trtllm_model) is not None


def test_no_stage_compares_names_of_its_own():
    files = [file for room in ("build", "calibration", "serve") for file in (ROOT / room).rglob("*.py")]
    names = {f'"{name}"' for family in FAMILIES.values() for name in (family.model_type, family.causal_lm)}
    assert [file for file in files if any(name in file.read_text() for name in names)] == []
