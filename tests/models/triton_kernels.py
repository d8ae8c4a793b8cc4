"""The GPU kernels give what the PyTorch ones give; `test_reference_triton.py` runs this file in a process of its own.

On a CPU they run in Triton's interpreter (TRITON_INTERPRET=1, to be set before triton is imported): the same source,
one program after another, so what is shown is the arithmetic and the addresses, not what a compiler makes of them.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from puzzle_trtllm.kv_scales import E4M3_MAX
from puzzle_trtllm.models.reference.kernels import (
    torch_attention,
    torch_experts,
    triton_attention,
    triton_experts,
    triton_prefill,
)
from puzzle_trtllm.models.reference.kernels.expert_weights import ExpertWeights, Mxfp4Matrix
from puzzle_trtllm.models.reference.kernels.reads import Chunks, GroupReads

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
"""numpy has no bfloat16, so the interpreter cannot multiply it; float16 takes the same path."""


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cache_of(
    lengths: list[int], window: int | None, *, kv_heads: int, head_dim: int, block_tokens: int, dtype: torch.dtype
) -> tuple[torch.Tensor, GroupReads]:
    """A pool in which the sequences' blocks lie scattered, and the group that reads it: queries at the last tokens."""
    first = [0 if window is None else max(0, n - window) // block_tokens for n in lengths]
    counts = [(n - 1) // block_tokens + 1 - f for n, f in zip(lengths, first, strict=True)]
    num_blocks = sum(counts) + 3
    order = torch.randperm(num_blocks, generator=random(1)).tolist()
    table = torch.zeros(len(lengths), max(counts), dtype=torch.int64)
    for row, count in enumerate(counts):
        table[row, :count] = torch.tensor([order.pop() for _ in range(count)])
    values = torch.randn(2, num_blocks * kv_heads, block_tokens, head_dim, generator=random(2)) * 3
    values[:, ::5] *= 1e-3  # E4M3's subnormal numbers too
    group = GroupReads(
        window=window,
        num_kv_heads=kv_heads,
        blocks=table.to(DEVICE),
        first_keys=torch.tensor([f * block_tokens for f in first], device=DEVICE),
        positions=torch.tensor([n - 1 for n in lengths], device=DEVICE),
    )
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(dtype).to(DEVICE), group


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    ("window", "block_tokens", "heads", "kv_heads", "head_dim"),
    [(None, 32, 8, 2, 16), (100, 16, 8, 1, 64), (1, 32, 4, 4, 32), (17, 8, 6, 2, 24)],
)
def test_decode_attention(window, block_tokens, heads, kv_heads, head_dim, stored):
    lengths = [1, 5, 64, 65, 200, 1100]
    storage, group = cache_of(
        lengths, window, kv_heads=kv_heads, head_dim=head_dim, block_tokens=block_tokens, dtype=stored
    )
    q = torch.randn(len(lengths), heads, head_dim, generator=random(3)).to(DEVICE)
    sinks = torch.randn(heads, generator=random(4)).to(DEVICE)
    ours = triton_attention.decode_attention(q, sinks, storage, group)
    torch.testing.assert_close(ours, torch_attention.decode_attention(q, sinks, storage, group), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    ("window", "block_tokens", "heads", "kv_heads", "head_dim"),
    [(None, 32, 8, 2, 16), (100, 16, 16, 1, 64), (1, 32, 4, 4, 32), (17, 8, 6, 2, 24)],
)
def test_prefill_attention(window, block_tokens, heads, kv_heads, head_dim, stored):
    """Chunks with a long, a short and no past; of one token, of a tile exactly, and of several tiles of queries."""
    pasts, lengths = [150, 0, 7, 33, 0], [1, 70, 128, 20, 2]
    storage, last = cache_of(
        [max(past, 1) for past in pasts],
        window,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_tokens=block_tokens,
        dtype=stored,
    )
    reads = replace(last, positions=torch.tensor(pasts, device=DEVICE), derived={})
    chunks = Chunks(lengths=torch.tensor(lengths, device=DEVICE), longest=max(lengths))
    rows = sum(lengths)
    # Rows of a wider tensor, as behind decoding rows and beside the keys of a projection.
    q = torch.randn(rows + 3, heads + kv_heads, head_dim, generator=random(11)).to(DEVICE)[3:, :heads]
    kv = (torch.randn(2, rows + 3, kv_heads, head_dim, generator=random(12)) * 3).to(DEVICE, stored)[:, 3:]
    sinks = torch.randn(heads, generator=random(13)).to(DEVICE)
    ours = triton_prefill.prefill_attention(q, kv, sinks, storage, reads, chunks)
    oracle = torch_attention.prefill_attention(
        q, kv, sinks, storage, replace(reads, derived={}), replace(chunks, derived={})
    )
    torch.testing.assert_close(ours, oracle, atol=2e-5, rtol=1e-4)


def test_no_past_needs_no_blocks():
    reads = GroupReads(
        window=None,
        num_kv_heads=1,
        blocks=torch.zeros(2, 0, dtype=torch.int64, device=DEVICE),
        first_keys=torch.zeros(2, dtype=torch.int64, device=DEVICE),
        positions=torch.zeros(2, dtype=torch.int64, device=DEVICE),
    )
    chunks = Chunks(lengths=torch.tensor([5, 9], device=DEVICE), longest=9)
    q, kv = (torch.randn(shape, generator=random(14)).to(DEVICE) for shape in [(14, 4, 16), (2, 14, 1, 16)])
    storage, sinks = torch.zeros(2, 3, 8, 16, device=DEVICE), torch.zeros(4, device=DEVICE)
    ours = triton_prefill.prefill_attention(q, kv, sinks, storage, reads, chunks)
    oracle = torch_attention.prefill_attention(q, kv, sinks, storage, replace(reads, derived={}), chunks)
    torch.testing.assert_close(ours, oracle, atol=2e-5, rtol=1e-4)


def random_experts(num_experts: int, hidden: int, ffn: int, dtype: torch.dtype) -> ExpertWeights:
    generator = random(5)

    def matrix(outputs: int, inputs: int) -> Mxfp4Matrix:
        shape = (num_experts, outputs, inputs // 32)
        blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(118, 123, shape, generator=generator, dtype=torch.uint8)
        return Mxfp4Matrix(blocks=blocks.to(DEVICE), scales=scales.to(DEVICE))

    def bias(size: int) -> torch.Tensor:
        return torch.randn(num_experts, size, generator=generator).to(DEVICE, dtype)

    return ExpertWeights(
        gate_up=matrix(2 * ffn, hidden),
        gate_up_bias=bias(2 * ffn),
        down=matrix(hidden, ffn),
        down_bias=bias(hidden),
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (HALF, 2e-2)])
@pytest.mark.parametrize(("tokens", "num_experts", "hidden", "ffn"), [(1, 4, 64, 96), (7, 5, 96, 64), (40, 3, 160, 32)])
def test_experts(tokens, num_experts, hidden, ffn, dtype, tolerance):
    experts = random_experts(num_experts, hidden, ffn, dtype)
    x = torch.randn(tokens, hidden, generator=random(6)).to(DEVICE, dtype)
    logits = torch.randn(tokens, num_experts, generator=random(7)).to(DEVICE)
    logits[:, 1] = -1e9  # an expert that nobody asks for
    top, chosen = logits.topk(2, dim=-1)
    shares = top.softmax(dim=-1).to(dtype)
    ours = triton_experts.hold_mxfp4(experts, limit=7.0)(x, shares, chosen)
    oracle = torch_experts.hold_as_loaded(experts, limit=7.0)(x, shares, chosen)
    error = (ours.float() - oracle.float()).abs().max() / oracle.float().abs().max()
    assert error < tolerance


@pytest.mark.parametrize(("tokens", "num_experts", "rows"), [(1, 3, 16), (50, 4, 16), (33, 7, 32), (64, 2, 64)])
def test_tiles_hold_every_pair_once(tokens, num_experts, rows):
    chosen = torch.rand(tokens, num_experts, generator=random(8)).topk(2, dim=-1).indices
    slots, experts = triton_experts.tiles_by_expert(chosen, num_experts, rows)
    used = slots.view(-1, rows)
    assert sorted(slots[slots >= 0].tolist()) == list(range(chosen.numel()))
    for tile, expert in zip(used, experts, strict=True):
        assert set(chosen.flatten()[tile[tile >= 0].long()].tolist()) <= {int(expert)}


def test_experts_held_elsewhere_add_nothing():
    experts = random_experts(3, 64, 32, torch.float32)
    x = torch.randn(5, 64, generator=random(9)).to(DEVICE)
    chosen = torch.tensor([[0, 3], [3, 3], [2, 1], [3, 0], [1, 2]], device=DEVICE)  # 3 is nobody here
    shares = torch.rand(5, 2, generator=random(10)).to(DEVICE)
    here = torch.where(chosen < 3, shares, 0.0)
    ours = triton_experts.hold_mxfp4(experts, limit=7.0)(x, shares, chosen)
    oracle = torch_experts.hold_as_loaded(experts, limit=7.0)(x, here, chosen.clamp(max=2))
    torch.testing.assert_close(ours, oracle, atol=1e-4, rtol=1e-4)
    assert not ours[1].any()


def test_every_e2m1_code_at_common_scales():
    """One expert whose gate rows are each one code: the products show every code's value exactly."""
    hidden = ffn = 32
    codes = torch.arange(16, dtype=torch.uint8)
    blocks = torch.zeros(1, 2 * ffn, 1, 16, dtype=torch.uint8)
    blocks[0, ffn : ffn + 16, 0, 0] = codes  # up rows: the first column holds the code
    down = torch.zeros(1, hidden, 1, 16, dtype=torch.uint8)
    for i in range(hidden):
        down[0, i, 0, i // 2] = 0x02 << (4 * (i % 2))  # the identity: 1.0 on the diagonal
    scales = torch.full((1, 2 * ffn, 1), 127, dtype=torch.uint8)
    experts = ExpertWeights(
        gate_up=Mxfp4Matrix(blocks=blocks.to(DEVICE), scales=scales.to(DEVICE)),
        gate_up_bias=torch.cat([torch.full((1, ffn), 5.0), torch.zeros(1, ffn)], dim=1).to(DEVICE),
        down=Mxfp4Matrix(blocks=down.to(DEVICE), scales=scales[:, :hidden].contiguous().to(DEVICE)),
        down_bias=torch.zeros(1, hidden, device=DEVICE),
    )
    x = torch.zeros(1, hidden, device=DEVICE)
    x[0, 0] = 1.0
    one, first = torch.ones(1, 1, device=DEVICE), torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    found = triton_experts.hold_mxfp4(experts, limit=7.0)(x, one, first)
    torch.testing.assert_close(found, torch_experts.hold_as_loaded(experts, limit=7.0)(x, one, first))


def test_scales_beyond_the_kernels_arithmetic_are_refused():
    experts = random_experts(2, 32, 32, torch.float32)
    assert isinstance(experts.down, Mxfp4Matrix)
    experts.down.scales[1, 3, 0] = 241
    with pytest.raises(ValueError, match="above 240: found 241"):
        triton_experts.hold_mxfp4(experts, limit=7.0)
