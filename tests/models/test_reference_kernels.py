"""Every native kernel against the torch one, and which of them an engine takes."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from puzzle_trtllm import mxfp4
from puzzle_trtllm.errors import EngineError
from puzzle_trtllm.models.reference.kernels import Kernels, compiler
from puzzle_trtllm.models.reference.kernels.choice import choose_kernels
from puzzle_trtllm.models.reference.kernels.expert_weights import ExpertWeights, Mxfp4Matrix
from puzzle_trtllm.models.reference.kernels.native_kernels import NativeKernels
from puzzle_trtllm.models.reference.kernels.reads import Chunks, GroupReads
from puzzle_trtllm.models.reference.kernels.torch_kernels import TorchKernels

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, compiler.COMPILERS)), reason="no C++ compiler: the native kernels cannot exist here"
)
LIMIT = 2.0
"""Low, so that random gates and ups are clamped often."""


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Work is shared out among threads here, however few cores a worker of pytest has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def random_experts(experts: int, hidden: int, ffn: int, dtype: torch.dtype, form: str) -> ExpertWeights:
    def matrix(rows: int, columns: int) -> torch.Tensor | Mxfp4Matrix:
        values = torch.randn(experts, rows, columns) * columns**-0.5
        if form == "plain":
            return values.to(dtype)
        blocks, scales = mxfp4.quantize(values.numpy())
        return Mxfp4Matrix(blocks=torch.from_numpy(blocks), scales=torch.from_numpy(scales))

    return ExpertWeights(
        gate_up=matrix(2 * ffn, hidden),
        gate_up_bias=torch.randn(experts, 2 * ffn).to(dtype),
        down=matrix(hidden, ffn),
        down_bias=torch.randn(experts, hidden).to(dtype),
    )


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
KV_DTYPES = pytest.mark.parametrize(
    "kv_dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=["fp32", "bf16", "fp8"]
)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.03}
"""Of the largest output; bfloat16: a few units of its last place, since the torch path rounds between operations."""


def both(run: Callable[[Kernels], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The torch result, which is the oracle, and the native one."""
    return run(TorchKernels(dequantize_experts=False)), run(NativeKernels())


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype and found.shape == expected.shape
    error = (found.float() - expected.float()).abs().max()
    assert error <= TOLERANCE[expected.dtype] * expected.float().abs().max()


@needs_compiler
@DTYPES
@pytest.mark.parametrize("form", ["plain", "mxfp4"])
@pytest.mark.parametrize(
    ("experts", "hidden", "ffn", "top", "tokens"),
    [
        (1, 32, 32, 1, 1),
        (5, 64, 96, 2, 3),
        (7, 96, 32, 4, 40),
        (3, 160, 64, 3, 21),
        (40, 64, 32, 4, 6),
        (2, 64, 96, 2, 50),
    ],
)
def test_experts_equal_the_torch_path(dtype, form, experts, hidden, ffn, top, tokens):
    torch.manual_seed(experts + tokens)
    weights = random_experts(experts, hidden, ffn, dtype, form)
    x = torch.randn(tokens, hidden).to(dtype)
    shares, chosen = torch.randn(tokens, experts).softmax(-1).topk(top, dim=-1)
    shares = shares.to(dtype)
    chosen[::3, 0] = experts  # held by another rank
    expected, found = both(lambda kernels: kernels.prepare_experts(weights, limit=LIMIT)(x, shares, chosen))
    assert_close(found, expected)


@needs_compiler
@DTYPES
@pytest.mark.parametrize(("hidden", "ffn"), [(34, 22), (70, 17), (2, 1)])
def test_experts_of_odd_sizes_equal_the_torch_path(dtype, hidden, ffn):
    torch.manual_seed(hidden)
    weights = random_experts(3, hidden, ffn, dtype, "plain")
    x = torch.randn(9, hidden).to(dtype)
    shares, chosen = torch.randn(9, 3).softmax(-1).to(dtype).topk(2, dim=-1)
    expected, found = both(lambda kernels: kernels.prepare_experts(weights, limit=LIMIT)(x, shares, chosen))
    assert_close(found, expected)


