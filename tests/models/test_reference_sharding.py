"""What each rank holds, and that the parts together compute the whole: ranks as threads of one process, no sockets."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.kv_layout import plan_layout
from puzzle_trtllm.models.reference.kernels.choice import choose_kernels
from puzzle_trtllm.models.reference.kernels.torch_kernels import TorchKernels
from puzzle_trtllm.models.reference.kv_cache import PagedKvCache
from puzzle_trtllm.models.reference.model import ReferenceModel
from puzzle_trtllm.models.reference.rank_group import ALONE, Ranks
from puzzle_trtllm.models.reference.step import SequenceStep, plan_step
from puzzle_trtllm.models.reference.weights import WeightLoader
from puzzle_trtllm.parallelism import Parallelism
from puzzle_trtllm.sharding import Shard, count_shard_bytes, shards_of
from puzzle_trtllm.tensors import count_weight_bytes, tensor_table
from tests.toys import toy_architecture

CPU = torch.device("cpu")
HETEROGENEOUS = [(16, 24), (8, None), (24, 40)]
EIGHT_KV_HEADS = {"num_attention_heads": 16, "num_key_value_heads": 8, "intermediate_size": 288}
WIDTH_2880 = {"num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 2880, "head_dim": 8}


class ThreadRanks:
    """Ranks that are threads: the two collectives of a step, with torch.distributed's meaning."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.parts: list[torch.Tensor] = [torch.empty(0)] * size
        self.barrier = threading.Barrier(size, timeout=60)

    def of(self, rank: int) -> _ThreadRank:
        return _ThreadRank(self, rank)


class _ThreadRank(Ranks):
    def __init__(self, all_ranks: ThreadRanks, rank: int) -> None:
        self.all, self.rank = all_ranks, rank

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        parts = self._exchange(part)
        return torch.stack(parts).sum(dim=0)

    def gather_columns(self, part: torch.Tensor, total: int) -> torch.Tensor:
        whole = torch.cat(self._exchange(part), dim=1)
        assert whole.shape[1] == total
        return whole if self.rank == 0 else part[:, :0]

    def _exchange(self, part: torch.Tensor) -> list[torch.Tensor]:
        self.all.parts[self.rank] = part
        self.all.barrier.wait()
        parts = list(self.all.parts)
        self.all.barrier.wait()
        return parts


def logits_of_chunks(
    folder: Path,
    tokens: list[int],
    sizes: Parallelism,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype = torch.float32,
) -> list[torch.Tensor]:
    """Logits after a prompt chunk and some decode steps, from all ranks of `sizes`."""
    checkpoint = Checkpoint.open(folder)
    kernels = choose_kernels("auto", CPU, dequantize_experts=True)
    together = ThreadRanks(sizes.tensor)

    def run(shard: Shard) -> list[torch.Tensor]:
        weights = WeightLoader(checkpoint=checkpoint, dtype=dtype, device=CPU, kernels=kernels, shard=shard).load()
        ranks = together.of(shard.rank) if sizes.tensor > 1 else ALONE
        model = ReferenceModel(weights, kernels, max_seq_len=512, ranks=ranks)
        layout = plan_layout(
            weights.architecture,
            tokens_per_block=8,
            dtype=kv_dtype,
            budget_bytes=1 << 22,
            sequence_tokens=128,
            max_sequences=1,
        )
        cache = PagedKvCache(layout, CPU)
        blocks, logits, start = cache.admit(128), [], 0
        for length in (len(tokens) - 4, 1, 1, 1, 1):
            step = SequenceStep(
                tokens=tokens[start : start + length], start=start, blocks=blocks, wants_logits=start + length > 20
            )
            logits.append(model.forward(plan_step([step], cache), cache))
            start += length
        return logits

    with ThreadPoolExecutor(sizes.tensor) as threads:
        logits, *_ = threads.map(run, shards_of(checkpoint.architecture, sizes))
    return logits


