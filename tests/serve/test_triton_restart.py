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
from tests.serve.scripted import HANG_S
from tests.serve.serving import Serving

LONG = 16_000
"""Tokens, a quarter of a minute on a fast machine: still generated when somebody is killed."""
NUM_STREAMS = 6


@pytest.fixture
def serving(make_checkpoint, monkeypatch, tmp_path) -> Iterator[Serving]:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where the logs of servers that died are kept
    checkpoint = make_checkpoint([(8, None), (4, 16), (2, 32)], max_position_embeddings=16_384)
    config = EngineConfig(
        runtime="reference", llm_args={"dtype": "float32", "max_seq_len": 16_384, "max_batch_size": 4}
    )
    serving = Serving(build_engine(checkpoint, tmp_path / "engine", config=config, quiet=True), "restart", quiet=True)
    yield serving
    serving.end()


async def kill_amid_streams(url: str, victim: int) -> list[ServeError]:
    """How the streams end that were open, four of them generating and two waiting, when `victim` was killed."""

    started, three = set(), asyncio.Event()

    async def read(number: int, stream) -> ServeError:
        with pytest.raises(ServeError) as error:
            async for _ in stream:
                started.add(number)
                if len(started) == 3:  # whichever come first
                    three.set()
        return error.value

    async with TritonLlmClient(url) as client:
        request = GenerationRequest(prompt="12+34=", max_tokens=LONG, ignore_eos=True)
        streams = [asyncio.ensure_future(read(number, client.stream(request))) for number in range(NUM_STREAMS)]
        await three.wait()
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
        errors = asyncio.run(asyncio.wait_for(kill_amid_streams(url, victim), HANG_S))
        assert [error.status for error in errors] == ["UNAVAILABLE"] * NUM_STREAMS
        assert all(reason in str(error) for error in errors), errors
        url = serving.wait_ready()["url"]
        assert not any(is_alive(pid) for pid in before)
        assert tokens(url) == expected
