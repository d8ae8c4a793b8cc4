"""The real chain: a checkpoint, built into an engine, executed by the reference runtime, served by Triton over gRPC.

The oracle is the same engine in this process, without Triton.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import urllib.request

import grpc
import pytest
from tritonclient.grpc import service_pb2_grpc

from puzzle_trtllm.build.engine_build import build_engine
from puzzle_trtllm.engine import EngineConfig
from puzzle_trtllm.errors import ServeError
from puzzle_trtllm.process_states import children_of
from puzzle_trtllm.serve.client.request import GenerationRequest
from puzzle_trtllm.serve.client.tensors import RequestBuilder, unpack_string
from puzzle_trtllm.serve.client.triton_client import TritonLlmClient, generate
from puzzle_trtllm.serve.runtimes import create_llm
from puzzle_trtllm.serve.runtimes.api import SamplingParams
from puzzle_trtllm.serve.triton.contract import EXTRA_INPUTS
from puzzle_trtllm.serve.triton.server import TritonServer
from tests.serve.scripted import HANG_S, metric, settle, short_lived, wait_until

HTTP2_WINDOW = 1024
"""Bytes of a stream that may be under way unread, as its reader may ask for (RFC 9113)."""
ENDLESS = GenerationRequest(prompt="x" * 20, max_tokens=16_000, ignore_eos=True)
"""A quarter of a minute on a fast machine: still at work whenever something is done to it."""
PROMPTS = ["12+34=", "the quick brown fox", "x" * 50, "a", "2+2=", "carry the one"]


@pytest.fixture(scope="module")
def engine(make_checkpoint, tmp_path_factory):
    checkpoint = make_checkpoint([(8, None), (4, 16), (2, 32)], experts_per_token=2, max_position_embeddings=16_384)
    config = EngineConfig(
        runtime="reference", llm_args={"dtype": "float32", "max_seq_len": 16_384, "max_batch_size": 8}
    )
    return build_engine(checkpoint, tmp_path_factory.mktemp("real") / "engine", config=config)


@pytest.fixture(scope="module")
def expected(engine):
    """What the runtime says itself: greedy and sampled, by prompt."""
    greedy = SamplingParams(max_tokens=24, ignore_eos=True)
    sampled = SamplingParams(max_tokens=24, ignore_eos=True, temperature=0.9, top_k=20, seed=7)
    with create_llm(engine) as llm:
        return {
            name: [(r.outputs[0].text, r.outputs[0].token_ids) for r in llm.generate(PROMPTS, params)]
            for name, params in (("greedy", greedy), ("sampled", sampled))
        }


@pytest.fixture(scope="module")
def server(engine, expected):
    with short_lived(TritonServer(engine)) as server:
        yield server


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, HANG_S))


async def generate_all(server, *, streaming: bool, **options):
    async with TritonLlmClient(server.grpc_url) as client:
        requests = [
            GenerationRequest(prompt=prompt, max_tokens=24, ignore_eos=True, streaming=streaming, **options)
            for prompt in PROMPTS
        ]
        return await asyncio.gather(*(client.generate(request) for request in requests))


@pytest.mark.parametrize("streaming", [True, False])
def test_what_is_served_is_what_the_runtime_generates(server, expected, streaming: bool) -> None:
    results = run(generate_all(server, streaming=streaming))
    assert [(result.text, result.token_ids) for result in results] == expected["greedy"]
    assert {result.finish_reason for result in results} == {"length"}


def test_sampling_with_a_seed_is_the_same_behind_triton(server, expected) -> None:
    results = run(generate_all(server, streaming=True, temperature=0.9, top_k=20, seed=7))
    assert [(result.text, result.token_ids) for result in results] == expected["sampled"]
    assert expected["sampled"] != expected["greedy"]


@pytest.mark.parametrize("streaming", [True, False])
def test_a_stop_string_over_two_tokens_never_shows(server, expected, streaming: bool) -> None:
    text = expected["greedy"][1][0]
    stop = text[3:5]
    found = generate(PROMPTS[1], url=server.grpc_url, max_tokens=24, ignore_eos=True, stop=[stop], streaming=streaming)
    assert (found.text, found.finish_reason) == (text[: text.index(stop)], "stop")


def test_a_prompt_that_begins_like_an_earlier_one_says_what_it_found(server) -> None:
    names = ("kv_cache_reused_block", "kv_cache_missed_block", "kv_cache_hit_rate", "kv_cache_alloc_total_blocks")
    url = f"{server.http_url}/v2/models/tensorrt_llm/generate"
    body = {"text_input": "b" * 80, "sampling_param_max_tokens": 4, "sampling_param_return_perf_metrics": True}
    first, again = (post_json(url, body) for _ in range(2))
    # 80 tokens in blocks of 16, three window groups; the last token is always computed.
    assert [first[name] for name in names[:3]] == [0, 15, 0]
    assert [again[name] for name in names[:3]] == [12, 3, pytest.approx(0.8)]
    assert again["text_output"] == first["text_output"]
    assert again["kv_cache_alloc_total_blocks"] == again["kv_cache_alloc_new_blocks"] + 4 + 1 + 2
    assert "kv_cache_hit_rate" not in post_json(url, {"text_input": "b", "sampling_param_max_tokens": 1})
    wait_until(lambda: (metric(server, "puzzle_kv_blocks_reused_total") or 0) >= 12, what="the metric counts reuse")
    # Each of the two with 4 tokens takes as many steps.
    wait_until(lambda: (metric(server, "puzzle_engine_steps_total") or 0) >= 8, what="the metric counts steps")


def post_json(url: str, body: dict) -> dict:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=HANG_S) as response:
        return json.loads(response.read())


def test_a_prompt_that_does_not_fit_is_the_clients_error(server) -> None:
    with pytest.raises(ServeError, match="16384") as error:
        generate("x" * 16_384, url=server.grpc_url)
    assert error.value.status == "INVALID_ARGUMENT"


def test_a_closed_stream_gives_its_blocks_back(server) -> None:
    """The kv gauge counts what requests hold; blocks that only remember a prefix are free."""
    wait_until(lambda: (metric(server, "puzzle_kv_blocks_total") or 0) > 0, what="the runtime's count of blocks")
    settle(server, ENDLESS)

    async def scenario():
        async with TritonLlmClient(server.grpc_url) as client:
            streams = [client.stream(ENDLESS) for _ in range(6)]
            for stream in streams:
                await anext(stream)
            for stream in streams:
                await stream.aclose()

    cancelled = metric(server, 'puzzle_requests_total{end="cancelled"}') or 0
    run(scenario())
    wait_until(
        lambda: metric(server, 'puzzle_requests_total{end="cancelled"}') == cancelled + 6, what="cancels are counted"
    )
    wait_until(lambda: metric(server, "puzzle_kv_blocks_used") == 0, what="no block in use")


def test_a_reader_that_stops_reading_holds_up_nobody_and_loses_nothing(server) -> None:
    """The engine ends its request while not one response has been read; others are served meanwhile.

    The last response alone, with everything in it, is more than the connection takes in without being read, so the
    server is left with some of it: somebody who waits for this reader would wait for ever.
    """
    request = GenerationRequest(prompt="slow reader ", max_tokens=490, ignore_eos=True)
    expected = generate("slow reader ", url=server.grpc_url, max_tokens=490, ignore_eos=True).text

    settle(server, ENDLESS)

    async def once():
        yield RequestBuilder("tensorrt_llm", EXTRA_INPUTS - {"stream_delta"}).build(request)

    def all_ended(count: float) -> bool:
        counted = metric(server, 'puzzle_requests_total{end="ok"}')
        return counted == count and metric(server, "puzzle_kv_blocks_used") == 0

    async def scenario() -> str:
        ended = metric(server, 'puzzle_requests_total{end="ok"}') or 0
        window = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", HTTP2_WINDOW)]
        async with grpc.aio.insecure_channel(server.grpc_url, options=window) as channel:
            unread = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(once())
            async with TritonLlmClient(server.grpc_url) as client:
                others = [GenerationRequest(prompt=f"{i}", max_tokens=200, ignore_eos=True) for i in range(4)]
                await asyncio.gather(*(client.generate(other) for other in others))
            await asyncio.to_thread(
                wait_until,
                lambda: all_ended(ended + 5),
                what="all five ended",
            )
            responses = [response async for response in unread]
        assert responses[-1].ByteSize() > HTTP2_WINDOW
        return unpack_string(responses[-1].infer_response.raw_output_contents[0])

    assert run(scenario()) == expected


def test_at_last_the_engine_is_killed_and_the_stub_answers_for_it(server) -> None:
    """Last in this file: nothing can be generated afterwards."""
    (stub,) = server.stub_pids()
    (engine_pid,) = children_of(stub)

    async def scenario():
        async with TritonLlmClient(server.grpc_url) as client:
            stream = client.stream(ENDLESS)
            await anext(stream)
            os.kill(engine_pid, signal.SIGKILL)
            with pytest.raises(ServeError, match="the engine is dead") as error:
                async for _ in stream:
                    pass
            return error.value.status

    assert run(scenario()) == "UNAVAILABLE"
    with pytest.raises(ServeError, match="the engine is dead") as error:
        generate("x", url=server.grpc_url)
    assert error.value.status == "UNAVAILABLE"
    wait_until(lambda: metric(server, "puzzle_engine_up") == 0, what="the metric says so")


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="a server needs a core beside the engine's")
def test_the_engine_has_its_cores_alone_and_the_server_the_others(engine, expected) -> None:
    *others, last = sorted(os.sched_getaffinity(0))
    with short_lived(TritonServer(engine, engine_cores=[last])) as server:
        (stub,) = server.stub_pids()
        (process,) = children_of(stub)
        assert [os.sched_getaffinity(pid) for pid in (server.pid, stub, process)] == [{*others}, {*others}, {last}]
        results = run(generate_all(server, streaming=True))
    assert [(result.text, result.token_ids) for result in results] == expected["greedy"]
    assert sorted(os.sched_getaffinity(0)) == [*others, last]