@pytest.fixture(scope="module", autouse=True)
def one_thread_a_rank() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["mxfp4", "bf16"])
def eight_kv_heads(make_checkpoint, request) -> Path:
    return make_checkpoint(HETEROGENEOUS, experts_format=request.param, **EIGHT_KV_HEADS)


@pytest.fixture(scope="module")
def width_2880(make_checkpoint) -> Path:
    return make_checkpoint([(4, 24), (2, None)], **WIDTH_2880)


@pytest.mark.parametrize(("ranks", "expert_groups"), [(2, 2), (4, 1), (4, 2), (8, 1), (8, 4), (8, 8)])
def test_ranks_compute_what_one_rank_computes(eight_kv_heads, ranks, expert_groups):
    _compare(eight_kv_heads, ranks, expert_groups)


@pytest.mark.parametrize(("ranks", "expert_groups"), [(4, 1), (8, 1), (8, 2)])
def test_ninety_blocks_of_width_are_cut_unevenly_and_kv_heads_repeated(width_2880, ranks, expert_groups):
    _compare(width_2880, ranks, expert_groups)


def test_ranks_share_a_tied_head(make_checkpoint):
    folder = make_checkpoint(HETEROGENEOUS, tie_word_embeddings=True, **EIGHT_KV_HEADS)
    _compare(folder, 2, 2)


@pytest.fixture(scope="module")
def every_expert(make_checkpoint) -> Path:
    """All eight experts for every token: no near tie of a router turns a rounding into another expert's output."""
    return make_checkpoint([(8, 24), (8, None), (8, 40)], experts_per_token=8, **EIGHT_KV_HEADS)


TOLERANCE = {
    (torch.float32, torch.bfloat16): 0.001,
    (torch.float32, torch.float8_e4m3fn): 0.005,
    (torch.bfloat16, torch.bfloat16): 0.03,
    (torch.bfloat16, torch.float8_e4m3fn): 0.08,
}
"""By compute and cache dtype, of the largest logit. A sum of parts is not rounded as the whole is, and a K or V near
the middle between two values of the cache's dtype then becomes the other one."""


