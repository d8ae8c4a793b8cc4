"""One request as its caller sees it: TensorRT-LLM's RequestOutput.

The reader thread only queues the engine's updates; they are applied (and turned into text) by whoever consumes the
request, so the engine never waits for a slow reader. A reader that falls behind gets several tokens at once. Stop
strings are found here, where the text is: the output is cut and the engine told to stop.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable

from tokenizers import Tokenizer

from puzzle_trtllm.serve.runtimes.api import CompletionOutput, RequestPerfMetrics, SamplingParams
from puzzle_trtllm.serve.runtimes.reference.messages import TokenUpdate
from puzzle_trtllm.text_stream import TextStream

Waiter = tuple[asyncio.AbstractEventLoop, asyncio.Event]
"""Who awaits a request: an event, and the loop in whose thread it must be set."""


class ReferenceRequestOutput:
    """Await `aresult()` or iterate it (async), or call `result()` (blocking); `abort()` at any time."""

    def __init__(
        self,
        *,
        request_id: int,
        prompt: str | None,
        prompt_token_ids: list[int],
        sampling_params: SamplingParams,
        tokenizer: Tokenizer | None,
        abort: Callable[[int], None],
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.outputs = [CompletionOutput(index=0)]
        self.metrics: RequestPerfMetrics | None = None
        self._abort = abort
        self._params = sampling_params
        self._stops = sampling_params.stop_strings
        self._stream: TextStream | None = None
        """Makes text of the tokens, without decoding them again from the start; None where none is wanted."""
        if tokenizer and sampling_params.detokenize:
            self._stream = TextStream(tokenizer, skip_special_tokens=sampling_params.skip_special_tokens)
        self._updates: deque[TokenUpdate | Exception] = deque()
        self._arrived = threading.Condition()
        """Held to queue updates and to apply them: one after the other, however many consume the request."""
        self.finished = False
        """True once the end has been consumed."""
        self._error: Exception | None = None
        """Why it ended; raised to everyone who asks."""
        self._waiters: dict[asyncio.AbstractEventLoop, asyncio.Event] = {}

    def abort(self) -> None:
        """Stop generating and free the cache; the output ends with finish_reason `cancelled`. Any thread, any time."""
        self._abort(self.request_id)

    # -- the reader thread's side ------------------------------------------------------------------------------------

    def put(self, update: TokenUpdate | Exception) -> list[Waiter]:
        """Queue an update, or why there will be no other; give the events to set, each in its own loop."""
        with self._arrived:
            self._updates.append(update)
            self._arrived.notify_all()
            return list(self._waiters.items())

    # -- the consumer's side -----------------------------------------------------------------------------------------

    def result(self, timeout: float | None = None) -> ReferenceRequestOutput:
        """Block until the end. Raises TimeoutError, RequestError, GenerationError, EngineDeadError."""
        with self._arrived:
            if not self._arrived.wait_for(self._drain_to_end, timeout):
                raise TimeoutError(f"request {self.request_id} has not ended within {timeout} s")
        if self._error is not None:
            raise self._error
        return self

    async def aresult(self) -> ReferenceRequestOutput:
        """Await the end. Raises RequestError, GenerationError, EngineDeadError."""
        async for _ in self:
            pass
        return self

    def __await__(self):  # type: ignore[no-untyped-def]  # noqa: ANN204
        return self.aresult().__await__()

    def __aiter__(self) -> ReferenceRequestOutput:
        """Itself after every batch of new tokens, the last time finished.

        As TensorRT-LLM's, an iterator and no generator: one that is left before its end would cost the event loop
        another task, to close it.
        """
        return self

    async def __anext__(self) -> ReferenceRequestOutput:
        loop = asyncio.get_running_loop()
        with self._arrived:
            event = self._waiters.get(loop) or self._waiters.setdefault(loop, asyncio.Event())
        while not self.finished:
            if self._drain():
                break
            event.clear()
            if not self._updates:
                await event.wait()
        else:
            raise self._error or StopAsyncIteration
        if self._error is not None:
            raise self._error
        return self

    def _drain(self) -> bool:
        """Apply everything that is queued; True if there was something."""
        found = False
        with self._arrived:
            while self._updates and not self.finished:
                self._apply(self._updates.popleft())
                found = True
        return found

    def _drain_to_end(self) -> bool:
        self._drain()
        return self.finished

    def _apply(self, update: TokenUpdate | Exception) -> None:
        if isinstance(update, Exception):
            self._error, self.finished = update, True
            return
        output, wants_metrics = self.outputs[0], self._params.return_perf_metrics
        if output.finish_reason is None:  # else a stop string ended it, and only the metrics are missing
            self._extend(output, update)
        self.metrics = update.metrics if wants_metrics else None
        stopped = output.finish_reason is not None and not wants_metrics
        self.finished = update.finish_reason is not None or stopped

    def _extend(self, output: CompletionOutput, update: TokenUpdate) -> None:
        # As TensorRT-LLM: a stop token is no part of the output, unless it is asked for.
        hides_stop = isinstance(update.stop_reason, int) and not self._params.include_stop_str_in_output
        new = update.token_ids[:-1] if hides_stop else update.token_ids
        output.cumulative_logprob = update.cumulative_logprob
        if self._stream is None:
            output.token_ids.extend(new)
        elif self._extend_text(output, self._stream, new):
            self.abort()
            return
        if update.finish_reason is not None:
            output.finish_reason, output.stop_reason = update.finish_reason, update.stop_reason
            if self._stream is not None:  # bytes of a character which never came
                output.text += self._stream.rest()

    def _extend_text(self, output: CompletionOutput, stream: TextStream, token_ids: list[int]) -> bool:
        """Add tokens and their text; True if a stop string ended the output here."""
        if not self._stops:
            output.token_ids += token_ids
            output.text += "".join(map(stream.feed, token_ids))
            return False
        for token in token_ids:
            output.token_ids.append(token)
            piece = stream.feed(token)
            output.text += piece
            if piece and len(output.token_ids) >= (self._params.min_tokens or 0) and self._cut(output, len(piece)):
                return True
        return False

    def _cut(self, output: CompletionOutput, num_new: int) -> bool:
        """Cut the text at the earliest stop string that ends in the last `num_new` characters."""
        text, before = output.text, len(output.text) - num_new
        found = [(text.find(stop, max(0, before - len(stop) + 1)), stop) for stop in self._stops]
        hits = sorted(hit for hit in found if hit[0] >= 0)
        if not hits:
            return False
        position, stop = hits[0]
        output.text = output.text[: position + len(stop) if self._params.include_stop_str_in_output else position]
        output.finish_reason, output.stop_reason = "stop", stop
        return True
