"""Shares of the KV memory that each window's pool gets, held to TensorRT-LLM's V1 manager and its schedulers."""

from __future__ import annotations

from fractions import Fraction
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puzzle_trtllm.architecture import PuzzleArchitecture
from puzzle_trtllm.build import window_shares
from puzzle_trtllm.build.derived_values import to_nested
from puzzle_trtllm.build.engine_build import explain
from puzzle_trtllm.build.planner.allocators import tuned_shares
from puzzle_trtllm.build.planner.assumptions import Assumptions
from puzzle_trtllm.build.planner.kv_cache import KvGeometry
from puzzle_trtllm.build.planner.layout import Layout
from puzzle_trtllm.build.window_shares import V1Load, format_shares, held_tokens
from tests.build.golden_deployments import CONFIGS, MODELS
from tests.build.v1_manager import NoFreeBlocksError, V1Manager

CHILD = MODELS["child"]


def upstreams_count(load: V1Load, window: int) -> int:
    """Blocks of one layer that TensorRT-LLM's scheduler wants free for a sequence: its own terms, in its own order."""
    input_limit = load.longest - 1
    temporary = max(0, min(load.chunk, input_limit - window))
    counted = -(-min(load.held, window + temporary) // load.tokens_per_block)
    slides = load.held > window and -(-load.held // load.tokens_per_block) > counted
    return counted + slides


def v1_load(windows, tokens, **values):
    values = {"chunk": 8192, "tokens_per_block": 32, **values}
    return V1Load(windows=tuple(min(w, tokens) for w in windows), longest=tokens, held=tokens, **values)


class TestWindowShares:
    def test_by_hand(self):
        """100 tokens in blocks of 10, 20 a step: window 10 counts 30 tokens and a block more in each of 3 layers, full
        attention 10 blocks in 1. Of 20 sequences windows are counted with 20 x 4 blocks, more than two prompts of 10,
        two steps of 2, and 18 x 2 that others keep: 3 x 80 and 200 of 440."""
        load = v1_load([10, 10, 10, 200], 100, chunk=20, tokens_per_block=10)
        assert [load.reserved(window) for window in (10, 100)] == [4, 10]
        assert load.sequences(440) == 20 and load.sequences(439) == 19
        assert load.shares(440) == pytest.approx([240 / 440, 200 / 440], abs=1 / 4096)
        # few sequences: their prompts are laid out whole, 10 blocks in every layer
        assert load.sequences(40) == 1 and load.sequences(39) == 0
        assert load.shares(40) == [0.75, 0.25] and format_shares([0.75, 0.25]) == "0.75,0.25"
        assert [load.needed(10, sequences) for sequences in (1, 2, 3)] == [10, 20, 20 + 4 + 2]
        # Parts of 4096 that a small pool needs are rounded up, 2.25 to 3; the largest, 4093.7, takes what is left.
        assert window_shares._on_grid([11, 20_000]) == [3, 4093]
        # Where sequences may be evicted, windows are counted with what they keep.
        evicting = v1_load([10, 10, 10, 200], 100, chunk=20, tokens_per_block=10, evicts=True)
        assert [evicting.reserved(window) for window in (10, 100)] == [2, 10]
        assert [evicting.needed(10, sequences) for sequences in (1, 2, 20)] == [10, 20, 24 + 18 * 2]
        # one block a sequence: as many sequences as blocks
        assert v1_load([200], 10, tokens_per_block=10).sequences(7) == 7

    @given(
        windows=st.lists(st.sampled_from([1, 31, 128, 1000, 8192, 131072, 10**6]), min_size=1, max_size=60),
        num_tokens=st.integers(1, 2_000_000),
        layer_blocks=st.integers(0, 10**7),
    )
    def test_one_share_a_window_and_their_printed_sum_is_exactly_one(self, windows, num_tokens, layer_blocks):
        load = v1_load(windows, num_tokens)
        shares = load.shares(layer_blocks)
        printed = [float(text) for text in format_shares(shares).split(",")]  # as TensorRT-LLM reads them
        assert len(printed) == len(set(load.windows)) and all(share > 0 for share in printed)
        assert sum(printed) == 1.0 and sum(map(Fraction, printed)) == 1

    @given(
        windows=st.lists(st.sampled_from([1, 31, 128, 1000, 8192, 131072]), min_size=2, max_size=60),
        num_tokens=st.sampled_from([33, 2048, 8192, 33792, 131072]),
        layer_blocks=st.integers(0, 10**6),
        chunk=st.sampled_from([1, 512, 2048, 8192]),
    )
    def test_every_pool_lets_in_what_is_promised(self, windows, num_tokens, layer_blocks, chunk):
        load = v1_load(windows, num_tokens, chunk=chunk)
        shares = load.shares(layer_blocks)
        promised = load.sequences(layer_blocks, shares)
        for share, (window, layers) in zip(shares, load.layers.items(), strict=True):
            pool = int(layer_blocks * share) // layers
            assert pool >= promised * upstreams_count(load, window)

    @pytest.mark.parametrize("seed", range(12))
    def test_pools_of_this_size_serve_any_prompts(self, seed):
        """Never run here: the manager and its schedulers in a few lines, with what the engine config promises."""
        source = Random(seed)
        tokens, size = source.choice([256, 512, 1024]), 2
        windows = [8] * 18 + [128] * 8 + [tokens] * 10
        load = v1_load(windows, tokens, chunk=source.choice([32, 64, 256]), tokens_per_block=size)
        one = sum(layers * load.needed(window, 1) for window, layers in load.layers.items())
        manager = V1Manager(load, int(one * source.choice([1.1, 2, 3, 6, 12])))
        prompts = [source.choice([tokens // 2, tokens - 1, source.randint(1, 40)]) for _ in range(60)]
        most = manager.run((prompt, source.randint(1, tokens - prompt)) for prompt in prompts)
        assert most == manager.max_batch_size >= 1

    def test_smaller_ones_do_not(self):
        """What the simulation is good for: pools of what windows keep let nobody in, and of one prompt not two."""
        load = v1_load([8, 8, 512], 512, chunk=32, tokens_per_block=2)
        manager = V1Manager(load, 2 * 10 * 256)
        manager.free = {8: 10 * 5, 512: 10 * 256}
        with pytest.raises(NoFreeBlocksError, match="window size 8"):
            manager.run([(400, 100)] * 4)
        manager.free = {8: 20, 512: 10 * 256}
        with pytest.raises(AssertionError, match="waits for ever"):
            manager.run([(400, 100)] * 4)
        manager.free = {8: 256, 512: 10 * 256}
        with pytest.raises(NoFreeBlocksError, match="window size 8"):
            manager.run([(500, 10)] * 4)

    @pytest.mark.parametrize("config", CONFIGS)
    @pytest.mark.parametrize("model", MODELS)
    def test_the_shipped_deployments_let_a_sequence_in(self, config, model):
        """With pools of what a window keeps, a prompt of 64K would wait for ever: window 128's would have some 100
        blocks, and the scheduler wants 261 free."""
        values = to_nested(explain(MODELS[model], config=config))
        load = v1_load(values["kv_cache_config"]["max_attention_window"], values["max_seq_len"])
        full = values["max_batch_size"] * load.reserved(load.longest) * load.layers[load.longest]
        shares = [float(share) for share in values["env_overrides"]["TRTLLM_WINDOW_SIZE_SHARES"].split(",")]
        for share, (window, layers) in zip(shares, load.layers.items(), strict=True):
            pool = full / shares[-1] * share / layers
            assert pool * 1.01 >= values["max_batch_size"] * upstreams_count(load, window)

    @pytest.mark.parametrize("num_tokens", [8192, 131072])
    def test_they_are_the_planners(self, num_tokens):
        child = PuzzleArchitecture.from_path(CHILD)
        kv = KvGeometry.of(child, "fp8", Layout(kind="tp", gpus_per_replica=1))
        theirs = tuned_shares(kv, 2**34, num_tokens, Assumptions())
        load = v1_load([block.sliding_window or num_tokens for block in child.blocks], num_tokens)
        assert load.shares(2**34 // (32 * kv.bytes_per_token_and_layer)) == list(theirs.values())

    def test_held_tokens(self):
        assert held_tokens(100, 50, "GUARANTEED_NO_EVICT") == 150
        assert held_tokens(100, 50, "MAX_UTILIZATION") == 125
