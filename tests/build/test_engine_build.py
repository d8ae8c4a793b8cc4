"""Engines: what is in the folder, what was folded, and what is refused without leaving a trace."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml

from puzzle_trtllm.build.engine_build import build_engine, explain
from puzzle_trtllm.build.llm_args import to_nested
from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.checkpoint_writer import rewrite_checkpoint, tensor_of
from puzzle_trtllm.engine import Engine, EngineConfig
from puzzle_trtllm.errors import CheckpointError, ConfigError, PuzzleError
from puzzle_trtllm.tensors import is_expert_tensor, kv_scale_of
from tests.toys import RETURN_ID

PLAIN = [(4, 16), (4, None)]
MIXED = [(4, 16), (3, None), (4, 40)]
SCALES = [(0.3, 4.0), (1.0, 1.0), (2.5, 0.1)]
FOLDS = [(0.5, 4.0), (1.0, 1.0), (4.0, 0.125)]

GOLDEN_ARGS = """\
# Arguments of TensorRT-LLM's LLM; `model` is passed by the loader. By puzzle-trtllm build.
backend: pytorch
tensor_parallel_size: 1
max_seq_len: 256
max_batch_size: 32
max_num_tokens: 8192
enable_chunked_prefill: true
kv_cache_config:
  dtype: fp8
  max_attention_window: [16, 256, 40]
  tokens_per_block: 16
  enable_block_reuse: true
