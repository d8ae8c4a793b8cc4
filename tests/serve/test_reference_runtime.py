"""The reference runtime through TensorRT-LLM's LLM API: a real engine process, held to transformers and to itself."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from puzzle_trtllm.errors import EngineError
from puzzle_trtllm.serve.runtimes import load_runtime
from puzzle_trtllm.serve.runtimes.reference import LLM, KvCacheConfig, SamplingParams
from puzzle_trtllm.serve.runtimes.reference.arguments import read_arguments
from tests.serve.scripted import wait_until

CHILD = [(6, 24), (4, None), (3, 40), (2, 24)]
ARGS = {"dtype": "float32", "max_seq_len": 256, "max_batch_size": 8, "kv_cache_config": {"tokens_per_block": 8}}
LONGEST = 16_384
ENDLESS = SamplingParams(max_tokens=16_000, ignore_eos=True)
"""A quarter of a minute on a fast machine: still at work whenever it is aborted."""


@pytest.fixture(scope="module")
def child(make_checkpoint):
    return make_checkpoint(CHILD, seed=3)


@pytest.fixture(scope="module")
def llm(child) -> Iterator[LLM]:
    with LLM(child, **{**ARGS, "max_seq_len": LONGEST}) as engine:
        yield engine


@pytest.fixture(scope="module")
def small(child) -> Iterator[LLM]:
    """Of 256 tokens a sequence, and room for few sequences."""
    with LLM(child, **{**ARGS, "kv_cache_config": {"tokens_per_block": 8, "max_gpu_total_bytes": 150_000}}) as engine:
        yield engine


def prompt(seed: int, length: int = 20) -> list[int]:
    return torch.randint(7, 90, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def transformers_greedy(folder, tokens: list[int], count: int) -> tuple[list[int], list[float]]:
    """Greedy continuation and the gap between the two best logits at every step."""
    from puzzle_trtllm.models.huggingface.loading import load_causal_lm

    model = load_causal_lm(folder, dtype=torch.float32)
    out, gaps = list(tokens), []
    with torch.inference_mode():
        for _ in range(count):
            logits = model(torch.tensor([out]), use_cache=False).logits[0, -1]
            top = logits.topk(2)
            gaps.append(float(top.values[0] - top.values[1]))
            out.append(int(top.indices[0]))
    return out[len(tokens) :], gaps


def test_greedy_generation_equals_transformers(llm, child):
    expected, gaps = transformers_greedy(child, prompt(1), 60)
    assert min(gaps) > 1e-4, "a near tie would make the comparison meaningless; choose another seed"
    output = llm.generate(prompt(1), SamplingParams(max_tokens=60, ignore_eos=True)).outputs[0]
    assert output.token_ids == expected
    assert output.finish_reason == "length"


def test_a_full_batch_of_mixed_lengths_gives_each_request_what_it_gets_alone(llm):
    prompts = [prompt(seed, 5 + 13 * seed) for seed in range(12)]  # more than max_batch_size
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    alone = [llm.generate(p, params).outputs[0].token_ids for p in prompts]
    together = [r.outputs[0].token_ids for r in llm.generate(prompts, params)]
    assert together == alone


def test_each_prompt_of_a_list_may_have_parameters_of_its_own(llm):
    prompts, lengths = [prompt(1), prompt(2)], [3, 7]
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in lengths]
    results = llm.generate(prompts, params)
    assert [len(r.outputs[0].token_ids) for r in results] == lengths
    with pytest.raises(ValueError, match="1 sampling_params for 2 prompts"):
        llm.generate(prompts, params[:1])


def test_the_engine_computes_on_the_cores_that_it_is_given(child):
    last = max(os.sched_getaffinity(0))
    with LLM(child, **ARGS, cores=[last]) as engine:
        assert os.sched_getaffinity(engine.engine_pid) == {last}
        assert engine.facts["num_threads"] == 1
        assert engine.generate(prompt(1), SamplingParams(max_tokens=3)).outputs[0].token_ids
    for wrong in ([], [1 << 16], "01"):
        with pytest.raises(EngineError, match="cores: no such cores"):
            LLM(child, **ARGS, cores=wrong)


def test_reuse_on_and_off_generate_the_same_and_say_what_was_reused(llm, child):
    """Prompts that begin alike, in waves, greedy and sampled; the second wave finds the first one's blocks."""
    shared = prompt(20, 60)
    prompts = [shared[: 20 + 10 * (i % 5)] + prompt(21 + i, 1 + 7 * i) for i in range(8)]
    params = [
        SamplingParams(max_tokens=30, ignore_eos=True, return_perf_metrics=True),
        SamplingParams(max_tokens=30, ignore_eos=True, return_perf_metrics=True, top_p=0.9, seed=5),
    ]
    with LLM(child, **{**ARGS, "kv_cache_config": {"tokens_per_block": 8, "enable_block_reuse": False}}) as plain:
        expected = [[r.outputs[0].token_ids for r in plain.generate(prompts, p)] for p in params]
        assert plain.get_stats()[0]["kvCacheStats"]["reusedBlocks"] == 0
    before = llm.get_stats()[0]["kvCacheStats"]["reusedBlocks"]
    waves = [llm.generate(prompts, p) for p in (*params, params[0])]
    assert [[r.outputs[0].token_ids for r in wave] for wave in waves] == [*expected, expected[0]]
    for r in waves[-1]:
        assert r.metrics.num_reused_blocks == (len(r.prompt_token_ids) - 1) // 8 * 3
    assert llm.get_stats()[0]["kvCacheStats"]["reusedBlocks"] > before