@needs_compiler
@pytest.mark.parametrize("window", [None, 1, 20, 128])
@KV_DTYPES
@DTYPES
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_tokens"), [(8, 2, 32, 16), (8, 1, 64, 32), (3, 3, 24, 8), (4, 2, 10, 5)]
)
def test_decode_attention_equals_the_torch_path(heads, kv_heads, head_dim, block_tokens, dtype, kv_dtype, window):
    torch.manual_seed(head_dim)
    lengths = [1, 7, 33, 64, 150]
    group, storage = paged_cache(lengths, kv_heads, head_dim, block_tokens, kv_dtype, window)
    q = (2 * torch.randn(len(lengths), heads, head_dim)).to(dtype)
    sinks = torch.randn(heads)
    expected, found = both(lambda kernels: kernels.decode_attention(q, sinks, storage, group))
    assert_close(found, expected)


@needs_compiler
@pytest.mark.parametrize("window", [None, 1, 20, 128])
@KV_DTYPES
@DTYPES
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_tokens"), [(8, 2, 32, 16), (16, 1, 64, 32), (3, 3, 24, 8), (4, 2, 10, 5)]
)
def test_prefill_attention_equals_the_torch_path(heads, kv_heads, head_dim, block_tokens, dtype, kv_dtype, window):
    """Chunks with a long, a short and no past; of one token, of a tile exactly, and of several tiles of queries."""
    torch.manual_seed(head_dim)
    pasts, lengths = [150, 0, 7, 33, 0], [1, 70, 64, 140, 2]
    last, storage = paged_cache([max(1, past) for past in pasts], kv_heads, head_dim, block_tokens, kv_dtype, window)
    reads = replace(last, positions=torch.tensor(pasts))
    chunks = Chunks(lengths=torch.tensor(lengths), longest=max(lengths))
    q = (2 * torch.randn(sum(lengths), heads, head_dim)).to(dtype)
    # Behind those of three decoding sequences.
    kv = torch.randn(2, sum(lengths) + 3, kv_heads, head_dim).to(kv_dtype)[:, 3:]
    sinks = torch.randn(heads)

    def attend(kernels: Kernels) -> torch.Tensor:
        own_reads, own_chunks = replace(reads, derived={}), replace(chunks, derived={})
        return kernels.prefill_attention(q, kv, sinks, storage, own_reads, own_chunks)

    expected, found = both(attend)
    assert_close(found, expected)


@needs_compiler
@pytest.mark.parametrize("window", [None, 20])
@DTYPES
def test_a_prompt_attends_alike_to_the_bit_however_it_is_cut_and_whatever_is_beside_it(dtype, window):
    torch.manual_seed(0)
    length, cut, kv_heads, head_dim, block_tokens = 100, 45, 2, 32, 16
    q, kv = torch.randn(length, 8, head_dim).to(dtype), torch.randn(2, length, kv_heads, head_dim).to(dtype)
    sinks = torch.randn(8)
    storage = torch.zeros(2, 3 * kv_heads, block_tokens, head_dim, dtype=dtype)
    positions = torch.arange(cut)
    rows = positions[:, None] // block_tokens * kv_heads + torch.arange(kv_heads)
    NativeKernels().write(storage, rows, positions[:, None] % block_tokens, kv[:, :cut].contiguous())

    def attend(parts: list[slice]) -> torch.Tensor:
        reads = GroupReads(
            window=window,
            num_kv_heads=kv_heads,
            blocks=torch.tensor([[0, 1, 2]] * len(parts)),
            first_keys=torch.zeros(len(parts), dtype=torch.int64),
            positions=torch.tensor([part.start for part in parts]),
        )
        lengths = [part.stop - part.start for part in parts]
        chunks = Chunks(lengths=torch.tensor(lengths), longest=max(lengths))
        picked = torch.cat([torch.arange(part.start, part.stop) for part in parts])
        return NativeKernels().prefill_attention(q[picked], kv[:, picked], sinks, storage, reads, chunks)

    whole = attend([slice(0, length)])
    assert torch.equal(attend([slice(cut, length)]), whole[cut:])
    assert torch.equal(attend([slice(0, 7), slice(cut, length), slice(0, cut)])[-cut:], whole[:cut])


