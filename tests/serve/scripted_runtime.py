"""A runtime for fault injection: the LLM API without a model, its engine in a process of its own.

It echoes the prompt, one character a token (token id = code point), over and over until max_tokens. The prompt's first
word may order a fault: `fail:3` (RequestError after 3 tokens), `crash:3` (the engine process dies after 3 tokens),
`hang` (never a token), `hang:3` (none after the third). Arguments of LLM: `step_ms` between steps, `max_batch_size`
requests at a time, `total_blocks` KV blocks of 16 tokens each, `max_seq_len`; `broken: true` refuses to start,
`endless: true` never has. Unknown arguments are ignored.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from typing import Any

from puzzle_trtllm.serve.runtimes.api import (
    CompletionOutput,
    EngineDeadError,
    KvCacheConfig,
    RequestError,
    RequestPerfMetrics,
    SamplingParams,
)

__all__ = ["LLM", "KvCacheConfig", "SamplingParams"]
BLOCK_TOKENS = 16


class Output:
    """What generate_async returns."""

    def __init__(self, llm: LLM, request_id: int, prompt: str | None, prompt_token_ids: list[int]) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.outputs = [CompletionOutput()]
        self.metrics: RequestPerfMetrics | None = None
        self.finished = False
        self._llm = llm
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[dict[str, Any] | Exception] = asyncio.Queue()
        self._wants_metrics = False

    def abort(self) -> None:
        self._llm.send({"abort": self.request_id})

    def deliver(self, item: dict[str, Any] | Exception) -> None:
        self._loop.call_soon_threadsafe(self._arrived.put_nowait, item)

    def __aiter__(self) -> Output:
        return self

    async def __anext__(self) -> Output:
        if self.finished:
            raise StopAsyncIteration
        item = await self._arrived.get()
        if isinstance(item, Exception):
            raise item
        if "error" in item:
            raise RequestError(item["error"])
        completion = self.outputs[0]
        completion.token_ids += item["tokens"]
        completion.text += "".join(map(chr, item["tokens"]))
        completion.finish_reason = item["finish"]
        self.finished = item["finish"] is not None
        if self.finished and self._wants_metrics:
            self.metrics = RequestPerfMetrics(
                arrival_time_ns=1, first_scheduled_time_ns=2, first_token_time_ns=3, last_token_time_ns=4,
                num_total_allocated_blocks=5, num_new_allocated_blocks=4, num_reused_blocks=1, num_missed_blocks=3,
            )  # fmt: skip
        return self


class LLM:
    def __init__(self, model: str, **arguments: Any) -> None:
        if arguments.get("broken"):
            raise RuntimeError("the scripted runtime was told not to start")
        if arguments.get("endless"):
            threading.Event().wait()
        self._max_seq_len = arguments.get("max_seq_len", 10_000)
        self._requests: dict[int, Output] = {}
        self._next_id = 0
        self._stats: dict[str, Any] = {}
        self._dead = False
        self._engine = subprocess.Popen(
            [sys.executable, __file__, json.dumps(arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def generate_async(
        self, inputs: str | list[int], sampling_params: SamplingParams, streaming: bool = False
    ) -> Output:
        if self._dead:
            raise EngineDeadError("the scripted engine has ended")
        prompt = inputs if isinstance(inputs, str) else None
        token_ids = [ord(c) for c in inputs] if isinstance(inputs, str) else inputs
        if len(token_ids) + 1 > self._max_seq_len:
            raise RequestError(f"the prompt has {len(token_ids)} tokens, expected fewer than {self._max_seq_len}")
        self._next_id += 1
        output = Output(self, self._next_id, prompt, token_ids)
        output._wants_metrics = sampling_params.return_perf_metrics
        self._requests[output.request_id] = output
        if self._dead:  # and the reader may have been at the table before
            raise EngineDeadError("the scripted engine has ended")
        new = {"id": output.request_id, "prompt": token_ids, "max": sampling_params.max_tokens, "stream": streaming}
        self.send({"new": new})
        return output

    def get_stats(self, timeout: float | None = 2) -> list[dict[str, Any]]:
        if self._dead:
            raise EngineDeadError("the scripted engine has ended")
        return [self._stats] if self._stats else []

    def shutdown(self) -> None:
        self._engine.kill()
        self._engine.wait()

    def send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # its death is noticed by the reader
            print(json.dumps(message), file=self._engine.stdin, flush=True)

    def _read(self) -> None:
        for line in self._engine.stdout or ():
            message = json.loads(line)
            self._stats = message["stats"]
            for item in message["items"]:
                if (output := self._requests.get(item["id"])) is not None:
                    output.deliver(item)
        self._dead = True
        for output in list(self._requests.values()):
            output.deliver(EngineDeadError("the scripted engine has ended"))


class _Engine:
    """The other process: JSON lines in, one JSON line a step out."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.step_s = arguments.get("step_ms", 2) / 1000
        self.max_batch_size = arguments.get("max_batch_size", 32)
        self.total_blocks = arguments.get("total_blocks", 1000)
        self.requests: dict[int, dict[str, Any]] = {}
        threading.Thread(target=self.read, daemon=True).start()

    def read(self) -> None:
        for line in sys.stdin:
            message = json.loads(line)
            if "new" in message:
                self.requests[message["new"]["id"]] = {**message["new"], "done": []}
            else:
                self.requests.pop(message["abort"], None)
        os._exit(0)

    def run(self) -> None:
        while True:
            time.sleep(self.step_s)
            active = list(self.requests.values())[: self.max_batch_size]
            items = [item for request in active if (item := self.step(request)) is not None]
            used = sum((len(r["prompt"]) + len(r["done"])) // BLOCK_TOKENS + 1 for r in list(self.requests.values()))
            stats = {"kvCacheStats": {"usedNumBlocks": used, "maxNumBlocks": self.total_blocks}}
            print(json.dumps({"items": items, "stats": stats}), flush=True)

    def step(self, request: dict[str, Any]) -> dict[str, Any] | None:
        prompt, done = request["prompt"], request["done"]
        order, _, after = "".join(map(chr, prompt)).partition(" ")[0].partition(":")
        if order == "hang" and len(done) >= int(after or 0):
            return None
        if order in ("fail", "crash") and len(done) >= int(after):
            if order == "crash":
                os._exit(3)
            self.requests.pop(request["id"], None)
            return {"id": request["id"], "error": "scripted failure"}
        done.append(prompt[len(done) % len(prompt)])
        finish = "length" if len(done) >= request["max"] else None
        if finish:
            self.requests.pop(request["id"], None)
        if request["stream"]:
            return {"id": request["id"], "tokens": done[-1:], "finish": finish}
        return {"id": request["id"], "tokens": done, "finish": finish} if finish else None


if __name__ == "__main__":
    _Engine(json.loads(sys.argv[1])).run()
