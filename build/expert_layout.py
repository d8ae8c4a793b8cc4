"""How TensorRT-LLM would deal out the experts, and which of that is refused before anything is written.

Ranks that expert parallelism leaves over cut the experts themselves: moe_tensor_parallel_size = tensor_parallel_size /
moe_expert_parallel_size, whether it is written down or not. The TRITON kernels had no such cut for MXFP4 experts in
2025; in later files they have one, untried on a GPU. CUTLASS has one that nobody has tried with this model, and the
width of 2880 is 90 MXFP4 blocks, so most cuts go through a block. Below Blackwell that is wrong without a word: the
loader (WFP4A16FusedMoEMethod, until autumn 2026 at least) cuts the values of down_proj at 2880 / n and its scales at
ceil(90 / n) blocks, so that values are multiplied by their neighbours' scales. The loaders for Blackwell pad to whole
blocks first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from puzzle_trtllm.architecture import PuzzleArchitecture
from puzzle_trtllm.build.gpu_args import OTHER_BACKEND, moe_backend
from puzzle_trtllm.build.serving_copy import serving_family
from puzzle_trtllm.errors import ConfigError
from puzzle_trtllm.families import GPT_OSS
from puzzle_trtllm.gpus import Gpu
from puzzle_trtllm.models.trtllm.upstream import Line
from puzzle_trtllm.mxfp4 import BLOCK_SIZE
from puzzle_trtllm.parallelism import Parallelism


def expert_cut(llm_args: Mapping[str, Any]) -> int:
    """Into how many parts each expert is cut."""
    return Parallelism.from_llm_args(llm_args).moe_tensor


def check_expert_layout(a: PuzzleArchitecture, llm_args: Mapping[str, Any], *, gpu: Gpu, file: str) -> None:
    """Raise ConfigError for experts dealt out as the kernels or the plugin cannot have them."""
    sizes = Parallelism.from_llm_args(llm_args)
    moe, cut = llm_args.get("moe_config") or {}, sizes.moe_tensor
    backend = _backend(a, moe, gpu)
    if cut > 1 and backend == "TRITON":
        raise ConfigError(
            "TRITON deals experts out whole",
            file=file,
            key="moe_expert_parallel_size",
            found=sizes.moe_expert,
            expected=f"{sizes.tensor}, or moe_config.backend CUTLASS to cut them (unverified)",
        )
    if gpu.expert_math == "bf16" and backend == "CUTLASS" and _cuts_a_block(a, cut):
        raise ConfigError(
            "CUTLASS below Blackwell gives a cut MXFP4 block the wrong scales",
            file=file,
            key="moe_tensor_parallel_size",
            found=cut,
            expected=f"a divisor of the experts' {a.intermediate_size // BLOCK_SIZE} blocks",
        )
    if moe.get("load_balancer") is not None and serving_family(a).trtllm_model is not None:
        raise ConfigError(
            "expert load balancing needs one expert count for all layers",
            file=file,
            key="moe_config.load_balancer",
            found="set",
            expected="none",
        )


def _backend(a: PuzzleArchitecture, moe_config: Mapping[str, Any], gpu: Gpu) -> object:
    """The kernels, also where AUTO leaves TensorRT-LLM the choice: it knows its own gpt-oss alone (gpu_args.py)."""
    if moe_config.get("backend") != "AUTO":
        return moe_config.get("backend")
    backend, _ = moe_backend(gpu) if serving_family(a) is GPT_OSS else OTHER_BACKEND
    return backend


def warn_of_cut(a: PuzzleArchitecture, llm_args: Mapping[str, Any]) -> list[str]:
    """What is unverified about cut experts; nothing where they are whole."""
    cut = expert_cut(llm_args)
    if cut == 1:
        return []
    blocks = a.intermediate_size // BLOCK_SIZE
    aligned = f", and {blocks} MXFP4 blocks do not divide by {cut}" if _cuts_a_block(a, cut) else ""
    return [f"experts cut into {cut} parts (expert tensor parallelism) are unverified{aligned}"]


def _cuts_a_block(a: PuzzleArchitecture, cut: int) -> bool:
    return a.experts_format == "mxfp4" and a.intermediate_size // BLOCK_SIZE % cut != 0


def warn_of_end(target: Line, llm_args: Mapping[str, Any]) -> list[str]:
    """What a newer TensorRT-LLM will not have for long."""
    if target == "1.2" or (llm_args.get("moe_config") or {}).get("backend") != "TRITON":
        return []
    return [
        "TensorRT-LLM deprecated its TRITON expert kernels in 1.3 and will remove them: "
        "`llm_args: {moe_config: {backend: CUTLASS}}` asks for those that remain on Hopper (unverified)"
    ]