"""


@pytest.fixture
def child(make_checkpoint):
    return make_checkpoint(MIXED, kv_scales=SCALES)


def config(**changes) -> EngineConfig:
    return EngineConfig(**{"runtime": "reference", "kv_dtype": "fp8", "scenario": "cpu-demo", **changes})


@pytest.fixture
def engine(child, tmp_path) -> Engine:
    return build_engine(child, tmp_path / "engine", config=config())


def with_a_second_name(checkpoint, tmp_path):
    """A copy whose first K scale is also there under its other known name, with another value."""
    source, out = Checkpoint.open(checkpoint), tmp_path / "two-names"
    out.mkdir()
    second = tensor_of("model.layers.0.self_attn.k_scale", "F32", np.array(4.0, dtype=np.float32))
    rewrite_checkpoint(source, out, config=source.config, replace={}, add=[second])
    return out


class TestTheFolder:
    def test_holds_exactly_the_engine(self, engine):
        assert sorted(f.name for f in engine.path.iterdir()) == ["engine.json", "llm_args.yaml", "model"]
        names = sorted(f.name for f in engine.model_path.iterdir())
        assert names == [
            "chat_template.jinja",
            "config.json",
            "generation_config.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "tokenizer.json",
            "tokenizer_config.json",
        ]

    def test_llm_args_are_golden(self, engine):
        assert (engine.path / "llm_args.yaml").read_text() == GOLDEN_ARGS

    def test_opens_as_it_was_returned(self, engine, child):
        assert Engine.open(engine.path) == engine
        assert engine.architecture == Checkpoint.open(child).architecture

    def test_manifest(self, engine, child):
        manifest, source = engine.manifest, Checkpoint.open(child)
        assert (manifest.runtime, manifest.kv_dtype, manifest.memory_bytes) == ("reference", "fp8", None)
        assert manifest.weight_bytes == source.weight_bytes - 4 * len(source.kv_scales)
        assert manifest.architecture["block_configs"] == [
            {"num_local_experts": n, "sliding_window": w} for n, w in MIXED
        ]
        assert manifest.architecture["head_dim"] == 16
        assert manifest.provenance["source"] == {"path": str(child), "fingerprint": source.fingerprint()}
        assert manifest.provenance["engine_config"]["scenario"] == "cpu-demo"
        assert set(manifest.provenance["versions"]) == {"puzzle_trtllm", "python", "numpy"}

    def test_the_demos_config_builds(self, child, tmp_path):
        engine = build_engine(child, tmp_path / "demo", config="cpu-demo")
        assert engine.manifest.kv_dtype == "fp8"


class TestTheServingCopy:
    def test_says_gpt_oss_and_our_class(self, engine, child):
        served = json.loads((engine.model_path / "config.json").read_text())
        source = json.loads((child / "config.json").read_text())
        assert served["model_type"] == "gpt_oss"
        assert served["architectures"] == ["GptOssPuzzleForCausalLM"]
        assert served["block_configs"] == source["block_configs"]
        assert served["num_local_experts"] == 4, "the maximum"
        assert served["quantization_config"] == source["quantization_config"]
        assert "auto_map" not in served

    def test_of_a_plain_model_is_plain(self, make_checkpoint, tmp_path):
        engine = build_engine(make_checkpoint(PLAIN), tmp_path / "e", config=config(kv_dtype="bf16"))
        served = json.loads((engine.model_path / "config.json").read_text())
        assert served["architectures"] == ["GptOssForCausalLM"]
        assert "block_configs" not in served and served["sliding_window"] == 16

    def test_of_equal_layers_with_windows_elsewhere_is_not(self, make_checkpoint, tmp_path):
        engine = build_engine(make_checkpoint(PLAIN[::-1]), tmp_path / "e", config=config(kv_dtype="bf16"))
        served = json.loads((engine.model_path / "config.json").read_text())
        assert served["architectures"] == ["GptOssPuzzleForCausalLM"] and len(served["block_configs"]) == 2

    def test_without_windows_keeps_the_number_that_readers_expect(self, make_checkpoint, tmp_path):
        engine = build_engine(make_checkpoint([(4, None)] * 2), tmp_path / "e", config=config(kv_dtype="bf16"))
        assert json.loads((engine.model_path / "config.json").read_text())["sliding_window"] == 128

    def test_loads_by_glob_without_the_index(self, engine, child):
        """As TensorRT-LLM does: every tensor once, and no scale among them."""
        load_file = pytest.importorskip("safetensors.torch").load_file
        names: list[str] = []
        for file in engine.model_path.glob("*.safetensors"):
            names += load_file(file)
        expected = {name for name in Checkpoint.open(child).tensors if not name.endswith("_scale")}
        assert len(names) == len(set(names)) and set(names) == expected

    def test_shares_the_experts_with_the_checkpoint_on_disk(self, engine, child):
        served, source = Checkpoint.open(engine.model_path), Checkpoint.open(child)
        name = next(name for name in source.tensors if is_expert_tensor(name))
        assert served.entry(name).file.stat().st_ino == source.entry(name).file.stat().st_ino

    def test_shares_no_small_file_with_the_checkpoint(self, engine, child):
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            assert not (engine.model_path / name).samefile(child / name)

    def test_is_in_transformers_hands_the_same_model(self, make_checkpoint, tmp_path):
        torch = pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")
        source = make_checkpoint(PLAIN, kv_scales=SCALES[:2])
        engine = build_engine(source, tmp_path / "e", config=config())
        tokens = torch.arange(40)[None]
        logits = [
            transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.bfloat16,
                attn_implementation="eager",
                quantization_config=transformers.Mxfp4Config(dequantize=True),
            )(tokens).logits
            for folder in (source, engine.model_path)
        ]
        assert torch.equal(*logits)

    def test_ends_tool_calls(self, child, tmp_path):
        file = child / "tokenizer.json"
        tokenizer = json.loads(file.read_text())
        vocabulary = tokenizer["model"]["vocab"]
        last = next(token for token, token_id in vocabulary.items() if token_id == 95)
        del vocabulary[last]
        vocabulary["<|call|>"] = 95
        tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 95, "content": "<|call|>"})
        file.write_text(json.dumps(tokenizer))
        engine = build_engine(child, tmp_path / "e", config=config())
        generation = json.loads((engine.model_path / "generation_config.json").read_text())
        assert generation["eos_token_id"] == [RETURN_ID, 95] and generation["pad_token_id"] == 0
        assert "95 <|call|>" in engine.manifest.provenance["notes"][0]

    def test_makes_a_generation_config_where_there_is_none(self, child, tmp_path):
        (child / "generation_config.json").unlink()
        engine = build_engine(child, tmp_path / "e", config=config())
        assert json.loads((engine.model_path / "generation_config.json").read_text()) == {"eos_token_id": [RETURN_ID]}

    def test_ends_where_config_json_says_if_the_generation_config_says_null(self, child, tmp_path):
        (child / "generation_config.json").write_text(json.dumps({"eos_token_id": None}))
        engine = build_engine(child, tmp_path / "e", config=config())
        assert json.loads((engine.model_path / "generation_config.json").read_text()) == {"eos_token_id": [RETURN_ID]}


class TestScales:
    def test_are_folded_and_recorded(self, engine, child):
        fold = engine.manifest.kv_fold
        assert fold.mode == "tensor"
        assert [(layer.k_fold, layer.v_fold) for layer in fold.layers] == FOLDS
        served, source = Checkpoint.open(engine.model_path), Checkpoint.open(child)
        for layer, (k_fold, v_fold) in enumerate(FOLDS):
            prefix = f"model.layers.{layer}.self_attn"
            factors = {"q_proj": k_fold, "k_proj": 1 / k_fold, "v_proj": 1 / v_fold, "o_proj": v_fold}
            for projection, factor in factors.items():
                name = f"{prefix}.{projection}.weight"
                np.testing.assert_array_equal(served.float32(name), source.float32(name) * np.float32(factor))
                bias = f"{prefix}.{projection}.bias"
                on_bias = np.float32(1.0 if projection == "o_proj" else factor)
                np.testing.assert_array_equal(served.float32(bias), source.float32(bias) * on_bias)
        untouched = [n for n in served.tensors if "_proj." not in n or is_expert_tensor(n)]
        assert all(served.raw(name).tobytes() == source.raw(name).tobytes() for name in untouched)

    def test_are_dropped_unfolded_for_a_bf16_cache(self, child, tmp_path):
        engine = build_engine(child, tmp_path / "e", config=config(kv_dtype="bf16"))
        served, source = Checkpoint.open(engine.model_path), Checkpoint.open(child)
        assert engine.manifest.kv_fold.mode == "none" and not served.kv_scales
        assert all(served.raw(name).tobytes() == source.raw(name).tobytes() for name in served.tensors)
        assert engine.llm_args["kv_cache_config"]["dtype"] == "auto"

    def test_none_is_served_under_any_of_its_names(self, child, tmp_path):
        engine = build_engine(with_a_second_name(child, tmp_path), tmp_path / "e", config=config(kv_dtype="bf16"))
        assert not [name for name in Checkpoint.open(engine.model_path).tensors if kv_scale_of(name)]

    def test_unit_scale_must_be_asked_for_twice(self, child, tmp_path):
        engine = build_engine(child, tmp_path / "e", config=config(), fold="none", allow_unit_scale=True)
        assert engine.manifest.kv_fold.mode == "none"
        assert not Checkpoint.open(engine.model_path).kv_scales
        assert any("unit scale" in line for line in engine.manifest.provenance["warnings"])

    def test_the_argument_wins_over_the_config(self, child, tmp_path):
        engine = build_engine(child, tmp_path / "e", config=config(fold="none"), fold="tensor")
        assert engine.manifest.kv_fold.mode == "tensor"


class TestRefusals:
    """Each is one line, and no engine folder is left."""

    def refused(self, checkpoint, tmp_path, error: type[PuzzleError], match: str, **arguments) -> None:
        out = tmp_path / "results" / "engine"
        with pytest.raises(error, match=match) as caught:
            build_engine(checkpoint, out, **{"config": config(), **arguments})
        assert "\n" not in str(caught.value)
        assert not out.parent.exists() or list(out.parent.iterdir()) == []

    def test_fp8_without_scales(self, make_checkpoint, tmp_path):
        match = "wants an FP8 KV cache, and this checkpoint has no KV scales .*calibrate kv.*--allow-unit-scale"
        self.refused(make_checkpoint(MIXED), tmp_path, ConfigError, match)

    def test_unit_scale_without_permission(self, child, tmp_path):
        match = "fold: FP8 KV without a fold runs at unit scale .*--allow-unit-scale"
        self.refused(child, tmp_path, ConfigError, match, fold="none")

    def test_permission_does_not_replace_the_choice(self, make_checkpoint, tmp_path):
        self.refused(make_checkpoint(MIXED), tmp_path, ConfigError, "has no KV scales", allow_unit_scale=True)

    def test_one_scale_under_two_names(self, child, tmp_path):
        match = r"layers\.0\.self_attn\.k_scale: the same KV scale under two names .*self_attn\.k_proj\.k_scale"
        self.refused(with_a_second_name(child, tmp_path), tmp_path, CheckpointError, match)

    def test_a_fold_asked_for_a_cache_that_has_none(self, child, tmp_path):
        match = r"kv_dtype: --fold needs an FP8 KV cache \(found bf16"
        self.refused(child, tmp_path, ConfigError, match, config=config(kv_dtype="bf16"), fold="channel")

    def test_scales_for_another_kind_of_cache(self, child, tmp_path):
        file = child / "hf_quant_config.json"
        file.write_text(json.dumps({"quantization": {"kv_cache_quant_algo": "NVFP4"}}))
        match = r"hf_quant_config\.json: quantization\.kv_cache_quant_algo: .*another cache .found NVFP4, expected FP8"
        self.refused(child, tmp_path, CheckpointError, match)

    def test_channel_fold_without_its_file(self, child, tmp_path):
        self.refused(child, tmp_path, CheckpointError, "--fold channel needs it", fold="channel")

    def test_a_fold_that_bf16_cannot_hold(self, make_checkpoint, tmp_path):
        checkpoint = make_checkpoint(PLAIN, kv_scales=[(2.0**125, 1.0), (1.0, 1.0)])
        self.refused(checkpoint, tmp_path, CheckpointError, "cannot be folded exactly")

    def test_a_cap_without_room(self, child, tmp_path):
        self.refused(child, tmp_path, ConfigError, "memory_bytes: leaves no room", config=config(memory_bytes=1000))

    def test_an_unknown_config(self, child, tmp_path):
        self.refused(child, tmp_path, ConfigError, "no such engine config .*cpu-demo", config="gpu-demo")

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"scenario": "busy"}, r"scenario: busy: no such scenario \(expected .*cpu-demo"),
            ({"scenario": "open.yaml"}, r"scenario: open\.yaml: request_rate: is an open loop"),
            ({"runtime": "tensorrt_llm", "gpu": "h100"}, r"gpu: unknown GPU \(found h100, expected one of: h100-80gb"),
        ],
    )
    def test_an_unknown_name_is_told_with_the_file_and_key_that_say_it(
        self, child, tmp_path, monkeypatch, changes, match
    ):
        monkeypatch.chdir(tmp_path)
        open_loop = {"name": "o", "input_tokens": 8, "output_tokens": 8, "num_requests": 4, "request_rate": 2.0}
        (tmp_path / "open.yaml").write_text(yaml.safe_dump(open_loop))
        file = tmp_path / "mine.yaml"
        file.write_text(yaml.safe_dump({**config().model_dump(), **changes}))
        self.refused(child, tmp_path, ConfigError, rf"mine\.yaml: {match}", config=file)

    def test_tensorrt_llm_without_a_load_to_size_it_for(self, child, tmp_path):
        """The reference runtime's default, 256 tokens, is none that anybody wants on a GPU."""
        settings = EngineConfig(runtime="tensorrt_llm", gpu="h100-80gb", kv_dtype="fp8")
        match = r"engine config: scenario: missing key: sequences and batches are sized for it \(expected such as long"
        self.refused(child, tmp_path, ConfigError, match, config=settings)

    def test_an_unknown_argument_names_the_file(self, child, tmp_path):
        file = tmp_path / "mine.yaml"
        file.write_text(yaml.safe_dump({**config().model_dump(), "llm_args": {"max_len": 3}}))
        self.refused(child, tmp_path, ConfigError, r"mine\.yaml: llm_args: max_len: unknown LLM argument", config=file)

    def test_a_checkpoint_with_a_wrong_shape(self, child, tmp_path):
        name, source, bad = "model.layers.1.mlp.router.weight", Checkpoint.open(child), tmp_path / "bad"
        bad.mkdir()
        replace = {name: tensor_of(name, "BF16", np.zeros((4, 64), np.uint16))}
        rewrite_checkpoint(source, bad, config=source.config, replace=replace)
        self.refused(bad, tmp_path, CheckpointError, rf"{name}: wrong dtype or shape")

    @pytest.mark.parametrize(
        ("name", "change", "match"),
        [
            (
                "generation_config.json",
                {"eos_token_id": 2.5},
                r"eos_token_id: must be a token id or a list .*found 2\.5",
            ),
            ("generation_config.json", {"eos_token_id": "a"}, 'eos_token_id: must be a token id or a list .*found "a"'),
            ("generation_config.json", {"eos_token_id": [1, -1]}, "eos_token_id: must be a token id or a list"),
            ("generation_config.json", {"eos_token_id": 96}, r"eos_token_id: .*found 96, expected 0 to 95\)"),
            ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["a/b--c.D", None]}}, "auto_map: names code"),
            ("tokenizer.json", {"added_tokens": None}, "added_tokens: must be a list of objects"),
            ("tokenizer.json", {"added_tokens": ["x"]}, "added_tokens: must be a list of objects"),
            ("tokenizer.json", {"added_tokens": [{"content": "<|call|>"}]}, "added_tokens: must be a list of objects"),
        ],
    )
    def test_a_companion_with_a_wrong_value(self, child, tmp_path, name, change, match):
        (child / name).write_text(json.dumps(change))
        self.refused(child, tmp_path, CheckpointError, rf"{name}: {match}")

    @pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
    def test_a_chat_template_that_is_none(self, child, tmp_path, name):
        template = "{% for message in messages %}"
        (child / "chat_template.jinja").unlink()
        (child / name).write_text(template if name.endswith("jinja") else json.dumps({"chat_template": template}))
        self.refused(child, tmp_path, CheckpointError, "chat template, line 1: not a template: Unexpected end")

    def test_another_models_tokenizer(self, make_checkpoint, tmp_path):
        child = make_checkpoint(MIXED, kv_scales=SCALES, vocab_size=40)
        match = r"tokenizer\.json: has tokens outside the model's vocabulary .*\(found token id 95, expected below 40\)"
        self.refused(child, tmp_path, CheckpointError, match)

    def test_a_truncated_shard(self, child, tmp_path):
        shard = sorted(child.glob("*.safetensors"))[-1]
        shard.write_bytes(shard.read_bytes()[:-1])
        self.refused(child, tmp_path, CheckpointError, "truncated")

    def test_an_output_that_would_replace_the_checkpoint(self, child):
        with pytest.raises(PuzzleError, match="would replace the checkpoint it is made from"):
            build_engine(child, child, config=config(), overwrite=True)
        assert Checkpoint.open(child).kv_scales

    @pytest.mark.parametrize("name", ["mine.yaml", "load.yaml"])
    def test_an_output_that_would_replace_its_config_or_scenario(self, child, tmp_path, name):
        (tmp_path / "e").mkdir()
        places = {"mine.yaml": tmp_path, "load.yaml": tmp_path} | {name: tmp_path / "e"}
        scenario = {"name": "s", "input_tokens": 8, "output_tokens": 8, "concurrency": 2, "num_requests": 4}
        files = {file: folder / file for file, folder in places.items()}
        files["load.yaml"].write_text(yaml.safe_dump(scenario))
        files["mine.yaml"].write_text(yaml.safe_dump(config(scenario=str(files["load.yaml"])).model_dump()))
        with pytest.raises(PuzzleError, match=rf"would replace a file it is made from \(found .*{name}\)"):
            build_engine(child, tmp_path / "e", config=files["mine.yaml"], overwrite=True)
        assert files[name].is_file()

    def test_an_existing_engine_is_kept_unless_overwritten(self, child, tmp_path):
        build_engine(child, tmp_path / "e", config=config())
        with pytest.raises(PuzzleError, match="exists and is not empty"):
            build_engine(child, tmp_path / "e", config=config(kv_dtype="bf16"))
        assert Engine.open(tmp_path / "e").manifest.kv_dtype == "fp8"
        build_engine(child, tmp_path / "e", config=config(kv_dtype="bf16"), overwrite=True)
        assert Engine.open(tmp_path / "e").manifest.kv_dtype == "bf16"


