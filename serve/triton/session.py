"""The open requests of one LLM: one event loop in a thread of its own, one task a request.

Triton's threads only parse and hand over (`accept`); everything that touches the LLM or the table of open requests
runs in the loop, so there are no locks. Only a long text becomes tokens in a thread, because all streams would stand
still meanwhile. A request ends in exactly one of: its last output, a refusal (INVALID_ARGUMENT), a cancel (CANCELLED),
a full table or a dead engine (UNAVAILABLE), anything else (INTERNAL). Every end is a response with the final flag;
silence would hang the client for ever.

Cancels are found by one sweep over all open requests, not by a timer or a query a step for each: a query is a round
trip to the server (70 us, most of it CPU somewhere), so from some twenty open requests on the period stretches, at most
to `_SWEEP_LIMIT_S`: a client that disappears costs nothing after 100 ms.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from puzzle_trtllm.process_states import is_alive
from puzzle_trtllm.serve.runtimes.api import EngineDeadError, RequestError
from puzzle_trtllm.serve.triton.outbox import Log, Outbox, Reply, ResponseSender, Status
from puzzle_trtllm.serve.triton.request import (
    GenerateCall,
    Inputs,
    ReplyFormat,
    RequestLimits,
    RequestRefusedError,
    is_stop,
    parse_request,
)
from puzzle_trtllm.serve.triton.response import take_snapshot

_SWEEP_LIMIT_S = 0.05
"""From the beginning of a sweep to that of the next one, while it takes less than half of that."""
_SWEEP_SHARE = 0.05
"""Up to that limit, the sweep takes no more than this share of the time."""

_LONG_TEXT = 4096
"""Characters from which a prompt becomes tokens in a thread; a character takes about 1 us, a thread some 100."""

LONG_TEXTS_AT_ONCE = 2
"""Becoming tokens: each takes some 200 bytes a token meanwhile, and memory for one a core may not be there."""


@dataclass(kw_only=True, eq=False)
class OpenRequest:
    """A request between its arrival and its end."""

    request_id: str
    reply: Reply
    result: Any = None
    """The runtime's RequestOutput, once submitted."""
    is_read: bool = False
    """Whether the prompt is such as the runtime takes it: a long text becomes tokens before."""
    task: asyncio.Task[None] | None = None
    num_tokens: int = 0
    query_failed: bool = False
    """Whether it was logged that the sweep cannot ask for its client."""


@dataclass(kw_only=True)
class Totals:
    """Counts since the start; written in the loop's thread, read by the metrics."""

    prompt_tokens: int = 0
    output_tokens: int = 0
    ends: dict[str, int] = field(default_factory=dict)
    """Requests ended otherwise than with their last output, by the status."""


