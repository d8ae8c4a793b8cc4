"""How K and V lie in a pool, for kernels made of PyTorch operations.

One layer's storage is `[2, N * K, B, Dh]`: the rows of one block and head lie together, so that a gather of a
sequence's blocks gives `[K, tokens, Dh]` without a transpose. E4M3 is stored at unit scale and saturates at +-448
(torch's own cast would give NaN).

Legend: N blocks, B tokens a block, K KV heads, Dh head dim, S sequences, M blocks of the longest one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from puzzle_trtllm.kv_scales import E4M3_MAX


def store(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` as a cache of `dtype` stores them (saturating cast)."""
    if dtype == torch.float8_e4m3fn:
        return values.clamp(-E4M3_MAX, E4M3_MAX).to(dtype)
    return values.to(dtype)


def take(kv: Tensor, index: Tensor) -> Tensor:
    """`kv[:, index]` for a dtype that may have no indexing kernel (float8)."""
    return bits_of(kv)[:, index].view(kv.dtype)


def read_rows(storage: Tensor, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """K and V at `rows` `[2, S, K, M]` of one layer's storage, each as `[S, K, M * B, Dh]`."""
    _, sequences, heads, blocks = rows.shape
    picked = bits_of(storage).flatten(0, 1).index_select(0, rows.flatten())
    wide = expand_e4m3(picked, dtype) if picked.dtype == torch.uint8 else picked.to(dtype)
    keys, values = wide.view(2, sequences, heads, blocks * storage.shape[2], storage.shape[3])
    return keys, values


def pool_rows(table: Tensor, num_heads: int, rows_of_keys: int) -> Tensor:
    """A block table `[S, M]` as rows of K and of V, `[2, S, K, M]`; V's follow the `rows_of_keys` = N * K rows of K."""
    keys = table[:, None, :] * num_heads + torch.arange(num_heads, device=table.device)[None, :, None]
    return torch.stack([keys, keys + rows_of_keys])


def expand_e4m3(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """E4M3 codes (uint8, any shape) as bfloat16 or float32: exact, and several times faster than torch's cast on a CPU.

    Both wide types start with sign and exponent as E4M3 does, so the bits are moved into place (sign-extended, shifted,
    masked) and the difference of the exponent biases, 2^(127 - 7), is multiplied in; this is right for subnormals too.
    The two NaN codes come out as +-480: NaN never reaches a cache whose hidden states are finite.
    """
    if dtype == torch.bfloat16:
        wide, shift, mask = torch.int16, 4, -0x7810
    elif dtype == torch.float32:
        wide, shift, mask = torch.int32, 20, -0x78100000
    else:
        return codes.view(torch.float8_e4m3fn).to(dtype)
    bits = codes.view(torch.int8).to(wide).bitwise_left_shift_(shift).bitwise_and_(mask)
    return bits.view(dtype).mul_(2.0**120)


def bits_of(tensor: Tensor) -> Tensor:
    """The same memory as bytes where the dtype has no indexing kernels (float8)."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