class TestExplain:
    def test_is_what_build_writes(self, engine, child):
        for source in (child, child / "config.json"):
            values = explain(source, config=config())
            assert to_nested(values) == engine.llm_args
            assert all(len(value) == 3 and value.reason for value in values)

    def test_needs_no_weights(self, tmp_path, child):
        (tmp_path / "config.json").write_bytes((child / "config.json").read_bytes())
        assert explain(tmp_path, config="cpu-demo") == explain(child, config="cpu-demo")

    def test_of_a_hub_id_fetches_no_weights(self, child, monkeypatch):
        wanted = []

        def download(name: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
            wanted.extend(allow_patterns)
            return str(child)

        monkeypatch.setattr(pytest.importorskip("huggingface_hub"), "snapshot_download", download)
        assert explain("nvidia/child", config=config()) == explain(child, config=config())
        assert wanted == ["config.json", "model.safetensors.index.json"]

    def test_refuses_what_building_would(self, child):
        with pytest.raises(ConfigError, match="memory_bytes"):
            explain(child / "config.json", config=config(memory_bytes=1))

    def test_of_nothing(self, tmp_path):
        with pytest.raises(CheckpointError, match="no such checkpoint folder"):
            explain(tmp_path / "nowhere.json", config=config())


@pytest.mark.parametrize("blocks", [PLAIN, MIXED])
@pytest.mark.parametrize("form", ["newer", "theta inside", "short"])
def test_the_serving_copy_says_all_that_is_rotary_in_the_older_spelling(make_checkpoint, tmp_path, blocks, form):
    """TensorRT-LLM's config class has defaults for what it does not find: another model, in silence."""
    folder = make_checkpoint(blocks)
    given = json.loads((folder / "config.json").read_text())
    expected = {key: given[key] for key in ("rope_scaling", "rope_theta", "num_experts_per_tok")}
    del given["num_experts_per_tok"]
    if form == "newer":
        given["rope_parameters"] = {**given.pop("rope_scaling"), "rope_theta": given.pop("rope_theta")}
    elif form == "theta inside":
        given["rope_scaling"] = {**given["rope_scaling"], "rope_theta": given["rope_theta"]}
        given["rope_theta"] = 10000.0
    else:
        short = ("rope_type", "factor", "truncate")
        given["rope_scaling"] = {key: given["rope_scaling"][key] for key in short}
    (folder / "config.json").write_text(json.dumps(given))
    build_engine(folder, tmp_path / "engine", config=config(kv_dtype="bf16"))
    written = json.loads((tmp_path / "engine" / "model" / "config.json").read_text())
    written["rope_scaling"].pop("rope_theta", None)
    assert {key: written.get(key) for key in expected} == expected and "rope_parameters" not in written