def test_sampling_depends_on_seed_and_position_only(llm):
    params = SamplingParams(max_tokens=30, ignore_eos=True, top_k=20, temperature=1.5, seed=7)
    alone = llm.generate(prompt(2), params).outputs[0].token_ids
    crowd = llm.generate([prompt(s) for s in (5, 2, 9)], params)
    assert crowd[1].outputs[0].token_ids == alone
    other = SamplingParams(max_tokens=30, ignore_eos=True, top_k=20, temperature=1.5, seed=8)
    assert llm.generate(prompt(2), other).outputs[0].token_ids != alone


@pytest.mark.parametrize("sampling", [{"temperature": 2.0}, {"top_p": 1.0}, {"top_k": 0}, {"top_k": 50}])
def test_any_of_the_three_samples(llm, sampling):
    """As in TensorRT-LLM since 1.2: nothing else is needed."""
    greedy = llm.generate(prompt(3), SamplingParams(max_tokens=20)).outputs[0].token_ids
    drawn = [
        llm.generate(prompt(3), SamplingParams(max_tokens=20, seed=seed, **sampling)).outputs[0].token_ids
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2] and drawn[0] != greedy


@pytest.mark.parametrize("sampling", [{"temperature": 0.0, "top_p": 0.9}, {"top_k": 1, "temperature": 2.0}])
def test_temperature_0_and_top_k_1_are_greedy(llm, sampling):
    greedy = llm.generate(prompt(3), SamplingParams(max_tokens=20)).outputs[0].token_ids
    assert llm.generate(prompt(3), SamplingParams(max_tokens=20, seed=1, **sampling)).outputs[0].token_ids == greedy


def test_streaming_ends_with_what_the_whole_gives(llm):
    params = SamplingParams(max_tokens=25, ignore_eos=True)
    whole = llm.generate(prompt(4), params).outputs[0]

    async def stream() -> list[int]:
        lengths = []
        request = llm.generate_async(prompt(4), params, streaming=True)
        async for step in request:
            lengths.append(len(step.outputs[0].token_ids))
        assert request.outputs[0].token_ids == whole.token_ids
        assert request.outputs[0].text == whole.text
        return lengths

    lengths = asyncio.run(stream())
    assert lengths == sorted(set(lengths)) and lengths[-1] == 25


def test_streaming_gives_tokens_while_more_are_generated(llm):
    """How many at a time depends on who is busy."""

    async def first_step() -> str | None:
        request = llm.generate_async(prompt(4), ENDLESS, streaming=True)
        step = await anext(request)
        request.abort()
        assert step.outputs[0].token_ids
        return step.outputs[0].finish_reason

    assert asyncio.run(first_step()) is None


def test_stop_token_stop_string_and_end_of_sequence(llm):
    free = llm.generate(prompt(5), SamplingParams(max_tokens=40, ignore_eos=True)).outputs[0]
    token = free.token_ids[7]
    params = SamplingParams(max_tokens=40, ignore_eos=True, stop_token_ids=[token])
    by_token = llm.generate(prompt(5), params).outputs[0]
    assert by_token.token_ids == free.token_ids[: free.token_ids.index(token)]
    assert (by_token.finish_reason, by_token.stop_reason) == ("stop", token)
    by_end = llm.generate(prompt(5), SamplingParams(max_tokens=40, end_id=token)).outputs[0]
    assert (by_end.finish_reason, by_end.stop_reason) == ("stop", None)
    stop = free.text[6:9]
    by_text = llm.generate(prompt(5), SamplingParams(max_tokens=40, ignore_eos=True, stop=stop)).outputs[0]
    assert by_text.text == free.text[: free.text.index(stop)]
    assert (by_text.finish_reason, by_text.stop_reason) == ("stop", stop)