def paged_cache(
    lengths: list[int], kv_heads: int, head_dim: int, block_tokens: int, dtype: torch.dtype, window: int | None
) -> tuple[GroupReads, torch.Tensor]:
    """Sequences in shuffled blocks, those before the window dropped; what no sequence owns is not a number."""
    firsts = [0 if window is None else max(0, n - window) // block_tokens for n in lengths]
    counts = [-(-n // block_tokens) - first for n, first in zip(lengths, firsts, strict=True)]
    blocks = torch.randperm(sum(counts) + 3)
    table = torch.zeros(len(lengths), max(counts), dtype=torch.int64)
    storage = torch.full((2, len(blocks) * kv_heads, block_tokens, head_dim), float("nan"))
    start = 0
    for row, (length, first, count) in enumerate(zip(lengths, firsts, counts, strict=True)):
        table[row, :count] = blocks[start : start + count]
        for place, block in enumerate(table[row, :count].tolist()):
            filled = min(block_tokens, length - (first + place) * block_tokens)
            own = storage[:, block * kv_heads : (block + 1) * kv_heads, :filled]
            own.copy_(torch.randn(own.shape))
        start += count
    group = GroupReads(
        window=window,
        num_kv_heads=kv_heads,
        blocks=table,
        first_keys=torch.tensor(firsts) * block_tokens,
        positions=torch.tensor(lengths) - 1,
    )
    return group, storage.to(dtype)


@needs_compiler
@DTYPES
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(1, 64, 32), (5, 34, 7), (9, 2, 33), (40, 96, 130), (8, 256, 48)]
)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
def test_linear_layers_equal_the_torch_path(dtype, rows, inputs, outputs, with_bias):
    torch.manual_seed(rows)
    weight, bias = torch.randn(outputs, inputs).to(dtype), torch.randn(outputs).to(dtype) if with_bias else None
    x = torch.randn(rows, inputs).to(dtype)
    assert_close(*reversed(both(lambda kernels: kernels.prepare_linear(weight, bias)(x))))


@needs_compiler
@DTYPES
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (7, 50), (3, 256), (2, 5)])
def test_rms_norm_equals_the_torch_path(dtype, rows, width):
    torch.manual_seed(width)
    x, weight = (3 * torch.randn(rows, width)).to(dtype), torch.randn(width)
    assert_close(*reversed(both(lambda kernels: kernels.rms_norm(x, weight, 1e-5))))


