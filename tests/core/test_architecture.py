"""Architectures: the published numbers, every form in the wild, and the impossible ones refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puzzle_trtllm.architecture import BlockConfig, PuzzleArchitecture, read_blocks
from puzzle_trtllm.errors import ArchitectureError
from puzzle_trtllm.rope import RopeConfig
from puzzle_trtllm.tensors import count_parameters, count_weight_bytes, tensor_table
from tests.toys import toy_architecture, toy_config

DATA = Path(__file__).parents[1] / "data"
PARENT_FILE = DATA / "gpt-oss-120b.config.json"
CHILD_FILE = DATA / "gpt-oss-puzzle-88b.config.json"
GIB = 2**30


@pytest.fixture(scope="module")
def parent() -> PuzzleArchitecture:
    return PuzzleArchitecture.from_path(PARENT_FILE)


@pytest.fixture(scope="module")
def child() -> PuzzleArchitecture:
    return PuzzleArchitecture.from_path(CHILD_FILE)


class TestPublishedNumbers:
    def test_parent_is_116_83b_in_60_77_gib(self, parent):
        assert f"{count_parameters(parent) / 1e9:.2f}" == "116.83"
        assert f"{count_weight_bytes(parent) / GIB:.2f}" == "60.77"

    def test_child_is_88_15b_in_46_56_gib(self, child):
        assert f"{count_parameters(child) / 1e9:.2f}" == "88.15"
        assert f"{count_weight_bytes(child) / GIB:.2f}" == "46.56"

    def test_the_hubs_91b_counts_scale_bytes_as_parameters(self, child):
        scales = sum(s.num_elements for n, s in tensor_table(child).items() if n.endswith("_scales"))
        assert f"{(count_parameters(child) + scales) / 1e9:.2f}" == "90.84"

    def test_child_blocks_are_the_published_ones(self, child):
        short = set(range(0, 36, 2))
        long = {3, 5, 21, 23, 27, 31, 33, 35}
        many = {*range(15), 16, 18, 20}
        for layer, block in enumerate(child.blocks):
            assert block.sliding_window == (128 if layer in short else 8192 if layer in long else None), layer
            assert block.num_local_experts == (128 if layer in many else 64), layer
        assert child.windows == (128, 8192, None)
        assert child.is_heterogeneous

    def test_kv_bytes_of_a_128k_sequence(self, parent, child):
        n = 131072
        # 8 KV heads x 64 x (K and V) x 2 bytes = 2048 bytes a layer and token in BF16; FP8 halves it.
        assert parent.kv_bytes_per_sequence(n) == (18 * n + 18 * 128) * 2048 == 4_836_556_800
        assert child.kv_bytes_per_sequence(n) == (10 * n + 8 * 8192 + 18 * 128) * 2048 == 2_823_290_880
        assert child.kv_bytes_per_sequence(n, "fp8") * 2 == child.kv_bytes_per_sequence(n)
        saved = 1 - child.kv_bytes_per_sequence(n) / parent.kv_bytes_per_sequence(n)
        assert f"{saved:.1%}" == "41.6%"

    def test_a_window_saves_nothing_before_it_fills(self, parent, child):
        assert child.kv_bytes_per_sequence(8192) == parent.kv_bytes_per_sequence(8192)
        assert child.kv_bytes_per_token() == parent.kv_bytes_per_token() == 36 * 2048

    def test_yarn_as_published(self, parent):
        rope = parent.rope
        assert (rope.rope_type, rope.factor, rope.theta, rope.truncate) == ("yarn", 32.0, 150000.0, False)


def oracle_kv_bytes(blocks: list[BlockConfig], num_tokens: int, bytes_per_layer: int) -> int:
    """Count by simulation: after each token a layer forgets what no later query can see."""
    total = 0
    for block in blocks:
        kept: list[int] = []
        for position in range(num_tokens):
            kept.append(position)
            if block.sliding_window is not None:
                kept = [key for key in kept if key > position - block.sliding_window]
        total += len(kept) * bytes_per_layer
    return total


@given(st.lists(st.one_of(st.none(), st.integers(1, 40)), min_size=1, max_size=4), st.integers(1, 60))
def test_kv_bytes_equal_a_simulation(windows, num_tokens):
    a = toy_architecture([(2, window) for window in windows])
    expected = oracle_kv_bytes(list(a.blocks), num_tokens, 2 * 2 * 16 * 2)
    assert a.kv_bytes_per_sequence(num_tokens) == expected


class TestForms:
    """The same blocks, written in every way found in the wild."""

    BLOCKS = ((8, 16), (6, None), (5, 40))

    def config(self, **changes: object) -> dict[str, object]:
        config = toy_config(toy_architecture(self.BLOCKS))
        return {key: value for key, value in {**config, **changes}.items() if value != "absent"}

    def blocks_of(self, config: dict[str, object]) -> list[tuple[int, int | None]]:
        return [(b.num_local_experts, b.sliding_window) for b in PuzzleArchitecture.from_config(config).blocks]

    def test_flat_block_configs(self):
        assert self.blocks_of(self.config()) == list(self.BLOCKS)

    def test_block_configs_win_over_model_type(self):
        assert self.blocks_of(self.config(model_type="gpt_oss")) == list(self.BLOCKS)
        assert self.blocks_of(self.config(model_type="something_else")) == list(self.BLOCKS)

    def test_nested_as_modelopt_writes_them(self):
        nested = [
            {"attention": {"sliding_window": window, "no_op": False}, "ffn": {"moe": {"num_local_experts": n}}}
            for n, window in self.BLOCKS
        ]
        assert self.blocks_of(self.config(block_configs=nested)) == list(self.BLOCKS)

    @pytest.mark.parametrize("key_type", [str, int])
    def test_per_layer_config_of_transformers(self, key_type):
        overrides = {key_type(0): {"sliding_window": 16}, key_type(1): {"num_local_experts": 6}}
        overrides[key_type(2)] = {"num_local_experts": 5, "sliding_window": 40}
        config = self.config(block_configs="absent", per_layer_config=overrides, num_local_experts=8)
        assert self.blocks_of(config) == list(self.BLOCKS)

    def test_a_plain_gpt_oss_config(self):
        config = self.config(block_configs="absent", model_type="gpt_oss", num_local_experts=8, sliding_window=16)
        assert self.blocks_of(config) == [(8, 16), (8, None), (8, 16)]

    def test_a_plain_config_without_layer_types_alternates(self):
        config = self.config(
            block_configs="absent", layer_types="absent", model_type="gpt_oss", num_local_experts=8, sliding_window=16
        )
        assert self.blocks_of(config) == [(8, 16), (8, None), (8, 16)]

    def test_either_name_of_top_k(self):
        assert PuzzleArchitecture.from_config(self.config(num_experts_per_tok="absent")).experts_per_token == 2
        assert PuzzleArchitecture.from_config(self.config(experts_per_token="absent")).experts_per_token == 2

    @pytest.mark.parametrize("factor", [8, 8.0])
    @pytest.mark.parametrize("truncate", ["absent", True, False])
    def test_yarn_blocks_of_both_generations(self, factor, truncate):
        block = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": 64, "truncate": truncate}
        block = {key: value for key, value in block.items() if value != "absent"}
        old = self.config(rope_scaling=block, rope_theta=10000)
        new = self.config(rope_scaling="absent", rope_theta="absent", rope_parameters={**block, "rope_theta": 10000.0})
        expected = PuzzleArchitecture.from_config(old).rope
        assert PuzzleArchitecture.from_config(new).rope == expected
        assert (expected.theta, expected.factor, expected.truncate) == (10000.0, 8.0, truncate is not False)

    def test_of_two_rotary_blocks_the_older_spelling_wins_as_in_transformers(self):
        other = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 500.0, "original_max_position_embeddings": 64}
        both = PuzzleArchitecture.from_config(self.config(rope_parameters=other))
        assert both == PuzzleArchitecture.from_config(self.config())

    def test_without_a_rotary_block_it_is_the_released_models(self, parent):
        assert PuzzleArchitecture.from_config(self.config(rope_scaling="absent")).rope == parent.rope
        assert PuzzleArchitecture.from_config(self.config(rope_scaling=None)).rope.rope_type == "default"

    @pytest.mark.parametrize("changes", [{}, {"rope_scaling": None, "rope_theta": 1e4, "initial_context_length": 4096}])
    def test_a_rotary_block_is_written_as_it_is_read(self, changes):
        rope = PuzzleArchitecture.from_config(self.config(**changes)).rope
        assert RopeConfig.from_config(json.loads(json.dumps(rope.to_json())), source="test") == rope

    def test_child_config_is_read_back(self, parent, child):
        written = parent.with_blocks(child.blocks).child_config(json.loads(PARENT_FILE.read_text()))
        assert PuzzleArchitecture.from_config(json.loads(json.dumps(written))) == child
        assert written["model_type"] == "gpt_oss_puzzle"
        assert written["layer_types"] == json.loads(CHILD_FILE.read_text())["layer_types"]


class TestRotaryFrequencies:
    @pytest.mark.parametrize("truncate", [True, False])
    @pytest.mark.parametrize(
        "changes",
        [
            {"factor": 1.0},
            {"factor": 8.0},
            {},
            {"original_max_position_embeddings": 8},  # the blend would begin below the first pair
            {"original_max_position_embeddings": 131072, "rope_theta": 2.0},  # and end behind the last
            {"beta_fast": 1.0},  # no blend at all
        ],
    )
    def test_equal_transformers(self, changes, truncate):
        pytest.importorskip("torch")
        from transformers import GptOssConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        block = {
            "rope_type": "yarn",
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": truncate,
            "rope_theta": 150000.0,
            **changes,
        }
        theirs, scaling = ROPE_INIT_FUNCTIONS["yarn"](
            GptOssConfig(rope_scaling=block, rope_theta=block["rope_theta"], head_dim=64), device="cpu"
        )
        config = toy_config(toy_architecture([(4, None)]))
        del config["rope_scaling"], config["rope_theta"]
        rope = PuzzleArchitecture.from_config({**config, "rope_parameters": block}).rope
        assert rope.inverse_frequencies(64).tolist() == theirs.tolist()
        assert rope.attention_scaling == pytest.approx(scaling, abs=0, rel=1e-15)


class TestChildArchitectureFile:
    PARENT = toy_architecture([(8, 16), (8, None)])

    def read(self, tmp_path: Path, value: object) -> tuple[BlockConfig, ...]:
        file = tmp_path / "child.json"
        file.write_text(value if isinstance(value, str) else json.dumps(value))
        return read_blocks(file, self.PARENT)

    def test_block_configs_alone_or_a_whole_config(self, tmp_path):
        blocks = [{"num_local_experts": 4, "sliding_window": 16}, {"num_local_experts": 8, "sliding_window": 64}]
        expected = tuple(BlockConfig(**block) for block in blocks)
        assert self.read(tmp_path, {"block_configs": blocks}) == expected
        assert self.read(tmp_path, self.PARENT.child_config({"block_configs": []}) | {"block_configs": blocks}) == (
            expected
        )

    @pytest.mark.parametrize(
        ("layers", "message"),
        [
            ([(4, 16)], r"wrong number of layers \(found 1, expected 2\)"),
            ([(4, 16), (4, None), (4, 16)], "wrong number of layers"),
            ([(0, 16), (4, None)], r"block_configs\[0\].*found 0"),
            ([(4, 16), (9, None)], r"block_configs\[1\].*found 9"),
            ([(4, 16), (1, None)], r"block_configs\[1\].*found 1"),
            ([(4, 0), (4, None)], r"block_configs\[0\].*found 0"),
            ([(4, -5), (4, None)], r"block_configs\[0\].*found -5"),
            ([(4, 16.5), (4, None)], r"block_configs\[0\].sliding_window.*found 16.5"),
            ([("four", 16), (4, None)], r"block_configs\[0\].num_local_experts"),
        ],
    )
    def test_impossible_blocks_are_one_line_with_the_layer(self, tmp_path, layers, message):
        blocks = [{"num_local_experts": n, "sliding_window": w} for n, w in layers]
        with pytest.raises(ArchitectureError, match=message) as caught:
            self.read(tmp_path, {"block_configs": blocks})
        assert str(caught.value).startswith(str(tmp_path / "child.json"))
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            ({"num_local_experts": 3}, r"block_configs\[1\]\.sliding_window: missing key"),
            ({"num_local_experts": 3, "sliding_windw": 8}, r"block_configs\[1\]\.sliding_windw: unknown key"),
            ({"sliding_window": 8}, r"block_configs\[1\]\.num_local_experts: missing key"),
        ],
    )
    def test_an_entry_has_both_keys_and_no_other(self, tmp_path, entry, message):
        with pytest.raises(ArchitectureError, match=message):
            self.read(tmp_path, {"block_configs": [{"num_local_experts": 4, "sliding_window": 16}, entry]})

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"hidden_size": 128}, "hidden_size: is not the parent's .found 128, expected 64"),
            ({"vocab_size": "96"}, 'vocab_size: is not the parent\'s .found "96", expected 96'),
            ({"experts_per_token": 4}, "experts_per_token: is not the parent's .found 4, expected 2"),
        ],
    )
    def test_the_config_of_another_model(self, tmp_path, change, message):
        child = self.PARENT.child_config(toy_config(self.PARENT))
        assert self.read(tmp_path, child) == self.PARENT.blocks
        with pytest.raises(ArchitectureError, match=message):
            self.read(tmp_path, {**child, **change})

    def test_nesting_without_end(self, tmp_path):
        with pytest.raises(ArchitectureError, match=r"child\.json: not valid JSON: maximum recursion"):
            self.read(tmp_path, "[" * 200_000)

    @pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
    def test_numbers_that_are_none(self, tmp_path, number):
        with pytest.raises(ArchitectureError, match=rf"child\.json: not valid JSON: {number} is no finite number"):
            self.read(tmp_path, f'{{"block_configs": {number}}}')

    def test_a_window_beyond_the_models_length_is_merely_useless(self, tmp_path):
        blocks = [{"num_local_experts": 4, "sliding_window": 10**6}, {"num_local_experts": 4, "sliding_window": None}]
        assert self.read(tmp_path, {"block_configs": blocks})[0].sliding_window == 10**6

    @pytest.mark.parametrize("content", ["{", "[]", "{}", '{"block_configs": 3}', '{"block_configs": [7, 8]}'])
    def test_a_file_that_is_none(self, tmp_path, content):
        with pytest.raises(ArchitectureError, match=r"child\.json"):
            self.read(tmp_path, content)

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(ArchitectureError, match=r"nothing\.json: cannot be read"):
            read_blocks(tmp_path / "nothing.json", self.PARENT)


PLAIN = {"model_type": "gpt_oss", "block_configs": None}
"""No blocks of its own."""


class TestImpossibleConfigs:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"model_type": "llama", "block_configs": None}, "not a gpt-oss model"),
            ({"hidden_size": 0}, "hidden_size"),
            ({"hidden_size": "64"}, "hidden_size"),
            ({"hidden_size": 60}, "multiple of 32"),
            ({"intermediate_size": 33}, "multiple of 32"),
            ({"num_key_value_heads": 3}, "num_key_value_heads"),
            ({"head_dim": 15}, "head_dim"),
            ({"num_hidden_layers": 7}, "num_hidden_layers"),
            ({**PLAIN, "num_hidden_layers": 10**9}, r"num_hidden_layers: too large .found 10+, expected at most 10000"),
            ({"hidden_size": 2**31}, "hidden_size: too large .found 2147483648, expected at most 2147483647"),
            ({"block_configs": [{"num_local_experts": 8, "sliding_window": 10**12}] * 2}, "sliding_window: impossible"),
            ({"block_configs": [{"num_local_experts": 10**12, "sliding_window": 8}] * 2}, "experts: too large"),
            ({"block_configs": [{}] * 10_001}, "block_configs: too many layers .found 10001 entries, expected at most"),
            ({"experts_per_token": 3}, "experts_per_token: disagrees with num_experts_per_tok .found 3, expected 2"),
            ({"block_configs": []}, "block_configs"),
            ({"num_experts_per_tok": 6}, r"block_configs\[1\].num_local_experts"),
            ({"rope_scaling": {"rope_type": "longrope"}}, "rope_scaling.rope_type"),
            ({"rope_scaling": {"rope_type": "yarn", "factor": "big"}}, "rope_scaling"),
            ({"rope_scaling": {"rope_type": "yarn", "factor": 0}}, r"rope_scaling\.factor: .*positive number .found 0"),
            ({"rope_scaling": {"rope_type": "yarn"}}, r"rope_scaling\.factor: .*positive number .found null"),
            (
                {"rope_scaling": {"rope_type": "yarn", "factor": 8, "attention_factor": 1.0}},
                r"rope_scaling\.attention_factor: is not supported .found 1\.0, expected no such key",
            ),
            ({"rope_scaling": {"rope_type": "yarn", "factor": 8, "mscale": 2}}, r"mscale: is not supported"),
            (
                {"rope_scaling": {"rope_type": "yarn", "factor": 0.5}},
                r"rope_scaling\.factor: must be at least 1 .found 0",
            ),
            (
                {"rope_scaling": {"rope_type": "yarn", "factor": 8, "beta_fast": 1, "beta_slow": 32}},
                r"rope_scaling\.beta_fast: too small .found 1\.0, expected at least beta_slow, 32\.0",
            ),
            ({"rope_scaling": {"factor": 32.0}}, r"rope_scaling\.rope_type: missing key .expected yarn or default"),
            ({"rope_theta": 1}, r"rope_theta: must be greater than 1 .found 1"),
            ({"rope_scaling": "yarn"}, r'rope_scaling: must be an object .found "yarn"'),
            ({"rope_theta": -1.0}, r"rope_theta: must be a positive number .found -1\.0"),
            ({"rope_theta": float("inf")}, "rope_theta: must be a positive number"),
            ({"rms_norm_eps": None}, "rms_norm_eps: must be a positive number .found null"),
            ({"rms_norm_eps": 1e300}, r"rms_norm_eps: .*found 1e\+300, expected 1\.18e-38 to 3\.4e\+38"),
            ({"swiglu_limit": 1e-300}, r"swiglu_limit: .*found 1e-300, expected 1\.18e-38 to"),
            ({"rms_norm_eps": "x"}, 'rms_norm_eps: must be a positive number .found "x"'),
            ({"swiglu_limit": None}, "swiglu_limit: must be a positive number .found null"),
            ({"swiglu_alpha": 1.0}, r"swiglu_alpha: is built into every runtime .found 1\.0, expected 1\.702"),
            ({"attention_bias": "false"}, 'attention_bias: must be true or false .found "false"'),
            ({"quantization_config": "mxfp4"}, 'quantization_config: must be an object .found "mxfp4"'),
            (
                {"quantization_config": {"quant_method": "fp8"}},
                r'quant_method: unknown kind .found "fp8", expected mxfp4',
            ),
            ({**PLAIN, "sliding_window": None}, r"layer 0\.sliding_window: slides, and no window is given"),
            ({**PLAIN, "layer_types": {}}, "layer_types: unknown kind of attention .found {}"),
            ({**PLAIN, "layer_types": []}, r"layer_types: wrong number of layers .found 0, expected 2"),
            ({**PLAIN, "layer_types": 5}, "layer_types: unknown kind of attention .found 5"),
            (
                {**PLAIN, "layer_types": ["chunked_attention", "full_attention"]},
                'layer_types: unknown kind of attention .found "chunked_attention", expected sliding_attention or full',
            ),
            ({**PLAIN, "per_layer_config": [{}]}, "per_layer_config: must be an object"),
            ({**PLAIN, "per_layer_config": {"1": 5}}, r"per_layer_config\.1: must be an object .found 5"),
            ({"block_configs": [{"ffn": "a"}] * 2}, r'block_configs\[0\]\.ffn: must be an object .found "a"'),
        ],
    )
    def test_one_line_that_names_the_key(self, change, message):
        config = {**toy_config(toy_architecture([(8, 16), (5, None)])), **change}
        if change.get("block_configs", 0) is None:
            del config["block_configs"]
        with pytest.raises(ArchitectureError, match=message) as caught:
            PuzzleArchitecture.from_config(config, source="somewhere/config.json")
        assert str(caught.value).startswith("somewhere/config.json")
        assert "\n" not in str(caught.value)