def test_min_tokens_holds_the_end_back(llm):
    free = llm.generate(prompt(5), SamplingParams(max_tokens=40, ignore_eos=True)).outputs[0].token_ids
    params = SamplingParams(max_tokens=40, end_id=free[3], min_tokens=20)
    assert len(llm.generate(prompt(5), params).outputs[0].token_ids) >= 20


@pytest.mark.parametrize("nobody", [-1, 10**6])
def test_an_end_that_is_no_token_ends_nothing(llm, nobody):
    free = llm.generate(prompt(5), SamplingParams(max_tokens=20, ignore_eos=True)).outputs[0].token_ids
    params = SamplingParams(max_tokens=20, end_id=nobody, stop_token_ids=[nobody], min_tokens=5)
    assert llm.generate(prompt(5), params).outputs[0].token_ids == free


def test_numbers_may_be_numpys_or_torchs_and_nothing_else_reaches_the_engine(llm):
    params = SamplingParams(max_tokens=np.int64(9), top_k=torch.tensor(8), temperature=np.float32(0.5), seed=3)
    plain = SamplingParams(max_tokens=9, top_k=8, temperature=0.5, seed=3)
    expected = llm.generate(prompt(5), plain).outputs[0].token_ids
    array = np.array(prompt(5))
    for tokens in (torch.tensor(prompt(5)), array, list(array), {"prompt_token_ids": array}):
        assert llm.generate(tokens, params).outputs[0].token_ids == expected
    for bad in ([8.0] * 20, ["8"] * 20, torch.rand(5)):
        with pytest.raises(ValueError, match="token ids must be integers"):
            llm.generate_async(bad)
    wrong = {"max_tokens": "8", "seed": 1.5, "temperature": "hot", "stop_token_ids": [2.5], "repetition_penalty": 0}
    wrong |= {"top_p": float("nan"), "frequency_penalty": float("nan"), "presence_penalty": -float("inf")}
    wrong |= {"exclude_input_from_output": False}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"{name}: found"):
            SamplingParams(**{name: value})
    for stop in ("", ["a", ""], [1]):
        with pytest.raises(ValueError, match="stop: found"):
            SamplingParams(stop=stop)
    with pytest.raises(ValueError, match="stop strings are found in the text"):
        llm.generate_async(prompt(5), SamplingParams(stop="x", detokenize=False))


def test_prompts_beside_one_that_cannot_run_are_not_left_running(llm):
    steps = llm.get_stats()[0]["iter"]
    with pytest.raises(ValueError, match="empty"):
        llm.generate([prompt(1), prompt(2), []], ENDLESS)
    wait_until(lambda: not llm._open, what="the end of both")
    assert llm.get_stats()[0]["iter"] - steps < ENDLESS.max_tokens


def test_cumulative_logprob_is_the_sum_of_the_models_own(llm, child):
    from puzzle_trtllm.models.huggingface.loading import load_causal_lm

    output = llm.generate(prompt(6), SamplingParams(max_tokens=10, ignore_eos=True, logprobs=1)).outputs[0]
    tokens = prompt(6) + output.token_ids
    with torch.inference_mode():
        logits = load_causal_lm(child, dtype=torch.float32)(torch.tensor([tokens]), use_cache=False).logits[0]
    own = logits.log_softmax(-1)[range(19, 29), output.token_ids].sum()
    assert output.cumulative_logprob == pytest.approx(float(own), abs=1e-3)


def free_blocks(llm: LLM) -> tuple[int, int]:
    stats = llm.get_stats()[0]["kvCacheStats"]
    return stats["freeNumBlocks"], stats["maxNumBlocks"]


def test_abort_ends_the_request_and_frees_its_cache(llm):
    async def abort_midway() -> str | None:
        request = llm.generate_async(prompt(7), ENDLESS, streaming=True)
        async for step in request:
            if len(step.outputs[0].token_ids) >= 5:
                request.abort()
        return request.outputs[0].finish_reason

    assert asyncio.run(abort_midway()) == "cancelled"
    llm.generate(prompt(7), SamplingParams(max_tokens=1))
    free, total = free_blocks(llm)
    assert free == total


def test_prompts_that_cannot_run_are_refused_by_name(llm):
    too_long = [5] * LONGEST, f"max_seq_len is {LONGEST}"
    for bad, reason in (([], "empty"), too_long, ([5, 100_000], "token ids must lie in")):
        with pytest.raises(ValueError, match=reason):
            llm.generate_async(bad)


