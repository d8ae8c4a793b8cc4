"""The reference forward pass against transformers' GptOss, and against itself however the tokens are split up."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.kv_layout import plan_layout
from puzzle_trtllm.models.reference.kernels.choice import choose_kernels
from puzzle_trtllm.models.reference.kernels.compiler import COMPILERS
from puzzle_trtllm.models.reference.kv_cache import PagedKvCache
from puzzle_trtllm.models.reference.model import ReferenceModel
from puzzle_trtllm.models.reference.step import SequenceStep, plan_step
from puzzle_trtllm.models.reference.weights import WeightLoader
from puzzle_trtllm.sharding import Shard

CPU = torch.device("cpu")
HOMOGENEOUS = [(6, 24), (6, None), (6, 24), (6, None)]
CHILD = [(6, 24), (4, None), (3, 40), (2, 24)]
KERNELS = pytest.mark.parametrize(
    "kernels",
    [
        "torch",
        pytest.param("native", marks=pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no compiler")),
    ],
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from more, and lose much where other processes want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Driver:
    """Feeds sequences through the model in chunks, as the scheduler does, and keeps their logits."""

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype = torch.float32,
        kv_dtype: torch.dtype = torch.float32,
        dequantize: bool = True,
        kernels: str = "torch",
    ) -> None:
        chosen = choose_kernels(kernels, CPU, dequantize_experts=dequantize)
        checkpoint = Checkpoint.open(folder)
        shard = Shard(architecture=checkpoint.architecture)
        weights = WeightLoader(checkpoint=checkpoint, dtype=dtype, device=CPU, kernels=chosen, shard=shard).load()
        self.model = ReferenceModel(weights, chosen, max_seq_len=512)
        layout = plan_layout(
            weights.architecture,
            tokens_per_block=8,
            dtype=kv_dtype,
            budget_bytes=1 << 24,
            sequence_tokens=512,
            max_sequences=8,
        )
        self.cache = PagedKvCache(layout, CPU, reuse=False)
        self.tokens: list[list[int]] = []
        self.blocks: list[dict] = []

    def add(self, tokens: list[int]) -> int:
        self.tokens.append(list(tokens))
        self.blocks.append(self.cache.admit(512))
        return len(self.tokens) - 1

    def step(self, *parts: tuple[int, int, int]) -> torch.Tensor:
        """parts: (sequence, start, end), decoding ones first; logits of each part's last row."""
        steps = [
            SequenceStep(tokens=self.tokens[i][start:end], start=start, blocks=self.blocks[i], wants_logits=True)
            for i, start, end in parts
        ]
        return self.model.forward(plan_step(steps, self.cache), self.cache)


