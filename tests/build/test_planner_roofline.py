"""Rates: routing against simulation, one step by hand, and what must hold whatever the numbers are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from puzzle_trtllm.architecture import PuzzleArchitecture
from puzzle_trtllm.build.planner import Assumptions, Load, plan, plan_json
from puzzle_trtllm.build.planner.kv_cache import KvGeometry
from puzzle_trtllm.build.planner.layout import parse_layout
from puzzle_trtllm.build.planner.roofline import RESOURCES, Setup, Step, step_seconds
from puzzle_trtllm.build.planner.routing import expected_distinct_experts
from puzzle_trtllm.build.planner.throughput import best_batch, estimate, prefill_seconds
from puzzle_trtllm.errors import ConfigError
from puzzle_trtllm.gpus import Gpu, load_gpu
from tests.toys import toy_architecture

DATA = Path(__file__).parents[1] / "data"
PARENT = PuzzleArchitecture.from_path(DATA / "gpt-oss-120b.config.json")
CHILD = PuzzleArchitecture.from_path(DATA / "gpt-oss-puzzle-88b.config.json")
QUIET = Assumptions(launch_us_per_layer=0, collective_latency_us=0)
LOAD = Load(isl=1024, osl=1024)


def setup(
    model: PuzzleArchitecture, name: str = "tp1", assumptions: Assumptions = QUIET, gpu: Gpu | None = None
) -> Setup:
    layout = parse_layout(name, int(name.lstrip("tpde")), model)
    return Setup(
        architecture=model, gpu=gpu or load_gpu("h100-80gb"), layout=layout, kv_dtype="fp8", assumptions=assumptions
    )


def test_distinct_experts_against_a_simulated_router() -> None:
    rng = np.random.default_rng(0)
    for experts, top_k, tokens in ((128, 4, 1), (128, 4, 32), (64, 4, 32), (8, 2, 3)):
        picks = np.argsort(rng.random((4000, tokens, experts)), axis=-1)[..., :top_k].reshape(4000, -1)
        seen = np.mean([len(set(row)) for row in picks.tolist()])
        assert expected_distinct_experts(experts, top_k, tokens) == pytest.approx(seen, rel=0.01)
    assert expected_distinct_experts(4, 4, 1) == 4


def test_one_decode_step_by_hand() -> None:
    """Two layers, one GPU, no launches: bytes over bandwidth, resource by resource."""
    a = toy_architecture([(8, 16), (4, None)])  # D 64, F 32, 4 heads and 2 KV heads of 16, top 2
    gpu = replace(load_gpu("h100-80gb"), memory_bytes_per_s=1e6, bf16_flops_per_s=1e12, fp8_flops_per_s=1e12)
    step = Step(tokens=1, start=99, stop=100, sequences=1, logits=1)
    seconds = step_seconds(setup(a, gpu=gpu), step)
    expert = (64 * 64 + 64 * 32) * 17 // 32 + 2 * (64 + 64)
    assert seconds["expert weights"] == pytest.approx(2 * 2 * expert / 1e6)  # 2 of 8, and 2 of 4
    assert seconds["KV reads"] == pytest.approx((16 + 100) * 2 * 2 * 16 / 1e6)  # K and V, 2 heads of 16, FP8
    projections = 2 * 2 * (4 * 16 * 64 + 2 * 16 * 64)  # BF16: Q and O, K and V
    other = 2 * projections + 2 * (8 + 4) * 64 + 2 * a.vocab_size * 64
    assert seconds["other weights"] == pytest.approx(other / 1e6)
    assert sum(seconds.values()) == pytest.approx(
        seconds["expert weights"] + seconds["KV reads"] + seconds["other weights"]
    )


def test_large_steps_are_bound_by_arithmetic() -> None:
    """A prompt chunk: 2 FLOPs a parameter of the k routed experts, whatever the experts weigh."""
    step = Step(tokens=8192, start=0, stop=8192, sequences=1, logits=1)
    parent, child = (step_seconds(setup(model), step) for model in (PARENT, CHILD))
    by_hand = 36 * 8192 * 4 * 2 * 3 * 2880 * 2880 / load_gpu("h100-80gb").bf16_flops_per_s
    assert parent["expert FLOPs"] == pytest.approx(by_hand)
    assert child["expert FLOPs"] == pytest.approx(by_hand)
    assert parent["expert weights"] == 0
    assert child["attention FLOPs"] == pytest.approx(parent["attention FLOPs"])  # no window of 8192 has filled


TWO_GPUS = toy_architecture([(8, 16), (4, None)])  # D 64, F 32, 4 heads and 2 KV heads of 16, top 2
ON_TWO_GPUS = Step(tokens=100, start=0, stop=100, sequences=10, logits=6)
KEYS = (sum(min(position + 1, 16) for position in range(100)) + sum(range(1, 101))) / 100
"""That a token of that step reads, both layers together."""


def test_what_two_gpus_multiply_by_hand() -> None:
    """Reading costs nothing. tp2 has half the heads and vocabulary for every token, dep2 all for half the tokens."""
    gpu = replace(
        load_gpu("h100-80gb"), memory_bytes_per_s=1e99, bf16_flops_per_s=1e6, fp8_flops_per_s=2e6, expert_math="fp8"
    )
    for name in ("tp2", "dep2"):
        seconds = step_seconds(setup(TWO_GPUS, name, gpu=gpu), ON_TWO_GPUS)
        projections = 2 * (2 * 4 + 2 * 2) * 16 * 64  # of both layers: Q and O, K and V
        assert seconds["other FLOPs"] == pytest.approx((2 * projections * 100 + 2 * 64 * TWO_GPUS.vocab_size * 6) / 2e6)
        assert seconds["attention FLOPs"] == pytest.approx(4 * 4 * 16 * KEYS * 100 / 2e6)
        assert seconds["expert FLOPs"] == pytest.approx(2 * 2 * (3 * 64 * 32) * 2 * 100 / 2 / 2e6)


def test_what_two_gpus_read_by_hand() -> None:
    """Multiplying costs nothing. tp2 reads half of attention and its cache, dep2 all of it for half the sequences."""
    gpu = replace(load_gpu("h100-80gb"), memory_bytes_per_s=1e6, bf16_flops_per_s=1e99, fp8_flops_per_s=1e99)
    skewed = replace(QUIET, expert_imbalance=1.5, distinct_expert_factor=0.5)
    expert = (64 * 64 + 64 * 32) * 17 // 32 + 2 * (64 + 64)
    attention = 2 * 2 * (2 * 4 + 2 * 2) * 16 * 64 + 2 * 64 * TWO_GPUS.vocab_size
    routers = 2 * (8 + 4) * 64
    for name, shared in (("tp2", 2), ("dep2", 1)):
        seconds = step_seconds(setup(TWO_GPUS, name, skewed, gpu), ON_TWO_GPUS)
        assert seconds["other weights"] == pytest.approx((attention / shared + routers) / 1e6)
        assert seconds["KV reads"] == pytest.approx(10 * KEYS * 2 * 2 * 16 / 2 / 1e6)
        assert seconds["expert weights"] == pytest.approx((8 + 4) * expert * 0.5 * 1.5 / 2 / 1e6)  # 100 tokens meet all


def test_launches_and_small_collectives_cost_their_constants() -> None:
    paced = Assumptions(launch_us_per_layer=20, collective_latency_us=10)
    gpu = replace(load_gpu("h100-80gb"), link_bytes_per_s=1e99)
    for name, collectives in (("tp1", 0), ("tp2", 2), ("dep2", 2)):
        seconds = step_seconds(setup(TWO_GPUS, name, paced, gpu), ON_TWO_GPUS)
        assert seconds["launches"] == pytest.approx(2 * 20e-6)
        assert seconds["links"] == pytest.approx(2 * collectives * 10e-6)


def test_links_by_hand() -> None:
    step = Step(tokens=100, start=0, stop=100, sequences=100, logits=100)
    moved = 36 * 7 / 8 * 100 * 2880 * 2 / load_gpu("h100-80gb").link_bytes_per_s
    assert step_seconds(setup(CHILD, "tp8"), step)["links"] == pytest.approx(4 * moved)  # two ring all-reduces
    assert step_seconds(setup(CHILD, "dep8"), step)["links"] == pytest.approx(2 * moved)  # gather and scatter
    assert step_seconds(setup(CHILD, "tp1"), step)["links"] == 0


def test_the_reciprocal_formula() -> None:
    one = setup(CHILD)
    e = estimate(one, LOAD, 64)
    prompt = sum(prefill_seconds(one, LOAD).values())
    assert e.roofline_tokens_per_s == pytest.approx(1024 / (prompt + 1024 * e.decode_step_s / 64))
    assert e.expected_tokens_per_s == pytest.approx(e.roofline_tokens_per_s * QUIET.efficiency)
    assert e.prefill_bound == "expert FLOPs"
    hidden = setup(CHILD, assumptions=replace(QUIET, prefill_overlap=1.0))
    assert estimate(hidden, LOAD, 64).roofline_tokens_per_s == pytest.approx(64 / e.decode_step_s)


def test_a_chunk_of_short_prompts_costs_what_its_tokens_cost() -> None:
    """Eight prompts of 1024 in a chunk of 8192: an eighth of the chunk each."""
    chunk = step_seconds(setup(CHILD), Step(tokens=8192, start=0, stop=1024, sequences=8, logits=8))
    assert sum(prefill_seconds(setup(CHILD), LOAD).values()) == pytest.approx(sum(chunk.values()) / 8)


def test_prompts_share_chunks_or_are_cut_into_them() -> None:
    """Of 16 tokens 512 prompts fill a chunk, each with logits and keys of its own; one of 16384 fills two."""
    for isl, in_a_chunk, chunks in ((16, 512, 1 / 512), (16384, 1, 2)):
        for name, ranks in (("tp2", 1), ("dep2", 2)):
            one = setup(CHILD, name)
            sequences = in_a_chunk * ranks
            step = Step(tokens=8192 * ranks, start=0, stop=isl, sequences=sequences, logits=sequences)
            by_hand = {key: seconds * chunks / ranks for key, seconds in step_seconds(one, step).items()}
            assert prefill_seconds(one, Load(isl=isl, osl=1)) == pytest.approx(by_hand)


def test_more_sequences_are_never_slower_together_and_never_faster_alone() -> None:
    rates = [estimate(setup(CHILD), LOAD, batch).roofline_tokens_per_s for batch in (1, 2, 4, 16, 64, 256)]
    assert rates == sorted(rates)
    alone = [rate / batch for rate, batch in zip(rates, (1, 2, 4, 16, 64, 256), strict=True)]
    assert alone == sorted(alone, reverse=True)


def test_a_step_waits_for_the_gpu_with_most_sequences() -> None:
    """Of nine sequences on eight GPUs one GPU holds two, as with sixteen; a single one is not shared either."""
    load = Load(isl=65536, osl=1)
    by_batch = {b: estimate(setup(CHILD, "dep8"), load, b).seconds_per_request["KV reads"] * b for b in (1, 8, 9, 16)}
    assert by_batch[1] == pytest.approx(by_batch[8])
    assert by_batch[9] == pytest.approx(by_batch[16])
    assert by_batch[16] == pytest.approx(2 * by_batch[8])


def test_the_knee_is_the_smallest_batch_within_ten_percent() -> None:
    best, knee = best_batch(setup(CHILD), LOAD, 500)
    assert best.batch == 500
    assert knee.roofline_tokens_per_s >= 0.9 * best.roofline_tokens_per_s
    assert estimate(setup(CHILD), LOAD, knee.batch // 2).roofline_tokens_per_s < 0.9 * best.roofline_tokens_per_s


def test_pruning_saves_nothing_at_batch_one_but_bytes_at_large_batches() -> None:
    def weights(model: PuzzleArchitecture, batch: int) -> float:
        step = Step(tokens=batch, start=0, stop=100, sequences=batch, logits=batch)
        return step_seconds(setup(model), step)["expert weights"]

    assert weights(CHILD, 1) == pytest.approx(weights(PARENT, 1))
    assert weights(CHILD, 200) / weights(PARENT, 200) == pytest.approx(0.75, abs=0.01)  # 96 of 128 on average


def test_a_plan_of_eight_gpus_is_whole() -> None:
    p = plan(CHILD, gpu=load_gpu("h100-80gb"), num_gpus=8, load=Load(isl=65536, osl=65536))
    value = plan_json(p)
    assert value["output_tokens_per_s"] == pytest.approx(8 * value["output_tokens_per_s_per_gpu"])
    assert sum(value["time_share"].values()) == pytest.approx(1)
    assert set(value["time_share"]) <= {*RESOURCES, "prompts"}
    assert value["bound"] == "KV reads"
    assert value["is_capacity_bound"] is True
    assert all(rate is None or rate <= value["output_tokens_per_s"] for rate in value["alternatives"].values())
    assert value["max_sequences"]["trtllm_v1_tuned"] > value["max_sequences"]["trtllm_v1_equal"]


@pytest.mark.parametrize(
    ("name", "isl", "osl", "expected"),
    [
        ("h100-80gb", 65536, 65536, True),
        ("h100-80gb", 512, 256, True),
        ("h200-141gb", 512, 256, False),  # 2048 fit, and the engine takes no more
        ("h100-80gb", 131071, 1, False),  # prompts take all the time, however many are in flight
    ],
)
def test_memory_is_a_bound_where_more_sequences_would_be_faster(name: str, isl: int, osl: int, expected: bool) -> None:
    p = plan(CHILD, gpu=load_gpu(name), num_gpus=1, load=Load(isl=isl, osl=osl))
    assert (p.best.batch == p.max_batch, p.is_capacity_bound) == (True, expected)


def test_replicas_add_up() -> None:
    """Four of two GPUs each hold and deliver four times what one does."""
    gpu, load = load_gpu("h100-80gb"), Load(isl=4096, osl=4096)
    one, four = (plan(CHILD, gpu=gpu, num_gpus=gpus, load=load, layout="tp2") for gpus in (2, 8))
    assert (four.setup.layout.name, four.best) == ("4 x tp2", one.best)
    assert four.num_in_flight == 4 * one.num_in_flight == 4 * one.best.batch
    assert four.tokens_per_s == 4 * one.tokens_per_s == 4 * one.best.expected_tokens_per_s
    assert four.tokens_per_s_per_gpu == one.tokens_per_s_per_gpu == one.tokens_per_s / 2
    assert four.sequences("ideal") == 4 * one.sequences("ideal")


def test_a_wanted_batch_is_kept_or_refused() -> None:
    gpu, load = load_gpu("h100-80gb"), Load(isl=65536, osl=65536)
    p = plan(CHILD, gpu=gpu, num_gpus=8, load=load, layout="dep8", batch=16)
    assert (p.best.batch, p.knee, p.is_capacity_bound) == (16, None, False)
    assert (plan_json(p)["best_batch"], plan_json(p)["knee_batch"]) == (16, None)
    with pytest.raises(ConfigError, match="no room for 4000 sequences of 131072 tokens"):
        plan(CHILD, gpu=gpu, num_gpus=8, load=load, layout="dep8", batch=4000)


def test_what_has_no_room_is_counted_as_its_allocator_counts() -> None:
    """Equal pools waste most of the memory: the bytes would hold 19 sequences."""
    gpu, load = load_gpu("h100-80gb"), Load(isl=65536, osl=65536)
    message = (
        r"no room for 10 sequences .*found 6 in [\d.]+ GiB of KV cache a GPU, cut by trtllm_v1_equal, expected 10 of "
    )
    with pytest.raises(ConfigError, match=message):
        plan(CHILD, gpu=gpu, num_gpus=1, load=load, allocator="trtllm_v1_equal", batch=10)
    with pytest.raises(ConfigError, match=r"no room for 3000 .*found 3\d{3} in .*, at most 2048 at once\)"):
        plan(CHILD, gpu=load_gpu("h200-141gb"), num_gpus=1, load=Load(isl=512, osl=256), batch=3000)


def test_what_a_sequence_needs_is_told_in_a_unit_that_shows_it() -> None:
    gpu, load = load_gpu("h100-80gb"), Load(isl=1024, osl=1024)
    each = KvGeometry.of(CHILD, "fp8", parse_layout("tp8", 8, CHILD)).bytes_per_sequence(2048) / 2**20
    with pytest.raises(ConfigError, match=rf"expected 100000 of {each:.2f} MiB and more"):
        plan(CHILD, gpu=gpu, num_gpus=8, load=load, layout="tp8", batch=100_000)


def test_attention_data_parallelism_holds_whole_sequences_on_each_gpu() -> None:
    tp, dep = (
        plan(CHILD, gpu=load_gpu("h100-80gb"), num_gpus=8, load=Load(isl=65536, osl=65536), layout=name)
        for name in ("tp8", "dep8")
    )
    assert dep.sequences("ideal") % 8 == 0
    assert dep.memory.weights.total > tp.memory.weights.total
    assert dep.sequences("ideal") < tp.sequences("ideal")
