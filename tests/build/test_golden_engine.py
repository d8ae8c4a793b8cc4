"""Every generated text file of an engine for TensorRT-LLM and of its Triton repository, as recorded."""

from __future__ import annotations

from tests.build.golden_engine import engine_files, golden_files


def test_generated_files_are_the_golden_ones(tmp_path):
    assert engine_files(tmp_path) == golden_files()


def test_no_generated_text_file_is_without_a_golden_one(tmp_path):
    engine_files(tmp_path)
    recorded = {name.rpartition("/")[2] for name in golden_files()}
    elsewhere = {"trtllm-serve.sh", "trtllm-bench.sh", "tritonserver.sh", "model.py"}  # golden/deployments; a copy
    data = {"bench-dataset.jsonl", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    data |= {"model.safetensors.index.json"}
    for folder in ("engine", "repository"):
        texts = {f.name for f in (tmp_path / folder).rglob("*") if f.is_file() and f.suffix != ".safetensors"}
        assert texts <= recorded | elsewhere | data
