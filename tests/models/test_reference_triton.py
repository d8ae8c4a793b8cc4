"""The GPU kernels against their oracle, in a process that turns on Triton's interpreter before it imports Triton; and
compiled for GPUs that need not be there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton comes with CUDA builds of torch, or by `pip install triton`")

WIDTH, HEADS, KV_HEADS, HEAD_DIM = 2880, 64, 8, 64
"""gpt-oss-120B and its child."""
TENSOR_CORES = r"wgmma\.mma|mma\.sync|tcgen05\.mma"


def test_kernels_give_what_pytorch_gives():
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib"]
    run = subprocess.run(
        [*command, str(Path(__file__).with_name("triton_kernels.py"))],
        env={**os.environ, **interpreted},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout and "skipped" not in run.stdout


def compile_kernel(kernel, capability: int, types: dict[str, str], constants: dict[str, object], num_warps: int) -> str:
    """Compile for a GPU of this compute capability; its PTX. Pointers and what is named `..._offset` or `..._stride`
    are multiples of 16, as they are at the launch."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    aligned = [n for n in names if types.get(n, "").startswith("*") or n.endswith(("_offset", "_stride"))]
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs=constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": num_warps}).asm["ptx"]


def spilled_bytes(ptx: str, folder: Path) -> int:
    """Bytes a thread keeps in memory because it has no register left for them."""
    architecture = re.search(r"\.target (sm_\w+)", ptx)[1]
    assembler = "ptxas-blackwell" if architecture.startswith("sm_100") else "ptxas"
    source = folder / "kernel.ptx"
    source.write_text(ptx)
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / assembler
    command = [path, "-v", "--gpu-name", architecture, source, "-o", folder / "kernel.cubin"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(re.search(r"(\d+) bytes spill stores", run.stderr)[1])


@pytest.mark.parametrize("capability", [90, 100], ids=["H100", "B200"])
@pytest.mark.parametrize(("stored", "is_e4m3"), [("*u8", True), ("*bf16", False)], ids=["fp8", "bf16"])
@pytest.mark.parametrize("window", [0, 128])
def test_attention_compiles_to_tensor_core_instructions_without_spilling(
    capability, stored, is_e4m3, window, tmp_path, monkeypatch
):
    from puzzle_trtllm.models.reference.kernels import triton_attention, triton_prefill

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    types = {"q_ptr": "*bf16", "kv_ptr": stored, "storage_ptr": stored, "result_ptr": "*bf16", "scale": "fp32"}
    types |= dict.fromkeys(["sinks_ptr", "outputs_ptr", "maxima_ptr", "sums_ptr"], "*fp32")
    types |= dict.fromkeys(["blocks_ptr", "first_keys_ptr", "positions_ptr"], "*i64")
    types |= dict.fromkeys(["starts_ptr", "lengths_ptr", "ends_ptr"], "*i64")
    types |= {"values_offset": "i64", "own_values_offset": "i32", "q_stride": "i32", "num_blocks": "i32"}
    shape = {"HEADS": HEADS, "KV_HEADS": KV_HEADS, "HEAD_DIM": HEAD_DIM, "PADDED_DIM": HEAD_DIM, "BLOCK_TOKENS": 32}
    shape |= {"WINDOW": window, "KEYS": triton_attention.KEYS_AT_ONCE, "IS_E4M3": is_e4m3}
    rows = triton_prefill.ROWS_AT_ONCE
    for kernel, constants, num_warps in [
        (triton_attention._attend_share, {"ROWS": 16, "SHARES": 32}, 4),
        (triton_prefill._attend_chunk, {"ROWS": rows, "QUERIES": rows // 8}, triton_prefill.NUM_WARPS),
    ]:
        ptx = compile_kernel(kernel, capability, types, shape | constants, num_warps)
        assert re.search(TENSOR_CORES, ptx)
        assert spilled_bytes(ptx, tmp_path) == 0


@pytest.mark.parametrize("capability", [90, 100], ids=["H100", "B200"])
@pytest.mark.parametrize("rows", [16, 64])
def test_experts_compile_to_tensor_core_instructions_without_spilling(capability, rows, tmp_path, monkeypatch):
    from puzzle_trtllm.models.reference.kernels import triton_experts

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    types = {"blocks_ptr": "*u8", "scales_ptr": "*u8", "slots_ptr": "*i32", "experts_ptr": "*i32", "limit": "fp32"}
    types |= dict.fromkeys(["x_ptr", "hidden_ptr", "bias_ptr", "shares_ptr"], "*bf16") | {"each_ptr": "*fp32"}
    shape = {"GROUPS": WIDTH // 32, "ROWS": rows, "OUTPUTS": triton_experts.OUTPUTS_AT_ONCE}
    shape |= {"BYTES": triton_experts.BYTES_AT_ONCE}
    for kernel, constants in [
        (triton_experts._gate_up, {"CHOICES": 4, "FFN": WIDTH, "ALPHA": triton_experts.SWIGLU_ALPHA}),
        (triton_experts._down, {"HIDDEN": WIDTH}),
    ]:
        ptx = compile_kernel(kernel, capability, types, shape | constants, num_warps=4)
        assert re.search(TENSOR_CORES, ptx)
        assert spilled_bytes(ptx, tmp_path) == 0
