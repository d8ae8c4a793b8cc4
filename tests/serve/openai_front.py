"""The OpenAI front over a scripted client, listening on a real port in a thread of the test."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from puzzle_trtllm.chat import ChatTokenizer
from puzzle_trtllm.serve.client.request import GenerationChunk, GenerationRequest
from puzzle_trtllm.serve.openai.app import make_app
from puzzle_trtllm.serve.openai.model_card import ModelCard


def toy_card(folder: Path) -> ModelCard:
    """The toy checkpoint in `folder`, as the front knows a model."""
    return ModelCard(name="toy", tokenizer=ChatTokenizer.from_folder(folder), max_seq_len=256)


class ScriptedTarget:
    """Answers with `steps`: token ids of each response, a ServeError to raise, or a number of seconds to wait."""

    gives_token_ids = True
    num_instances = 1

    def __init__(self) -> None:
        self.steps: list[object] = []
        self.finish_reason = "stop"
        self.text = ""
        self.requests: list[GenerationRequest] = []
        self.cancelled = 0
        self.at = 0
        """The step that the last request is at."""

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        return None

    async def stream(self, request):
        self.requests.append(request)
        so_far = 0
        steps = list(self.steps)
        last = max((i for i, step in enumerate(steps) if isinstance(step, list)), default=-1)
        try:
            for index, step in enumerate(steps):
                self.at = index
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, (int, float)):
                    await asyncio.sleep(step)
                    continue
                so_far += len(step)
                yield GenerationChunk(
                    text=self.text,
                    token_ids=step,
                    num_output_tokens=so_far,
                    finish_reason=self.finish_reason if index == last else None,
                    received_ns=time.perf_counter_ns(),
                )
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise


@contextmanager
def running_front(card: ModelCard, target: ScriptedTarget, **options) -> Iterator[str]:
    """base_url of OpenAI's clients."""
    config = uvicorn.Config(make_app(card, target, **options), port=0, log_level="critical", lifespan="on")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.should_exit = True
        thread.join(10)
