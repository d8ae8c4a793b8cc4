"""Requests of TensorRT-LLM end at every end-of-sequence token, not at the tokenizer's own alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from puzzle_trtllm.serve.triton.host import start_llm
from puzzle_trtllm.serve.triton.settings import ModelSettings, TritonConfig

RETURN, CALL = 200002, 200012


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Starts a stand-in on a serving copy with these files; returns what makes its SamplingParams, which are dicts."""
    (tmp_path / "dict_runtime.py").write_text(
        "SamplingParams = dict\nclass LLM:\n    def __init__(self, **arguments): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def start(runtime: str = "tensorrt_llm", *, tokenizer: bool = True, **files: Any) -> Any:
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        if tokenizer:
            (tmp_path / "tokenizer.json").write_text("{}")
        triton = TritonConfig(runtime=runtime, runtime_module="dict_runtime")
        return start_llm(ModelSettings(llm_args={"model": str(tmp_path)}, triton=triton))[1]

    return start


def test_a_tool_call_ends(make: Any) -> None:
    params = make(config={"eos_token_id": RETURN}, generation_config={"eos_token_id": [RETURN, CALL]})
    assert params(max_tokens=5) == {"max_tokens": 5, "stop_token_ids": [RETURN, CALL]}


def test_requests_share_no_list(make: Any) -> None:
    params = make(generation_config={"eos_token_id": [RETURN, CALL]})
    params()["stop_token_ids"].append(7)  # as TensorRT-LLM's newer lines do with the ids that they find themselves
    assert params()["stop_token_ids"] == [RETURN, CALL]


def test_ignore_eos_ignores_all_of_them(make: Any) -> None:
    params = make(generation_config={"eos_token_id": [RETURN, CALL]})
    assert params(ignore_eos=True) == {"ignore_eos": True}
    assert params(ignore_eos=False)["stop_token_ids"] == [RETURN, CALL]


def test_min_tokens_is_kept(make: Any) -> None:
    params = make(generation_config={"eos_token_id": [RETURN, CALL]})
    assert params(min_tokens=20) == {"min_tokens": 20}
    assert params(min_tokens=1)["stop_token_ids"] == [RETURN, CALL]


def test_one_id_of_config_json(make: Any) -> None:
    assert make(config={"eos_token_id": RETURN})() == {"stop_token_ids": [RETURN]}
    assert make(generation_config={"do_sample": True})() == {"stop_token_ids": [RETURN]}


def test_without_a_tokenizer_the_first_is_named(make: Any) -> None:
    params = make(tokenizer=False, generation_config={"eos_token_id": [RETURN, CALL]})
    assert params() == {"end_id": RETURN, "stop_token_ids": [RETURN, CALL]}
    assert params(ignore_eos=True) == {"end_id": RETURN, "ignore_eos": True}


def test_a_model_without_an_end(make: Any) -> None:
    assert make(config={})(max_tokens=3) == {"max_tokens": 3}
    assert make(config={"eos_token_id": []}, tokenizer=False)() == {}


def test_the_reference_runtime_reads_them_itself(make: Any) -> None:
    assert make("reference", generation_config={"eos_token_id": [RETURN, CALL]})() == {}