@pytest.mark.parametrize(("ranks", "expert_groups"), [(2, 2), (2, 1), (4, 1), (4, 4)])
@pytest.mark.parametrize(("dtype", "kv_dtype"), TOLERANCE, ids=["fp32-kv16", "fp32-kv8", "bf16-kv16", "bf16-kv8"])
def test_ranks_in_bfloat16_and_with_an_fp8_cache(every_expert, ranks, expert_groups, dtype, kv_dtype):
    tokens = torch.randint(7, 90, (70,), generator=torch.Generator().manual_seed(1)).tolist()
    sizes = Parallelism(tensor=ranks, moe_expert=expert_groups, moe_tensor=ranks // expert_groups)
    alone, together = (logits_of_chunks(every_expert, tokens, s, dtype, kv_dtype) for s in (Parallelism(), sizes))
    exact = logits_of_chunks(every_expert, tokens, Parallelism())
    for one, several, reference in zip(alone, together, exact, strict=True):
        assert (one - several).abs().max() <= TOLERANCE[dtype, kv_dtype] * one.abs().max()
        assert not torch.equal(one.float(), reference), "computed and stored as asked for"


def _compare(folder: Path, ranks: int, expert_groups: int) -> None:
    tokens = torch.randint(7, 90, (70,), generator=torch.Generator().manual_seed(1)).tolist()
    sizes = Parallelism(tensor=ranks, moe_expert=expert_groups, moe_tensor=ranks // expert_groups)
    alone, together = logits_of_chunks(folder, tokens, Parallelism()), logits_of_chunks(folder, tokens, sizes)
    for one, several in zip(alone, together, strict=True):
        assert one.shape == several.shape
        assert (one - several).abs().max() < 1e-4


@pytest.mark.parametrize("sizes", [(8, 1, 8), (8, 8, 1), (4, 2, 2)])
@pytest.mark.parametrize("experts_format", ["mxfp4", "bf16"])
def test_parts_cover_every_tensor_and_share_none_of_the_large_ones(sizes, experts_format):
    tensor, moe_expert, moe_tensor = sizes
    a = toy_architecture(HETEROGENEOUS, experts_format=experts_format, **EIGHT_KV_HEADS)
    shards = shards_of(a, Parallelism(tensor=tensor, moe_expert=moe_expert, moe_tensor=moe_tensor))
    shared = ("embed_tokens", "norm", "router", "o_proj.bias", "down_proj_bias")
    for name, spec in tensor_table(a).items():
        held = np.zeros(spec.shape, dtype=int)
        for shard in shards:
            held[shard.part(name)] += 1
        assert held.min() >= 1, name
        assert any(word in name for word in shared) or held.max() == 1, name
    adding = [shard.rank for shard in shards if shard.adds_bias("model.layers.0.self_attn.o_proj.bias")]
    assert adding == [0]
    adding = [shard.rank for shard in shards if shard.adds_bias("model.layers.0.mlp.experts.down_proj_bias")]
    assert adding == list(range(moe_expert))  # of each expert, one of the ranks that hold a part of it


def test_ranks_are_numbered_as_in_tensorrt_llm():
    a = toy_architecture([(4, None)], intermediate_size=64, num_attention_heads=4, num_key_value_heads=4)
    shards = shards_of(a, Parallelism(tensor=4, moe_expert=2, moe_tensor=2))
    assert [shard.experts(0).start for shard in shards] == [0, 2, 0, 2]
    assert [shard.expert_width.start for shard in shards] == [0, 0, 32, 32]


def test_the_width_2880_on_four_and_eight_ranks():
    a = toy_architecture([(4, None)], **WIDTH_2880)
    for ranks, blocks in ((4, [23, 23, 22, 22]), (8, [12, 12, 11, 11, 11, 11, 11, 11])):
        shards = shards_of(a, Parallelism(tensor=ranks, moe_tensor=ranks))
        assert [shard.local.intermediate_size // 32 for shard in shards] == blocks


def test_what_a_rank_computes_with_is_an_architecture_of_its_own():
    """16 query and 8 KV heads, 9 blocks of width: of 16 ranks two share each KV head."""
    a = toy_architecture(HETEROGENEOUS, **EIGHT_KV_HEADS)
    local = [shard.local for shard in shards_of(a, Parallelism(tensor=4, moe_expert=2, moe_tensor=2))]
    assert {(one.num_attention_heads, one.num_key_value_heads) for one in local} == {(4, 2)}
    assert [one.intermediate_size // 32 for one in local] == [5, 5, 4, 4]
    assert {one.blocks for one in local} == {a.blocks}  # the router knows all experts
    many = shards_of(a, Parallelism(tensor=16, moe_expert=8, moe_tensor=2))
    assert [shard.kv_heads.start for shard in many] == [rank // 2 for rank in range(16)]
    assert {(one.local.num_attention_heads, one.local.num_key_value_heads) for one in many} == {(1, 1)}
    assert Shard(architecture=a).local is a


def test_a_rank_reads_and_holds_its_part_alone(make_checkpoint):
    folder = make_checkpoint(HETEROGENEOUS, **EIGHT_KV_HEADS)
    checkpoint = Checkpoint.open(folder)
    a = checkpoint.architecture
    sizes = Parallelism(tensor=8, moe_expert=8)
    whole, replicated = count_weight_bytes(a), 2 * a.vocab_size * a.hidden_size
    kernels = TorchKernels(dequantize_experts=False)
    for shard in shards_of(a, sizes):
        loader = WeightLoader(checkpoint=checkpoint, dtype=torch.bfloat16, device=CPU, kernels=kernels, shard=shard)
        weights = loader.load()
        # Norms and sinks are held in float32, twice their size on disk; they, the routers and two biases are whole.
        assert weights.num_bytes == pytest.approx(count_shard_bytes(shard), rel=0.02)
        assert count_shard_bytes(shard) < replicated + (whole - replicated) / 8 * 1.25
    assert count_shard_bytes(Shard(architecture=a)) == whole


@pytest.mark.parametrize(
    ("llm_args", "expected"),
    [
        ({}, (1, 1, 1)),
        ({"tensor_parallel_size": 4}, (4, 1, 4)),
        ({"tensor_parallel_size": 4, "moe_expert_parallel_size": 2}, (4, 2, 2)),
        ({"tensor_parallel_size": 4, "moe_tensor_parallel_size": 2}, (4, 2, 2)),
        ({"tensor_parallel_size": 4, "moe_expert_parallel_size": 4, "moe_tensor_parallel_size": -1}, (4, 4, 1)),
        ({"tensor_parallel_size": 2, "moe_expert_parallel_size": 4}, (2, 4, 1)),
    ],
)
def test_sizes_follow_from_each_other_as_in_tensorrt_llm(llm_args, expected):
    sizes = Parallelism.from_llm_args(llm_args)
    assert (sizes.tensor, sizes.moe_expert, sizes.moe_tensor) == expected
    assert Parallelism.from_llm_args({}) == Parallelism()


@pytest.mark.parametrize(
    ("llm_args", "key", "expected"),
    [
        ({"tensor_parallel_size": 3}, "tensor_parallel_size", "a divisor of the 16 attention heads"),
        (
            {"tensor_parallel_size": 4, "moe_expert_parallel_size": 3},
            "moe_expert_parallel_size",
            "a divisor of tensor_parallel_size, 4",
        ),
        (
            {"tensor_parallel_size": 8, "moe_expert_parallel_size": 2, "moe_tensor_parallel_size": 2},
            "moe_tensor_parallel_size",
            "tensor_parallel_size / moe_expert_parallel_size, 8 / 2",
        ),
        (
            {"tensor_parallel_size": 16, "moe_expert_parallel_size": 16},
            "moe_expert_parallel_size",
            "a divisor of the 8 experts of layer 1",
        ),
        ({"tensor_parallel_size": 16}, "moe_tensor_parallel_size", "at most 9: the experts' 288 in blocks of 32"),
    ],
)
def test_what_a_model_cannot_have_is_named(llm_args, key, expected):
    a = toy_architecture(HETEROGENEOUS, **EIGHT_KV_HEADS)
    found = Parallelism.from_llm_args(llm_args)
    problems = [*found.problems(a), *found.width_problems(a)]
    assert (key, expected) in [(key, expected) for key, _, expected in problems]


def test_kv_heads_are_dealt_or_repeated_evenly_unless_every_rank_has_them_all():
    a = toy_architecture([(4, None)], num_attention_heads=12, num_key_value_heads=6)
    four = Parallelism(tensor=4, moe_expert=4)
    assert list(four.problems(a)) == [("tensor_parallel_size", 4, "a divisor or a multiple of the 6 KV heads")]
    assert list(four.problems(a, attention_dp=True)) == []
    for ranks in (1, 2, 3, 6, 12):
        assert list(Parallelism(tensor=ranks, moe_tensor=ranks).problems(a)) == []


def test_a_width_is_cut_into_as_many_parts_as_it_has_blocks_and_no_more():
    for experts_format, most in (("mxfp4", 9), ("bf16", 288)):
        a = toy_architecture([(4, None)], intermediate_size=288, experts_format=experts_format)
        assert list(Parallelism(tensor=most, moe_tensor=most).width_problems(a)) == []
        (problem,) = Parallelism(tensor=most + 1, moe_tensor=most + 1).width_problems(a)
        assert problem[:2] == ("moe_tensor_parallel_size", most + 1)
        assert problem[2].startswith(f"at most {most}: ")
