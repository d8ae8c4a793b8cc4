"""An engine of two ranks behind a live tritonserver: built, served, held to one rank, and one rank killed."""

from __future__ import annotations

import asyncio
import os
import signal

import psutil
import pytest

from puzzle_trtllm.build.engine_build import build_engine
from puzzle_trtllm.engine import EngineConfig
from puzzle_trtllm.errors import ServeError
from puzzle_trtllm.process_states import children_of, is_alive
from puzzle_trtllm.serve.client.request import GenerationRequest
from puzzle_trtllm.serve.client.triton_client import TritonLlmClient, generate
from puzzle_trtllm.serve.runtimes import create_llm
from puzzle_trtllm.serve.runtimes.api import SamplingParams
from puzzle_trtllm.serve.triton.server import TritonServer
from tests.serve.scripted import HANG_S, short_lived, wait_until

PROMPTS = ["12+34=", "the quick brown fox", "x" * 50]


@pytest.fixture(scope="module")
def engine(make_checkpoint, tmp_path_factory):
    checkpoint = make_checkpoint([(8, None), (4, 16), (2, 32)], max_position_embeddings=16_384)
    config = EngineConfig(
        runtime="reference", num_gpus=2, llm_args={"dtype": "float32", "max_seq_len": 8192, "max_batch_size": 8}
    )
    return build_engine(checkpoint, tmp_path_factory.mktemp("ranks") / "engine", config=config, quiet=True)


def test_two_ranks_behind_triton_serve_what_one_generates_until_one_is_killed(engine) -> None:
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    with create_llm(engine, tensor_parallel_size=1, moe_expert_parallel_size=1) as llm:
        expected = [request.outputs[0].token_ids for request in llm.generate(PROMPTS, params)]
    with short_lived(TritonServer(engine)) as server:
        found = [generate(text, url=server.grpc_url, max_tokens=24, ignore_eos=True).token_ids for text in PROMPTS]
        assert found == expected
        (stub,) = server.stub_pids()
        leader, follower = sorted(children_of(stub), key=lambda pid: psutil.Process(pid).environ()["RANK"])
        assert asyncio.run(asyncio.wait_for(_kill_mid_stream(server, follower), HANG_S)) == "UNAVAILABLE"
        wait_until(lambda: not is_alive(leader) and not is_alive(follower), what="both ranks ended")
        with pytest.raises(ServeError, match="the engine is dead"):
            generate("x", url=server.grpc_url)


async def _kill_mid_stream(server: TritonServer, victim: int) -> str | None:
    async with TritonLlmClient(server.grpc_url) as client:
        stream = client.stream(GenerationRequest(prompt="x", max_tokens=8000, ignore_eos=True))
        await anext(stream)
        os.kill(victim, signal.SIGKILL)
        with pytest.raises(ServeError, match="the engine is dead") as error:
            async for _ in stream:
                pass
        return error.value.status