def test_what_does_not_fit_behind_the_prompt_is_not_generated(small):
    output = small.generate(prompt(8, 250), SamplingParams(max_tokens=100, ignore_eos=True)).outputs[0]
    assert (len(output.token_ids), output.finish_reason) == (6, "length")


def test_a_capped_cache_queues_instead_of_failing(small):
    params = SamplingParams(max_tokens=100, ignore_eos=True, return_perf_metrics=True)
    requests = small.generate([prompt(seed, 60) for seed in range(8)], params)
    assert [len(request.outputs[0].token_ids) for request in requests] == [100] * 8
    assert len(set(free_blocks(small))) == 1
    spans = [(r.metrics.first_scheduled_time_ns, r.metrics.last_token_time_ns) for r in requests]
    most = max(sum(begin <= moment < end for begin, end in spans) for moment, _ in spans)
    assert 1 < most < 8, "several at a time, and not all"


def test_a_cache_too_small_for_one_sequence_is_an_error(child):
    with pytest.raises(EngineError, match="too small for one sequence of 256 tokens"):
        LLM(child, **{**ARGS, "kv_cache_config": {"max_gpu_total_bytes": 10_000}})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_batch_size", "8"),
        ("max_seq_len", -5),
        ("kv_cache_config.tokens_per_block", 0),
        ("kv_cache_config.free_gpu_memory_fraction", 1.5),
        ("kv_cache_config.max_attention_window", [0, 256]),
    ],
)
def test_an_argument_out_of_range_is_named(key, value, child):
    section, _, name = key.rpartition(".")
    args = {**ARGS, section: {name: value}} if section else {**ARGS, name: value}
    with pytest.raises(EngineError, match=f"{key}.*out of range"):
        LLM(child, **args)


def test_an_argument_of_none_is_left_to_the_runtime(child):
    names = ("dtype", "max_attention_window", "free_gpu_memory_fraction", "tokens_per_block", "max_gpu_total_bytes")
    arguments, ignored = read_arguments(child, {"max_seq_len": None, "kv_cache_config": dict.fromkeys(names)})
    assert arguments.kv_cache_config == KvCacheConfig() and not ignored


def test_parallelism_and_damaged_models_are_refused(child, make_checkpoint):
    with pytest.raises(EngineError, match="tensor_parallel_size"):
        LLM(child, tensor_parallel_size=2)
    broken = make_checkpoint(CHILD)
    shard = sorted(broken.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(EngineError, match="truncated"):
        LLM(broken, **ARGS)


def test_a_step_that_fails_fails_its_requests_and_keeps_the_engine(child):
    """In process: the second step raises; its requests end with the reason, the next request runs."""
    from puzzle_trtllm.serve.runtimes.reference.loading import load_engine
    from puzzle_trtllm.serve.runtimes.reference.messages import DecodingRule, Submit

    engine, _ = load_engine(read_arguments(child, ARGS)[0])
    forward = engine.model.forward
    engine.submit(Submit(request_id=1, prompt_token_ids=prompt(1), rule=DecodingRule(max_tokens=5), arrival_ns=0))
    engine.step()

    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("no more memory")

    engine.model.forward = broken  # type: ignore[method-assign]
    assert [str(u.error) for u in engine.step()] == ["RuntimeError: no more memory"]
    engine.model.forward = forward  # type: ignore[method-assign]
    engine.submit(Submit(request_id=2, prompt_token_ids=prompt(1), rule=DecodingRule(max_tokens=5), arrival_ns=0))
    tokens = [token for _ in range(5) for update in engine.step() for token in update.token_ids]
    assert len(tokens) == 5
    assert engine.cache.num_free == engine.cache.num_blocks


def test_an_unknown_or_missing_runtime_is_named():
    with pytest.raises(EngineError, match="unknown runtime"):
        load_runtime("vllm")
    with pytest.raises(EngineError, match="tensorrt_llm is not installed here"):
        load_runtime("tensorrt_llm")


def test_importing_the_front_does_not_import_torch():
    import subprocess
    import sys

    code = "import sys, puzzle_trtllm.serve.runtimes.reference; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"avx2", "avx512_bf16"}, "bfloat16 (the CPU has avx512_bf16)"),
        ({"avx2"}, "float32 (the CPU has neither amx_bf16 nor avx512_bf16)"),
    ],
)
def test_the_compute_dtype_follows_the_cpus_flags_and_is_named(flags, expected, monkeypatch):
    from puzzle_trtllm.models.reference.kernels import choice

    monkeypatch.setattr(choice, "cpu_flags", lambda: frozenset(flags))
    assert choice.explain_compute_dtype("auto", torch.device("cpu")) == expected
    assert choice.explain_compute_dtype("float32", torch.device("cpu")) == "float32 (as asked for)"
