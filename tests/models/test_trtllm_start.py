"""How the tensorrt_llm runtime starts with the plugin: registered first, in the engine's environment, or refused."""

from __future__ import annotations

import os
import sys

import pytest

from puzzle_trtllm.build.engine_build import build_engine
from puzzle_trtllm.engine import PLUGIN_FOLDER, EngineConfig
from puzzle_trtllm.errors import EngineError
from puzzle_trtllm.serve.runtimes import create_llm, load_runtime
from puzzle_trtllm.serve.triton.host import start_llm
from puzzle_trtllm.serve.triton.repository import write_repository
from puzzle_trtllm.serve.triton.settings import ModelSettings, TritonConfig, read_model_yaml
from tests.models import trtllm_standin as upstream


@pytest.fixture
def installed(monkeypatch):
    upstream.install(monkeypatch, "1.2")
    monkeypatch.setattr(sys.modules["tensorrt_llm"], "LLM", lambda **arguments: arguments, raising=False)
    monkeypatch.setattr(sys.modules["tensorrt_llm"], "SamplingParams", upstream.SamplingParams, raising=False)
    yield sys.modules["tensorrt_llm"]
    sys.modules.pop("puzzle_trtllm.models.trtllm.modeling", None)


def test_the_model_is_registered_before_the_runtime_is_handed_out(installed):
    assert load_runtime("tensorrt_llm") is installed
    assert "GptOssPuzzleForCausalLM" in upstream.REGISTRY


def test_a_tensorrt_llm_that_does_not_fit_is_one_line(installed, monkeypatch):
    monkeypatch.delattr(sys.modules["tensorrt_llm._torch.models.modeling_utils"], "register_auto_model")
    with pytest.raises(EngineError, match=r"register_auto_model: this TensorRT-LLM does not fit the plugin"):
        load_runtime("tensorrt_llm")


def test_a_childs_engine_without_tensorrt_llm_says_so(make_checkpoint, tmp_path, monkeypatch):
    """Not its plugin, which comes first and would speak of a TensorRT-LLM that does not fit."""
    config = EngineConfig(runtime="tensorrt_llm", gpu="h100-80gb", scenario="cpu-demo")
    engine = build_engine(make_checkpoint([(4, 16), (2, None)]), tmp_path / "engine", config=config)
    monkeypatch.setattr(sys, "path", list(sys.path))
    triton = TritonConfig(plugin=str(engine.path / PLUGIN_FOLDER))
    with pytest.raises(EngineError, match="the runtime tensorrt_llm is not installed here"):
        start_llm(ModelSettings(llm_args={}, triton=triton))


def test_an_engine_starts_with_its_environment(installed, make_checkpoint, tmp_path, monkeypatch):
    config = EngineConfig(runtime="tensorrt_llm", gpu="h100-80gb", scenario="cpu-demo")
    engine = build_engine(make_checkpoint([(4, 16), (2, None)]), tmp_path / "engine", config=config)
    monkeypatch.setenv("TRTLLM_WINDOW_SIZE_SHARES", "overwritten")
    started = create_llm(engine, max_batch_size=2)
    assert (started["model"], started["max_batch_size"]) == (str(engine.model_path), 2)
    shares = engine.llm_args["env_overrides"]["TRTLLM_WINDOW_SIZE_SHARES"]
    assert os.environ["TRTLLM_WINDOW_SIZE_SHARES"] == shares


def test_triton_sets_the_environment_and_imports_the_engines_plugin(installed, make_checkpoint, tmp_path, monkeypatch):
    config = EngineConfig(runtime="tensorrt_llm", gpu="h100-80gb", scenario="cpu-demo")
    engine = build_engine(make_checkpoint([(4, 16), (2, None)]), tmp_path / "engine", config=config)
    write_repository(engine, tmp_path / "repository")
    settings = read_model_yaml(tmp_path / "repository" / "tensorrt_llm" / "1" / "model.yaml")
    monkeypatch.setenv("TRTLLM_WINDOW_SIZE_SHARES", "overwritten")
    monkeypatch.setenv("PMIX_RANK", "3")
    monkeypatch.setattr(sys, "path", list(sys.path))
    try:
        started, _ = start_llm(settings)
    finally:
        sys.modules.pop("puzzle_trtllm_plugin", None)
    assert started["env_overrides"]["TRTLLM_WINDOW_SIZE_SHARES"] == os.environ["TRTLLM_WINDOW_SIZE_SHARES"]
    assert "PMIX_RANK" not in os.environ and "GptOssPuzzleForCausalLM" in upstream.REGISTRY
