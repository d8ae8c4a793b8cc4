"""Engine folders: opened whole, or refused with one line."""

from __future__ import annotations

import json

import pytest
import yaml

from puzzle_trtllm.engine import Engine, EngineConfig, describe, load_engine_config
from puzzle_trtllm.errors import ConfigError, EngineError
from puzzle_trtllm.tensors import count_weight_bytes
from tests.toys import toy_architecture, toy_config

ARCHITECTURE = toy_architecture([(4, 16), (3, None)])
MANIFEST = {
    "schema_version": 1,
    "runtime": "reference",
    "kv_dtype": "fp8",
    "weight_bytes": count_weight_bytes(ARCHITECTURE),
    "memory_bytes": None,
    "architecture": describe(ARCHITECTURE),
    "kv_fold": {
        "mode": "tensor",
        "layers": [{"layer": 0, "k_scale": 0.3, "v_scale": 1.0, "k_fold": 0.5, "v_fold": 1.0}],
    },
    "provenance": {"config": {}},
}
ARGS = {"backend": "pytorch", "kv_cache_config": {"dtype": "fp8"}}


@pytest.mark.parametrize("limit", ["2048", 0, True, 0.5, [1]])
def test_a_limit_that_is_no_number_of_tokens_names_its_file(folder, limit):
    assert Engine.open(folder).max_seq_len is None
    (folder / "llm_args.yaml").write_text(yaml.safe_dump({**ARGS, "max_seq_len": limit}))
    with pytest.raises(
        EngineError, match=r"llm_args\.yaml: max_seq_len: (must be a positive integer|wrong type of .*) .found"
    ):
        _ = Engine.open(folder).max_seq_len


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(toy_config(ARCHITECTURE)))
    (tmp_path / "engine.json").write_text(json.dumps(MANIFEST))
    (tmp_path / "llm_args.yaml").write_text(yaml.safe_dump(ARGS))
    return tmp_path


def test_a_whole_engine_opens(folder):
    engine = Engine.open(folder)
    assert engine.llm_args == ARGS
    assert engine.manifest.kv_fold.layers[0].k_fold == 0.5
    assert engine.architecture == ARCHITECTURE
    assert engine.model_path == folder / "model"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, r"schema_version.*found 2"),
        ({"runtime": "vllm"}, r"runtime.*'vllm'"),
        ({"weight_bytes": "heavy"}, "weight_bytes"),
        ({"weight_bytes": "1000"}, "weight_bytes: .*valid integer .found '1000'"),
        ({"weight_bytes": True}, "weight_bytes: .*valid integer .found True"),
        ({"extra": 1}, "extra"),
        ({"kv_fold": {"mode": "half"}}, r"kv_fold\.mode"),
    ],
)
def test_a_wrong_manifest_is_one_line_that_names_the_key(folder, change, message):
    (folder / "engine.json").write_text(json.dumps({**MANIFEST, **change}))
    with pytest.raises(EngineError, match=message) as caught:
        Engine.open(folder)
    assert "engine.json" in str(caught.value) and "\n" not in str(caught.value)


OTHER = describe(toy_architecture([(4, 16), (4, None)], vocab_size=97))
SHORTER = {**describe(ARCHITECTURE), "block_configs": [{"num_local_experts": 4, "sliding_window": 16}]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architecture": OTHER},
            r"architecture\.block_configs\[1\]: is not what the rest .* 4, .*expected \{'num_local_experts': 3",
        ),
        ({"architecture": SHORTER}, r"architecture\.num_layers: is not what the rest .*found 1, expected 2"),
        ({"architecture": {"vocab_size": 97}}, r"architecture\.vocab_size: is not .*found 97, expected 96"),
        ({"architecture": {"vocabulary": 96}}, r"architecture\.vocabulary: is not .*found 96"),
        ({"weight_bytes": 1000}, "weight_bytes: is not what the rest .*found 1000"),
        ({"memory_bytes": 10**6}, "memory_bytes: is not what the rest .*found 1000000"),
        ({"kv_dtype": "bf16"}, "kv_dtype: is not what the rest .*found bf16, expected fp8"),
    ],
)
def test_a_manifest_of_another_engine_is_refused(folder, change, message):
    (folder / "engine.json").write_text(json.dumps({**MANIFEST, **change}))
    with pytest.raises(EngineError, match=rf"engine\.json: {message}"):
        Engine.open(folder)


