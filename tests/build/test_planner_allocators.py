"""Cache-allocation schemes: small pools by hand, and what holds for all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puzzle_trtllm.architecture import PuzzleArchitecture
from puzzle_trtllm.build.planner.allocators import (
    ALLOCATORS,
    find_allocator,
    trtllm_v1_equal,
    trtllm_v1_tuned,
    trtllm_v2,
    tuned_shares,
    vllm_blocks_per_sequence,
    vllm_capacity,
    vllm_grouping,
)
from puzzle_trtllm.build.planner.assumptions import Assumptions
from puzzle_trtllm.build.planner.kv_cache import KvGeometry
from puzzle_trtllm.build.planner.layout import Layout
from puzzle_trtllm.errors import ConfigError

DATA = Path(__file__).parents[1] / "data"
PARENT = PuzzleArchitecture.from_path(DATA / "gpt-oss-120b.config.json")
CHILD = PuzzleArchitecture.from_path(DATA / "gpt-oss-puzzle-88b.config.json")
ONE = Layout(kind="tp", gpus_per_replica=1)
SMALL = KvGeometry(layers_by_window=((64, 3), (None, 1)), bytes_per_token_and_layer=10)
"""Of 320 tokens (10 blocks of 32) a sequence keeps 3 x (64 / 32 + 1) = 9 blocks in windows and 10 in full attention."""
TINY = Assumptions(max_num_tokens=32)
"""TensorRT-LLM's V1 counts it with 3 x ((64 + 32) / 32 + 1) = 12 blocks in windows."""


def test_equal_pools_are_decided_by_the_hungriest_window() -> None:
    pool = 2 * 100 * 320  # 100 blocks of one layer for each pool
    # full: 100 blocks, 10 a sequence: 10; windows: 100 // 3 blocks of three layers for two prompts of 10, two steps of
    # 1 and 3 that each other sequence keeps: 5
    assert trtllm_v1_equal(SMALL, pool, 320, TINY).sequences == 5


def test_tuned_pools_are_bytes_over_blocks() -> None:
    # shares are multiples of 1/4096, so that they add up to 1 exactly
    assert tuned_shares(SMALL, 700 * 22 * 320, 320, TINY) == {
        64: pytest.approx(12 / 22, abs=1 / 4096),
        320: pytest.approx(10 / 22, abs=1 / 4096),
    }
    assert trtllm_v1_tuned(SMALL, 700 * 22 * 320, 320, TINY).sequences == pytest.approx(700, rel=0.002)


def test_one_pool_keeps_room_for_the_chunk_in_flight() -> None:
    # windows grow by 32 tokens while a chunk of 32 is in flight: 3 layers x 32 tokens x 10 bytes
    assert trtllm_v2(SMALL, 7 * 19 * 320 + 3 * 32 * 10, 320, TINY).sequences == pytest.approx(7)
    assert trtllm_v2(SMALL, 3 * 32 * 10 - 1, 320, TINY).sequences == 0


def test_vllm_groups_of_one_size_are_padded() -> None:
    by_kind, by_window = (vllm_grouping(KvGeometry.of(CHILD, "fp8", ONE), by=by) for by in ("kind", "window"))
    # 10 full and 26 sliding layers: groups of 10; the 18 short ones make two, the 8 long ones one
    assert (by_kind.layers_per_group, by_kind.groups_by_window) == (10, ((128, 2), (8192, 1), (None, 1)))
    # 18, 8 and 10 layers: groups of 8, so full attention needs two
    assert (by_window.layers_per_group, by_window.groups_by_window) == (8, ((128, 3), (8192, 1), (None, 2)))
    parent = KvGeometry.of(PARENT, "fp8", ONE)
    assert vllm_grouping(parent, by="kind") == vllm_grouping(parent, by="window")


def test_vllm_takes_the_larger_count_when_they_nearly_agree() -> None:
    """12 sliding and 13 full layers: groups of 13, one padded, rather than three groups of 12."""
    kv = KvGeometry(layers_by_window=((64, 12), (None, 13)), bytes_per_token_and_layer=10)
    grouping = vllm_grouping(kv, by="window")
    assert (grouping.layers_per_group, sum(groups for _, groups in grouping.groups_by_window)) == (13, 2)


@pytest.mark.parametrize(("more", "size"), [(17, 17), (18, 12)])
def test_vllm_counts_nearly_agree_below_one_and_a_half_times(more: int, size: int) -> None:
    kv = KvGeometry(layers_by_window=((64, 12), (None, more)), bytes_per_token_and_layer=10)
    assert vllm_grouping(kv, by="window").layers_per_group == size


def test_vllm_groups_are_as_large_as_the_sliding_layers_together_where_those_are_rarer() -> None:
    kv = KvGeometry(layers_by_window=((64, 4), (128, 4), (None, 26)), bytes_per_token_and_layer=10)
    grouping = vllm_grouping(kv, by="kind")
    assert (grouping.layers_per_group, grouping.groups_by_window) == (8, ((64, 1), (128, 1), (None, 4)))


def test_vllm_blocks_by_hand() -> None:
    kv = KvGeometry.of(CHILD, "fp8", ONE)
    grouping = vllm_grouping(kv, by="kind")
    # 131072 / 16; (127 + 16384) / 16 rounded up, and one; (8191 + 16384) / 16 rounded up, and one
    assert vllm_blocks_per_sequence(grouping, 131072, Assumptions()) == 8192 + 2 * (1032 + 1) + (1536 + 1)
    # 100 / 16 rounded up, and one more in each group with a window
    assert vllm_blocks_per_sequence(grouping, 100, Assumptions()) == 7 + 3 * (7 + 1)
    pool = 11795 * 16 * 1024 * 10
    assert vllm_capacity(kv, 3 * pool, 131072, Assumptions(), grouping).sequences == 3
    assert vllm_capacity(kv, 3 * pool - 1, 131072, Assumptions(), grouping).sequences < 3


@given(st.integers(2**30, 2**37), st.sampled_from([256, 4096, 8192, 65536, 131072]), st.sampled_from([PARENT, CHILD]))
def test_no_allocator_beats_ideal_paging(pool: int, length: int, model: PuzzleArchitecture) -> None:
    kv = KvGeometry.of(model, "fp8", ONE)
    best = ALLOCATORS["ideal"](kv, pool, length, Assumptions()).sequences
    for name, allocator in ALLOCATORS.items():
        capacity = allocator(kv, pool, length, Assumptions())
        assert 0 <= capacity.sequences <= best * (1 + 1e-9), name
        assert capacity.num_tokens == int(capacity.sequences * length)
        more = allocator(kv, 2 * pool, length, Assumptions()).sequences
        assert more >= capacity.sequences, name


def test_shares_add_up_to_one_in_ascending_order() -> None:
    for length in (100, 8192, 131072):
        shares = tuned_shares(KvGeometry.of(CHILD, "fp8", ONE), 2**34, length, Assumptions())
        assert list(shares) == sorted(shares)
        assert sum(shares.values()) == pytest.approx(1)


def test_an_unknown_allocator_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"allocator: unknown .* one of: ideal, trtllm_v1_equal, trtllm_v1_tuned"):
        find_allocator("paged")
