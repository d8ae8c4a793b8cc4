"""`serve --restart` over the real chain: the engine, then the stub, are killed in mid-stream, and it serves on."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator

import pytest

from puzzle_trtllm.build.engine_build import build_engine
from puzzle_trtllm.engine import EngineConfig
from puzzle_trtllm.errors import ServeError
from puzzle_trtllm.process_states import is_alive
from puzzle_trtllm.serve.client.request import GenerationRequest
from puzzle_trtllm.serve.client.triton_client import TritonLlmClient, generate
from tests.serve.serving import Serving

LONG = 400
NUM_STREAMS = 6


@pytest.fixture
def serving(make_checkpoint, tmp_path) -> Iterator[Serving]:
    checkpoint = make_checkpoint([(8, None), (4, 16), (2, 32)])
    config = EngineConfig(runtime="reference", llm_args={"dtype": "float32", "max_seq_len": 512, "max_batch_size": 4})
    serving = Serving(build_engine(checkpoint, tmp_path / "engine", config=config, quiet=True), "restart", quiet=True)
    yield serving
    serving.end()


async def kill_amid_streams(url: str, victim: int) -> list[ServeError]:
    """How the streams end that were open, four of them generating and two waiting, when `victim` was killed."""

    async def read(stream, first: asyncio.Event) -> ServeError:
        with pytest.raises(ServeError) as error:
            async for _ in stream:
                first.set()
        return error.value

    async with TritonLlmClient(url) as client:
        request = GenerationRequest(prompt="12+34=", max_tokens=LONG, ignore_eos=True)
        started = [asyncio.Event() for _ in range(NUM_STREAMS)]
        streams = [asyncio.ensure_future(read(client.stream(request), first)) for first in started]
        await asyncio.gather(*(first.wait() for first in started[:3]))
        os.kill(victim, signal.SIGKILL)
        return list(await asyncio.gather(*streams))


def test_every_stream_is_told_and_the_next_request_gets_the_same_tokens(serving) -> None:
    def tokens(url: str) -> list[int]:
        return generate("12+34=", url=url, max_tokens=24, ignore_eos=True).token_ids

    url = serving.wait_ready()["url"]
    expected = tokens(url)
    for process, reason in (("engine", "the engine is dead: the engine process died"), ("stub", "Socket closed")):
        before = serving.pids
        victim = serving.engine_pid if process == "engine" else serving.stub_pid
        errors = asyncio.run(asyncio.wait_for(kill_amid_streams(url, victim), 20))
        assert [error.status for error in errors] == ["UNAVAILABLE"] * NUM_STREAMS
        assert all(reason in str(error) for error in errors), errors
        url = serving.wait_ready()["url"]
        assert not any(is_alive(pid) for pid in before)
        assert tokens(url) == expected