class Session:
    """Runs requests on `llm`, which answers to TensorRT-LLM's LLM API."""

    def __init__(
        self,
        *,
        llm: Any,
        sampling_params: Any,
        outbox: Outbox,
        limits: RequestLimits,
        max_open_requests: int = 1024,
        sweep_period_s: float = 0.025,
        log: Log = print,
    ) -> None:
        self._llm = llm
        self._sampling_params = sampling_params
        self._outbox = outbox
        self._limits = limits
        self._max_open_requests = max_open_requests
        self._sweep_period_s = sweep_period_s
        self._log = log
        self._open: dict[int, OpenRequest] = {}
        self._death: str | None = None
        self._draining = threading.Event()
        self._stopping = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._long_texts = ThreadPoolExecutor(LONG_TEXTS_AT_ONCE, thread_name_prefix="puzzle-read")
        self.totals = Totals()
        self._threads = [
            threading.Thread(target=self._run_loop, name="puzzle-loop", daemon=True),
            threading.Thread(target=self._sweep, name="puzzle-sweep", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    # --- any thread -------------------------------------------------------------------------------------------------

    def accept(self, request_id: str, inputs: Inputs, sender: ResponseSender, parameters: Collection[str] = ()) -> None:
        """Take a request; returns at once, whatever happens to it."""
        try:
            if is_stop(inputs):
                reply = self._outbox.open_reply(sender, ReplyFormat())
                self._loop.call_soon_threadsafe(self._stop_by_id, request_id, reply)
                return
            call = parse_request(inputs, self._limits, parameters)
        except RequestRefusedError as refusal:
            reply = self._outbox.open_reply(sender, ReplyFormat())
            self._loop.call_soon_threadsafe(self._end, reply, "INVALID_ARGUMENT", str(refusal))
            return
        reply = self._outbox.open_reply(sender, call.reply, on_lost=self._response_lost)
        self._loop.call_soon_threadsafe(self._begin, OpenRequest(request_id=request_id, reply=reply), call)

    def _response_lost(self, reply: Reply, why: str) -> None:
        self._loop.call_soon_threadsafe(self._give_up, reply, why)

    def engine_died(self, reason: str) -> None:
        """End all requests, now and from now on, with UNAVAILABLE."""
        self._loop.call_soon_threadsafe(self._bury, reason)

    @property
    def death(self) -> str | None:
        """Why the engine is dead; None while it lives."""
        return self._death

    def queue_lengths(self, num_active: int = 0) -> tuple[int, int]:
        """(waiting, running) of the open requests; `num_active` is what the engine says to be at work on, if it does.

        Without it a request that is not streaming waits until its end, because no token of it is seen before. Those
        that are seen to run count in any case: under attention data parallelism TensorRT-LLM 1.2 tells of one rank.
        """
        requests = list(self._open.values())
        started = sum(1 for request in requests if request.num_tokens)
        running = min(len(requests), max(started, num_active))
        return len(requests) - running, running

    @property
    def engine_has_requests(self) -> bool:
        """Whether any of the open ones is the engine's turn."""
        return any(request.is_read for request in list(self._open.values()))

    def drain(self, seconds: float) -> None:
        """Refuse new requests and wait for the open ones; after `seconds` end those with UNAVAILABLE."""
        self._draining.set()
        deadline_s = time.monotonic() + seconds
        while self._open and time.monotonic() < deadline_s and not self._stopping.is_set():
            time.sleep(0.05)
        self._loop.call_soon_threadsafe(self._end_all, "the server is stopping")

    def stop(self) -> None:
        """End what is open with UNAVAILABLE and stop the threads; the LLM is the caller's to shut down."""
        self._draining.set()
        self._stopping.set()
        self._loop.call_soon_threadsafe(self._end_all, "the server is stopping")
        self._loop.call_soon_threadsafe(self._loop.call_later, 0.05, self._loop.stop)  # cancelled tasks run once more
        for thread in self._threads:
            thread.join(timeout=5)
        self._long_texts.shutdown(wait=False, cancel_futures=True)

    # --- the loop's thread ------------------------------------------------------------------------------------------

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _begin(self, request: OpenRequest, call: GenerateCall) -> None:
        if self._death is not None:
            self._end(request.reply, "UNAVAILABLE", f"the engine is dead: {self._death}")
        elif self._draining.is_set():
            self._end(request.reply, "UNAVAILABLE", "the server is stopping")
        elif len(self._open) >= self._max_open_requests:
            self._end(request.reply, "UNAVAILABLE", f"the queue is full: {len(self._open)} requests are open")
        else:
            self._open[id(request)] = request
            request.task = self._loop.create_task(self._generate(request, call))
            # Not a `finally` in the task: a task cancelled before its first step never runs at all.
            request.task.add_done_callback(lambda _: self._open.pop(id(request), None))

    async def _generate(self, request: OpenRequest, call: GenerateCall) -> None:
        try:
            parameters = self._sampling_params(**call.sampling)
            prompt = await self._read_prompt(call.prompt)
            request.is_read = True
            request.result = self._llm.generate_async(prompt, parameters, streaming=call.reply.streaming)
            async for output in request.result:
                self._step(request, output)
                if request.reply.ended:
                    return
            self._end(request.reply, "INTERNAL", "the runtime ended the request without a last output")
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # a panic of the tokenizer is no Exception, and silence would hang the client
            self._end_with(request, error)

    async def _read_prompt(self, prompt: str | list[int]) -> str | list[int]:
        """Token ids of a long text, where the runtime says how; all else is the runtime's to read, as is an error."""
        tokenizer = getattr(self._llm, "tokenizer", None)
        if isinstance(prompt, str) and len(prompt) > _LONG_TEXT and tokenizer is not None:
            return list(await self._loop.run_in_executor(self._long_texts, tokenizer.encode, prompt))
        return prompt

    def _step(self, request: OpenRequest, output: Any) -> None:
        snapshot = take_snapshot(output, request.reply.stops)
        if snapshot.finished and snapshot.finish_reason == "cancelled":
            self._end(request.reply, "CANCELLED", "the runtime cancelled the request")
            return
        if request.num_tokens == 0:
            self.totals.prompt_tokens += len(output.prompt_token_ids or ())
        self.totals.output_tokens += max(0, snapshot.num_tokens - request.num_tokens)
        request.num_tokens = max(request.num_tokens, snapshot.num_tokens)
        request.reply.update(snapshot)

    def _end_with(self, request: OpenRequest, error: BaseException) -> None:
        self._abort_generation(request)  # the error may be ours, and the engine still at it
        if isinstance(error, EngineDeadError) or not engine_is_healthy(self._llm):
            self._bury(str(error) or type(error).__name__)
        elif request.num_tokens == 0 and is_about_the_request(error):
            self._end(request.reply, "INVALID_ARGUMENT", str(error) or type(error).__name__)
        else:
            self._log(f"request {request.request_id!r} failed: {type(error).__name__}: {error}")
            self._end(request.reply, "INTERNAL", f"generation failed: {type(error).__name__}: {error}")

    def _give_up(self, reply: Reply, why: str) -> None:
        """The outbox has ended the request, of which a response could not be sent."""
        for request in [request for request in self._open.values() if request.reply is reply]:
            self._abort(request)
        self._log(why)
        if not reply.failed:  # it may have ended with the very output that was lost
            self._fail(reply, "INTERNAL", why)

    def _stop_by_id(self, request_id: str, reply: Reply) -> None:
        """`stop`: the running requests end, and so does this one, all CANCELLED as in NVIDIA's model."""
        if not request_id:
            self._end(reply, "INVALID_ARGUMENT", "stop: needs the request id of the request to stop")
            return
        running = [request for request in self._open.values() if request.request_id == request_id]
        for request in running:
            self._cancel(request, f"request {request_id!r} was stopped")
        reply.fail("CANCELLED", f"stopped {len(running)} running request(s) with id {request_id!r}")

    def _cancel(self, request: OpenRequest, message: str) -> None:
        if request.reply.ended:
            return
        self._abort(request)
        self._end(request.reply, "CANCELLED", message)

    def _abort(self, request: OpenRequest) -> None:
        """Have the runtime free what the request holds, and forget its task."""
        self._abort_generation(request)
        if request.task is not None:
            request.task.cancel()

    def _abort_generation(self, request: OpenRequest) -> None:
        try:
            if request.result is not None:
                request.result.abort()
        except Exception as error:  # an engine that cannot abort has worse trouble, found elsewhere
            self._log(f"abort of request {request.request_id!r} failed: {type(error).__name__}: {error}")

    def _bury(self, reason: str) -> None:
        if self._death is None:
            self._death = reason
            self._log(f"the engine is dead: {reason}")
        self._end_all(f"the engine is dead: {reason}")

    def _end_all(self, message: str) -> None:
        for request in list(self._open.values()):
            self._end(request.reply, "UNAVAILABLE", message)
            self._abort(request)

    def _end(self, reply: Reply, status: Status, message: str) -> None:
        if not reply.ended:
            self._fail(reply, status, message)

    def _fail(self, reply: Reply, status: Status, message: str) -> None:
        end = status.lower()
        self.totals.ends[end] = self.totals.ends.get(end, 0) + 1
        reply.fail(status, message)

    # --- the sweep's thread -----------------------------------------------------------------------------------------

    def _sweep(self) -> None:
        pause_s = self._sweep_period_s
        while not self._stopping.wait(pause_s):
            began_s = time.monotonic()
            for request in list(self._open.values()):
                if self._client_has_gone(request):
                    self._loop.call_soon_threadsafe(self._cancel, request, "the client closed the request")
            pause_s = pause_after_sweep(time.monotonic() - began_s, self._sweep_period_s)

    def _client_has_gone(self, request: OpenRequest) -> bool:
        try:
            return request.reply.is_cancelled()
        except Exception as error:  # of this request; the others are to be asked too
            if not request.query_failed:
                request.query_failed = True
                self._log(f"request {request.request_id!r} cannot be asked for: {type(error).__name__}: {error}")
            return False


def pause_after_sweep(spent_s: float, period_s: float) -> float:
    """Seconds to the next sweep: at least `period_s`, more when this one took long, never less than it took."""
    return min(max(period_s, spent_s / _SWEEP_SHARE), max(_SWEEP_LIMIT_S - spent_s, spent_s))


def engine_is_healthy(llm: Any) -> bool:
    """What the runtime says of itself (TensorRT-LLM: `_check_health`), and whether the process it names lives."""
    check = getattr(llm, "_check_health", None)
    if callable(check) and not check():
        return False
    pid = getattr(llm, "engine_pid", None)
    return not isinstance(pid, int) or is_alive(pid)


def is_about_the_request(error: BaseException) -> bool:
    """Whether a runtime's error blames the request. TensorRT-LLM's RequestError is a class of its own."""
    return isinstance(error, (ValueError, TypeError, RequestError)) or type(error).__name__ == "RequestError"
