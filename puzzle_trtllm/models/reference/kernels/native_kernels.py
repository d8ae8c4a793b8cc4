"""The native CPU kernels (native.cpp) behind the kernel interface.

Tensors are contiguous (of the chunks' own K and V each half is), on the CPU, and of the compute dtype (float32 or
bfloat16); the library gets their addresses.

Legend: E experts, F intermediate, D hidden.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from puzzle_trtllm.models.reference.kernels import ExpertMixture
from puzzle_trtllm.models.reference.kernels.compiler import load_library
from puzzle_trtllm.models.reference.kernels.expert_weights import ExpertWeights
from puzzle_trtllm.models.reference.kernels.packing import (
    LANES,
    PackedMatrix,
    down_tiles,
    gate_up_tiles,
    pack,
    pack_bias,
    pack_linear,
)
from puzzle_trtllm.models.reference.kernels.reads import Chunks, GroupReads
from puzzle_trtllm.models.reference.kernels.torch_experts import hold_as_loaded

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float8_e4m3fn: 2, torch.uint8: 3}
"""`enum Dtype` of native.cpp."""
_KINDS = {"i": ctypes.c_int, "n": ctypes.c_int64, "p": ctypes.c_void_p, "f": ctypes.c_float}
_SIGNATURES = {
    "rms_norm": "ippfnnp",
    "linear": "ipppnnnpi",
    "rotate": "iippppnnnnpp",
    "write_cache": "pnnnpppnn",
    "route": "ipnnnpp",
    "decode_attention": "iipppnnpnnnnpnppni",
    "prefill_attention": "iippnpppnnpnnnnpnppni",
    "expert_mixture": "iippppppnnnnfpppnnppi",
}


class NativeKernels:
    """MXFP4 experts stay MXFP4: that is faster at every size. Raises CompileError where there is no library."""

    name = "native"

    def __init__(self, library: ctypes.CDLL | None = None) -> None:
        self._library = library or load_library()
        for name, signature in _SIGNATURES.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = [_KINDS[kind] for kind in signature], None

    def prepare_linear(self, weight: Tensor, bias: Tensor | None) -> NativeLinear:
        filled = weight.new_zeros(len(weight)) if bias is None else bias
        return NativeLinear(
            weight=pack_linear(weight),
            bias=down_tiles(filled.float()).contiguous(),
            outputs=len(weight),
            run=self._library.linear,
        )

    def prepare_experts(self, experts: ExpertWeights, *, limit: float) -> ExpertMixture:
        if experts.gate_up_bias.numel() == 0:  # a rank may hold no expert of a layer
            return hold_as_loaded(experts, limit=limit)
        dtype = experts.down_bias.dtype
        return NativeExperts(
            gate_up=pack(experts.gate_up, gate_up_tiles, dtype),
            down=pack(experts.down, down_tiles, dtype, pad_columns=LANES),
            gate_up_bias=pack_bias(experts.gate_up_bias, gate_up_tiles),
            down_bias=pack_bias(experts.down_bias, down_tiles),
            limit=limit,
            run=self._library.expert_mixture,
        )

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(x)
        rows, width = x.shape
        self._library.rms_norm(_DTYPES[x.dtype], x.data_ptr(), weight.data_ptr(), eps, rows, width, out.data_ptr())
        return out

    def rotate(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, kv_heads: int, kv_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        rows, all_heads, head_dim = qkv.shape
        heads = all_heads - 2 * kv_heads
        q = qkv.new_empty(rows, heads, head_dim)
        kv = qkv.new_empty(2, rows, kv_heads, head_dim, dtype=kv_dtype)
        self._library.rotate(
            _DTYPES[qkv.dtype],
            _DTYPES[kv_dtype],
            qkv.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            positions.data_ptr(),
            rows,
            heads,
            kv_heads,
            head_dim,
            q.data_ptr(),
            kv.data_ptr(),
        )
        return q, kv

    def write(self, storage: Tensor, rows: Tensor, offsets: Tensor, kv: Tensor) -> None:
        _, pool_rows, block_tokens, head_dim = storage.shape
        self._library.write_cache(
            storage.data_ptr(),
            pool_rows,
            block_tokens,
            head_dim * storage.element_size(),
            rows.data_ptr(),
            offsets.data_ptr(),
            kv.data_ptr(),
            rows.shape[0],
            rows.shape[1],
        )

    def decode_attention(self, q: Tensor, sinks: Tensor, storage: Tensor, reads: GroupReads) -> Tensor:
        sequences, heads, head_dim = q.shape
        out = q.new_empty(sequences, heads * head_dim)
        self._library.decode_attention(
            _DTYPES[q.dtype],
            _DTYPES[storage.dtype],
            q.data_ptr(),
            sinks.data_ptr(),
            out.data_ptr(),
            sequences,
            heads,
            *_cache_arguments(storage, reads),
            torch.get_num_threads(),
        )
        return out

    def prefill_attention(
        self, q: Tensor, kv: Tensor, sinks: Tensor, storage: Tensor, reads: GroupReads, chunks: Chunks
    ) -> Tensor:
        rows, heads, head_dim = q.shape
        out = q.new_empty(rows, heads * head_dim)
        self._library.prefill_attention(
            _DTYPES[q.dtype],
            _DTYPES[storage.dtype],
            q.data_ptr(),
            kv.data_ptr(),
            kv.stride(0),
            sinks.data_ptr(),
            out.data_ptr(),
            chunks.lengths.data_ptr(),
            len(chunks.lengths),
            heads,
            *_cache_arguments(storage, reads),
            torch.get_num_threads(),
        )
        return out

    def route(self, logits: Tensor, top: int) -> tuple[Tensor, Tensor]:
        rows, experts = logits.shape
        shares, chosen = logits.new_empty(rows, top), logits.new_empty(rows, top, dtype=torch.int64)
        self._library.route(
            _DTYPES[logits.dtype], logits.data_ptr(), rows, experts, top, shares.data_ptr(), chosen.data_ptr()
        )
        return shares, chosen


@dataclass(frozen=True, kw_only=True)
class NativeLinear:
    """A linear layer in tiles."""

    weight: Tensor
    """Tiles of `packing.pack_linear`."""
    bias: Tensor
    """float32, padded as the weight's rows."""
    outputs: int
    run: Callable[..., None]

    def __call__(self, x: Tensor) -> Tensor:
        rows, inputs = x.shape
        out = x.new_empty(rows, self.outputs)
        self.run(
            _DTYPES[x.dtype],
            self.weight.data_ptr(),
            self.bias.data_ptr(),
            x.data_ptr(),
            rows,
            inputs,
            self.outputs,
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out


@dataclass(frozen=True, kw_only=True)
class NativeExperts:
    """The experts of one layer in tiles."""

    gate_up: PackedMatrix
    down: PackedMatrix
    gate_up_bias: Tensor
    """float32 `[E, F / 16, 2, 16]`"""
    down_bias: Tensor
    """float32 `[E, D / 32, 2, 16]`"""
    limit: float
    run: Callable[..., None]

    def __call__(self, x: Tensor, shares: Tensor, chosen: Tensor) -> Tensor:
        tokens, width = x.shape
        top = chosen.shape[1]
        hidden, outputs = self.gate_up_bias.shape[1] * LANES, self.down_bias.shape[1] * 2 * LANES
        out = torch.empty_like(x)
        sums = x.new_empty(tokens, outputs, dtype=torch.float32)
        self.run(
            _DTYPES[self.gate_up.weights.dtype],
            _DTYPES[x.dtype],
            self.gate_up.weights.data_ptr(),
            _address(self.gate_up.scales),
            self.down.weights.data_ptr(),
            _address(self.down.scales),
            self.gate_up_bias.data_ptr(),
            self.down_bias.data_ptr(),
            len(self.gate_up_bias),
            width,
            hidden,
            outputs,
            self.limit,
            x.data_ptr(),
            shares.data_ptr(),
            chosen.data_ptr(),
            tokens,
            top,
            out.data_ptr(),
            sums.data_ptr(),
            torch.get_num_threads(),
        )
        return out


def _cache_arguments(storage: Tensor, reads: GroupReads) -> tuple[int, ...]:
    """`struct Cache` of native.cpp, but for its dtype."""
    _, pool_rows, block_tokens, head_dim = storage.shape
    blocks = reads.blocks
    places = blocks.data_ptr(), blocks.shape[1], reads.first_keys.data_ptr(), reads.positions.data_ptr()
    return storage.data_ptr(), pool_rows, reads.num_kv_heads, block_tokens, head_dim, *places, reads.window or 0


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