def tokens_of(length: int, seed: int) -> list[int]:
    return torch.randint(7, 90, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def oracle_logits(folder: Path, tokens: list[int]) -> torch.Tensor:
    """transformers' logits for every position, float32 `[tokens, V]`."""
    from puzzle_trtllm.models.huggingface.loading import load_causal_lm

    model = load_causal_lm(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.tensor([tokens]), use_cache=False).logits[0].float()


@pytest.mark.parametrize("blocks", [HOMOGENEOUS, CHILD], ids=["gpt_oss", "child"])
@pytest.mark.parametrize("experts_format", ["mxfp4", "bf16"])
@KERNELS
def test_logits_equal_transformers_at_every_position(make_checkpoint, blocks, experts_format, kernels):
    folder = make_checkpoint(blocks, experts_format=experts_format)
    tokens = tokens_of(150, seed=1)
    expected = oracle_logits(folder, tokens)
    driver = Driver(folder, kernels=kernels)
    sequence = driver.add(tokens)
    rows = [driver.step((sequence, 0, 70)), *(driver.step((sequence, i, i + 1)) for i in range(70, 150))]
    assert (torch.cat(rows) - expected[69:]).abs().max() < 1e-4


def test_logits_of_a_tied_head_equal_transformers(make_checkpoint):
    folder = make_checkpoint(CHILD, tie_word_embeddings=True)
    tokens = tokens_of(50, seed=1)
    driver = Driver(folder)
    assert (driver.step((driver.add(tokens), 0, 50))[-1] - oracle_logits(folder, tokens)[-1]).abs().max() < 1e-4


@pytest.mark.parametrize("chunks", [[1, 1, 1, 97], [13, 50, 37], [100], [99, 1], [64, 8, 28]])
def test_any_chunking_of_the_prompt_gives_the_same_logits(make_checkpoint, chunks):
    folder = make_checkpoint(CHILD)
    tokens = tokens_of(100, seed=2)
    expected = oracle_logits(folder, tokens)
    driver = Driver(folder)
    sequence = driver.add(tokens)
    start = 0
    for length in chunks:
        logits = driver.step((sequence, start, start + length))
        start += length
        assert (logits[0] - expected[start - 1]).abs().max() < 1e-4


@KERNELS
def test_a_mixed_batch_gives_each_sequence_its_own_logits(make_checkpoint, kernels):
    folder = make_checkpoint(CHILD)
    texts = [tokens_of(120, seed=3), tokens_of(45, seed=4), tokens_of(80, seed=5)]
    expected = [oracle_logits(folder, text) for text in texts]
    driver = Driver(folder, kernels=kernels)
    for text in texts:
        driver.add(text)
    driver.step((0, 0, 60))
    for i in range(30):  # sequence 0 decodes while 1 and 2 arrive in chunks
        parts = [(0, 60 + i, 61 + i)]
        parts += [(1, 20 + i - 10, 21 + i - 10)] if i >= 10 else []
        parts += [(1, 0, 20)] if i == 9 else []
        parts += [(2, 0, 33)] if i == 5 else [(2, 33, 80)] if i == 20 else []
        logits = driver.step(*parts)
        for row, (sequence, _, end) in zip(logits, parts, strict=True):
            assert (row - expected[sequence][end - 1]).abs().max() < 1e-4, (i, sequence)


def test_experts_kept_in_mxfp4_give_the_same_logits(make_checkpoint):
    folder = make_checkpoint(CHILD)
    tokens = tokens_of(60, seed=6)
    held, packed = Driver(folder), Driver(folder, dequantize=False)
    for driver in (held, packed):
        driver.add(tokens)
    assert (held.step((0, 0, 60)) - packed.step((0, 0, 60))).abs().max() < 1e-4
    assert packed.model.weights.num_bytes < held.model.weights.num_bytes


def test_both_ways_to_multiply_the_experts_give_the_same_logits(make_checkpoint, monkeypatch):
    from puzzle_trtllm.models.reference.kernels import torch_experts as experts

    folder = make_checkpoint(CHILD)
    tokens = tokens_of(60, seed=6)
    results = []
    for max_work in (0, 1 << 40):
        monkeypatch.setattr(experts, "DENSE_MAX_WORK", {torch.float32: max_work})
        driver = Driver(folder)
        driver.add(tokens)
        results.append(torch.cat([driver.step((0, 0, 59)), driver.step((0, 59, 60))]))
    assert (results[0] - results[1]).abs().max() < 1e-4


def test_tiles_of_queries_change_nothing(make_checkpoint, monkeypatch):
    from puzzle_trtllm.models.reference.kernels import torch_attention

    folder = make_checkpoint(CHILD)
    tokens = tokens_of(90, seed=7)
    whole = Driver(folder)
    whole.add(tokens)
    expected = whole.step((0, 0, 90))
    monkeypatch.setattr(torch_attention, "MAX_SCORES", 4000)
    tiled = Driver(folder)
    tiled.add(tokens)
    assert (tiled.step((0, 0, 90)) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("blocks", [HOMOGENEOUS, CHILD], ids=["gpt_oss", "child"])
def test_greedy_tokens_equal_transformers_for_200_steps(make_checkpoint, blocks):
    folder = make_checkpoint(blocks, seed=3)
    driver = Driver(folder)
    sequence = driver.add(tokens_of(20, seed=8))
    tokens = driver.tokens[sequence]
    tokens.append(int(driver.step((sequence, 0, 20)).argmax()))
    for _ in range(199):
        tokens.append(int(driver.step((sequence, len(tokens) - 1, len(tokens))).argmax()))
    expected = oracle_logits(folder, tokens)[19:-1].argmax(dim=-1).tolist()
    assert tokens[20:] == expected


@KERNELS
def test_fp8_kv_is_quantize_store_dequantize(make_checkpoint, kernels):
    """The same model in transformers with K and V passed through a saturating E4M3 cast gives the same logits.

    But where a key lies on the edge between two E4M3 numbers, to float32's rounding, the two may store neighbours, and
    the prompt's logits then differ by some 0.01: at most every fourth prompt here, with PyTorch's kernels too.
    """
    from transformers.models.gpt_oss import modeling_gpt_oss

    folder = make_checkpoint(HOMOGENEOUS)
    eager = modeling_gpt_oss.eager_attention_forward

    def through_e4m3(module, query, key, value, *args, **kwargs):
        key, value = (t.clamp(-448, 448).to(torch.float8_e4m3fn).to(t.dtype) for t in (key, value))
        return eager(module, query, key, value, *args, **kwargs)

    driver = Driver(folder, kv_dtype=torch.float8_e4m3fn, kernels=kernels)
    errors = []
    for seed in range(7):
        tokens = tokens_of(60, seed=seed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(modeling_gpt_oss, "eager_attention_forward", through_e4m3)
            expected = oracle_logits(folder, tokens)
        sequence = driver.add(tokens)
        rows = [driver.step((sequence, 0, 40)), *(driver.step((sequence, i, i + 1)) for i in range(40, 60))]
        errors.append(float((torch.cat(rows) - expected[39:]).abs().max()))
    assert statistics.median(errors) < 1e-4 and max(errors) < 0.05, errors
    exact = Driver(folder)
    exact.add(tokens)
    assert (exact.step((0, 0, 40))[0] - expected[39]).abs().max() > 1e-3, "the cast must have an effect"


BATCH, STEPS = 8, 30


def continue_together(driver: Driver, prompts: list[list[int]]) -> torch.Tensor:
    """Greedy continuations of all prompts in one batch; their logits, `[steps, prompts, V]`."""
    for prompt in prompts:
        driver.add(prompt)
    logits = [driver.step(*((i, 0, len(prompt)) for i, prompt in enumerate(prompts)))]
    for _ in range(STEPS - 1):
        for tokens, row in zip(driver.tokens, logits[-1], strict=True):
            tokens.append(int(row.argmax()))
        logits.append(driver.step(*((i, len(tokens) - 1, len(tokens)) for i, tokens in enumerate(driver.tokens))))
    return torch.stack(logits)


@KERNELS
@pytest.mark.parametrize("blocks", [HOMOGENEOUS, CHILD], ids=["gpt_oss", "child"])
def test_greedy_tokens_in_float32_do_not_depend_on_what_else_is_in_the_batch(make_checkpoint, blocks, kernels):
    folder = make_checkpoint(blocks, seed=4)
    prompts = [tokens_of(8 + 11 * i, seed=20 + i) for i in range(BATCH)]
    together = continue_together(Driver(folder, kernels=kernels), prompts)
    near_ties = 0
    for i, prompt in enumerate(prompts):
        alone = continue_together(Driver(folder, kernels=kernels), [prompt])[:, 0]
        differ = (alone.argmax(-1) != together[:, i].argmax(-1)).nonzero()
        if len(differ):  # what follows the first difference continues another text
            best, second = alone[differ[0, 0]].topk(2).values
            assert best - second < 1e-4, f"prompt {i} differs at step {int(differ[0, 0])}"
            near_ties += 1
    print(f"{kernels}: {near_ties} of {BATCH} prompts of {STEPS} tokens left by a near tie")


@KERNELS
def test_logits_in_bfloat16_hardly_depend_on_what_else_is_in_the_batch(make_checkpoint, kernels):
    """The tolerance is 3% of the largest logit: of the order of bfloat16's own rounding over four layers.

    Every expert answers every token: where a router chooses, a rounding may turn its near tie, and logits then differ
    by a quarter of the largest (as PyTorch's and the native kernels' do for CHILD).
    """
    folder = make_checkpoint([(4, 24), (4, None), (4, 40), (4, 24)], seed=4, experts_per_token=4)
    texts = [tokens_of(40 + 11 * i, seed=20 + i) for i in range(BATCH)]
    drivers = [Driver(folder, dtype=torch.bfloat16, kv_dtype=torch.bfloat16, kernels=kernels) for _ in range(BATCH + 1)]
    for i, text in enumerate(texts):
        drivers[-1].add(text)
        drivers[i].add(text)
    for start, end in [(0, 30), *((i, i + 1) for i in range(30, 40))]:
        together = drivers[-1].step(*((i, start, end) for i in range(BATCH)))
        alone = torch.cat([drivers[i].step((0, start, end)) for i in range(BATCH)])
        assert (together - alone).abs().max() <= 0.03 * alone.abs().max()
