"""Decode steps from fixed buffers give what the model gives, whatever the batch is padded to.

A recording here is a second run on the same buffers instead of a CUDA graph; everything around it is what a GPU runs.
"""

from __future__ import annotations

import pytest
import torch

from puzzle_trtllm.architecture import PuzzleArchitecture
from puzzle_trtllm.kv_layout import plan_layout
from puzzle_trtllm.models.reference.decode_graphs import DecodeGraphs, default_batch_sizes
from puzzle_trtllm.models.reference.dummy import DummyCheckpoint
from puzzle_trtllm.models.reference.kernels.torch_kernels import TorchKernels
from puzzle_trtllm.models.reference.kv_cache import PagedKvCache
from puzzle_trtllm.models.reference.model import ReferenceModel
from puzzle_trtllm.models.reference.step import SequenceStep, plan_step
from puzzle_trtllm.models.reference.weights import WeightLoader
from puzzle_trtllm.parallelism import Parallelism
from puzzle_trtllm.sharding import Shard, shards_of
from puzzle_trtllm.tensors import tensor_table

CPU = torch.device("cpu")
LONGEST = 160


@pytest.fixture(scope="module")
def architecture(make_checkpoint) -> PuzzleArchitecture:
    return PuzzleArchitecture.from_path(make_checkpoint([(6, 24), (4, None), (3, 40)]))


def model_and_cache(architecture: PuzzleArchitecture) -> tuple[ReferenceModel, PagedKvCache]:
    kernels = TorchKernels(dequantize_experts=False)
    checkpoint, shard = DummyCheckpoint(architecture, CPU), Shard(architecture=architecture)
    weights = WeightLoader(checkpoint=checkpoint, dtype=torch.float32, device=CPU, kernels=kernels, shard=shard).load()
    layout = plan_layout(
        architecture,
        tokens_per_block=8,
        dtype=torch.float32,
        budget_bytes=1 << 24,
        sequence_tokens=LONGEST,
        max_sequences=8,
    )
    return ReferenceModel(weights, kernels, max_seq_len=LONGEST), PagedKvCache(layout, CPU)


def run_recorded(compute):
    """Compute at once, as a recorder does; then again at every replay, into the tensor that was given out first."""
    output = compute().clone()
    return lambda: output.copy_(compute()), output


def test_replayed_steps_equal_the_models(architecture):
    plain, plain_cache = model_and_cache(architecture)
    model, cache = model_and_cache(architecture)
    graphs = DecodeGraphs(model, cache, batch_sizes=[1, 4], record=run_recorded)
    replays = []
    for recorded in graphs._recorded:
        repeat = recorded._repeat
        recorded._repeat = lambda repeat=repeat, size=recorded.size: (replays.append(size), repeat())[1]
    lengths = [5, 30, 61, 90, 12]
    admitted = [(plain_cache.admit(LONGEST), cache.admit(LONGEST)) for _ in lengths]

    def both(parts: list[tuple[int, list[int], int]]) -> None:
        expected, found = (
            run(plan_step([step_of(row, tokens, start, side) for row, tokens, start in parts], held), held)
            for side, (run, held) in enumerate([(plain.forward, plain_cache), (graphs.forward, cache)])
        )
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

    def step_of(row: int, tokens: list[int], start: int, side: int) -> SequenceStep:
        return SequenceStep(tokens=tokens, start=start, blocks=admitted[row][side], wants_logits=True)

    for row, length in enumerate(lengths):
        both([(row, [(row * 13 + i) % 90 for i in range(length)], 0)])
    assert replays == []  # prompts run as usual
    for index in range(50):
        rows = [0, 1, 2] if index % 3 else [1] if index % 2 else [0, 1, 2, 3, 4]
        both([(row, [(index + row) % 90], lengths[row]) for row in rows])
        for row in rows:
            lengths[row] += 1
    assert set(replays) == {1, 4}  # batches of 1 and 3; 5 is more than was recorded


def test_the_default_batch_sizes():
    assert default_batch_sizes(1) == [1]
    assert default_batch_sizes(20) == [1, 2, 4, 8, 16, 20]
    assert default_batch_sizes(300)[-3:] == [128, 256, 300]


def test_dummy_tensors_are_those_of_the_architecture_and_the_same_for_all_ranks(architecture):
    checkpoint = DummyCheckpoint(architecture, CPU)
    for name, spec in tensor_table(architecture).items():
        tensor = checkpoint.torch(name)
        assert tuple(tensor.shape) == spec.shape
        assert tensor.dtype == (torch.uint8 if spec.dtype == "U8" else torch.bfloat16)
    name = "model.layers.0.mlp.experts.down_proj_blocks"
    halves = [
        checkpoint.torch(name, s.part(name)) for s in shards_of(architecture, Parallelism(tensor=2, moe_expert=2))
    ]
    assert torch.equal(torch.cat(halves), checkpoint.torch(name))