def test_the_memory_cap_is_the_weights_and_what_the_cache_may_have(folder):
    cache = {"dtype": "fp8", "max_gpu_total_bytes": 5000}
    (folder / "llm_args.yaml").write_text(yaml.safe_dump({**ARGS, "kv_cache_config": cache}))
    (folder / "engine.json").write_text(json.dumps({**MANIFEST, "memory_bytes": MANIFEST["weight_bytes"] + 5000}))
    assert Engine.open(folder).manifest.memory_bytes == MANIFEST["weight_bytes"] + 5000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensor_parallel_size": "two"}, 'tensor_parallel_size: wrong type .*found "two", expected int'),
        ({"max_batch_size": True}, "max_batch_size: wrong type .*found true"),
        ({"kv_cache_config": "fp8"}, "kv_cache_config: wrong type"),
        ({"kv_cache_config": {"dtype": "fp8", "tokens_per_block": 0.5}}, r"kv_cache_config\.tokens_per_block: wrong"),
    ],
)
def test_an_argument_of_another_type_is_refused(folder, change, message):
    (folder / "llm_args.yaml").write_text(yaml.safe_dump({**ARGS, **change}))
    with pytest.raises(EngineError, match=rf"llm_args\.yaml: {message}"):
        Engine.open(folder)


def test_an_argument_that_a_newer_tensorrt_llm_has_added_passes(folder):
    (folder / "llm_args.yaml").write_text(yaml.safe_dump({**ARGS, "from_next_year": "7"}))
    assert Engine.open(folder).llm_args["from_next_year"] == "7"


@pytest.mark.parametrize("name", ["engine.json", "llm_args.yaml", "model/config.json"])
def test_a_missing_part_is_one_line(folder, name):
    (folder / name).unlink()
    with pytest.raises(EngineError, match=name.replace(".", r"\.")):
        Engine.open(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("engine.json", b"{"),
        ("llm_args.yaml", b"a: ["),
        ("llm_args.yaml", b"a: caf\xe9"),
        ("llm_args.yaml", b"a: 2020-13-45"),
        ("llm_args.yaml", b"a: 1\na: 2"),
        ("llm_args.yaml", b"- a"),
        ("llm_args.yaml", b"[" * 5000),
    ],
)
def test_an_unreadable_part_is_one_line(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(EngineError, match=name.replace(".", r"\.")) as caught:
        Engine.open(folder)
    assert "\n" not in str(caught.value)


class TestEngineConfig:
    def load(self, tmp_path, **keys: object) -> EngineConfig:
        file = tmp_path / "c.yaml"
        file.write_text(yaml.safe_dump(keys))
        return load_engine_config(file)

    def test_defaults(self, tmp_path):
        config = self.load(tmp_path, runtime="reference")
        assert (config.kv_dtype, config.fold, config.num_gpus, config.memory_bytes) == ("bf16", "tensor", 1, None)

    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            ({}, "runtime: missing key"),
            ({"runtime": "vllm"}, "runtime: .*'vllm'"),
            ({"runtime": "reference", "kv_dtype": "int8"}, "kv_dtype: .*'int8'"),
            ({"runtime": "reference", "num_gpus": 0}, "num_gpus: .*found 0"),
            ({"runtime": "reference", "memory_bytes": 0}, "memory_bytes: .*found 0"),
            ({"runtime": "tensorrt_llm", "target": "1.1"}, r"target: .*'1.2', '1.3' or 'late' .found '1.1'"),
            ({"runtime": "reference", "batch": 3}, r"batch: unknown key .*kv_dtype"),
        ],
    )
    def test_wrong_keys_are_one_line(self, tmp_path, keys, message):
        file = tmp_path / "c.yaml"
        file.write_text(yaml.safe_dump(keys) if keys else "gpu: null\n")
        with pytest.raises(ConfigError, match=message) as caught:
            load_engine_config(file)
        assert "\n" not in str(caught.value)