@needs_compiler
@DTYPES
@KV_DTYPES
@pytest.mark.parametrize("head_dim", [20, 64])
def test_rotation_equals_the_torch_path_in_what_the_cache_stores_too(dtype, kv_dtype, head_dim):
    torch.manual_seed(0)
    heads, kv_heads = 6, 2
    qkv = (60 * torch.randn(9, heads + 2 * kv_heads, head_dim)).to(dtype)
    angles = torch.randn(40, head_dim // 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    positions = torch.randint(0, 40, (9,))
    (q, kv), (native_q, native_kv) = both(lambda kernels: kernels.rotate(qkv, cos, sin, positions, kv_heads, kv_dtype))
    assert_close(native_q, q)
    assert torch.equal(native_kv[1].float(), kv[1].float()), "V is only cast"
    one_place = 2.0**-3 if kv_dtype == torch.float8_e4m3fn else 2.0**-7
    room = one_place * kv.float().abs() + TOLERANCE[dtype] * kv.float().abs().max()
    assert ((native_kv.float() - kv.float()).abs() <= room).all()


@needs_compiler
def test_the_e4m3_store_rounds_and_saturates_as_torch_does():
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    values = bits[bits.isfinite()].unflatten(0, (-1, 32))
    qkv = torch.cat([torch.zeros_like(values), torch.zeros_like(values), values], dim=1).view(len(values), 3, 32)
    ones, zeros, positions = (
        torch.ones(1, 16).bfloat16(),
        torch.zeros(1, 16).bfloat16(),
        torch.zeros(len(values)).long(),
    )
    (_, expected), (_, found) = both(
        lambda kernels: kernels.rotate(qkv, ones, zeros, positions, 1, torch.float8_e4m3fn)
    )
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@needs_compiler
@KV_DTYPES
def test_writing_equals_the_torch_path(kv_dtype):
    torch.manual_seed(1)
    kv = torch.randn(2, 6, 2, 24).to(kv_dtype)
    rows = torch.tensor([[2 * block, 2 * block + 1] for block in (4, 0, 4, 3, 1, 0)])
    offsets = torch.tensor([[1], [0], [4], [2], [3], [4]])
    storages = [torch.zeros(2, 10, 5, 24).to(kv_dtype) for _ in range(2)]
    for kernels, storage in zip((TorchKernels(dequantize_experts=False), NativeKernels()), storages, strict=True):
        kernels.write(storage, rows, offsets, kv)
    assert torch.equal(storages[0].float(), storages[1].float())
    assert storages[0].float().abs().sum() > 0


@needs_compiler
@DTYPES
@pytest.mark.parametrize(("experts", "top"), [(4, 4), (16, 4), (100, 8), (1, 1)])
def test_routing_equals_the_torch_path(dtype, experts, top):
    torch.manual_seed(experts)
    logits = torch.stack([torch.randperm(experts) for _ in range(11)]).to(dtype) / 8  # no ties
    (shares, chosen), (native_shares, native_chosen) = both(lambda kernels: kernels.route(logits, top))
    assert torch.equal(chosen, native_chosen)
    assert_close(native_shares, shares)


def test_without_a_compiler_torch_takes_over_with_one_line_in_the_log(monkeypatch, caplog):
    monkeypatch.setattr(compiler, "COMPILERS", ())
    assert choose_kernels("auto", torch.device("cpu"), dequantize_experts=True).name == "torch"
    assert len(caplog.records) == 1 and "no C++ compiler" in caplog.text
    with pytest.raises(EngineError, match="no C\\+\\+ compiler"):
        choose_kernels("native", torch.device("cpu"), dequantize_experts=True)


def test_torch_can_be_forced_and_an_unknown_name_is_refused():
    assert choose_kernels("torch", torch.device("cpu"), dequantize_experts=True).name == "torch"
    with pytest.raises(EngineError, match="auto, native, triton, torch"):
        choose_kernels("fast", torch.device("cpu"), dequantize_experts=True)


@needs_compiler
@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flag names an x86 level")
@pytest.mark.parametrize("form", ["plain", "mxfp4"])
@DTYPES
def test_without_avx512_the_portable_code_equals_the_torch_path(form, dtype):
    flags = tuple("-march=x86-64-v3" if flag == "-march=native" else flag for flag in compiler.FLAGS)
    portable = NativeKernels(compiler.load_library(flags))
    torch.manual_seed(0)
    weights = random_experts(5, 64, 96, dtype, form)
    x = torch.randn(70, 64).to(dtype)
    shares, chosen = torch.randn(70, 5).softmax(-1).to(dtype).topk(2, dim=-1)
    matrix, bias = torch.randn(72, 64).to(dtype), torch.randn(72).to(dtype)
    group, storage = paged_cache([1, 33, 150], 2, 32, 16, torch.float8_e4m3fn, 20)
    q, sinks = torch.randn(3, 8, 32).to(dtype), torch.randn(8)
    chunks = Chunks(lengths=torch.tensor([40, 3, 1]), longest=40)
    chunk_q, chunk_kv = torch.randn(44, 8, 32).to(dtype), torch.randn(2, 44, 2, 32).to(torch.float8_e4m3fn)
    oracle = TorchKernels(dequantize_experts=False)
    for run in (
        lambda kernels: kernels.prepare_experts(weights, limit=LIMIT)(x, shares, chosen),
        lambda kernels: kernels.prepare_linear(matrix, bias)(x),
        lambda kernels: kernels.decode_attention(q, sinks, storage, group),
        lambda kernels: kernels.prefill_attention(
            *(chunk_q, chunk_kv, sinks, storage, replace(group, derived={}), replace(chunks, derived={}))
        ),
        lambda kernels: kernels.rms_norm(x, torch.ones(64), 1e-5),
    ):
        assert_close(run(portable), run(oracle))
