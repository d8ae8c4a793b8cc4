"""Sending responses without holding up the event loop.

Triton's `response_sender.send` is a round trip to the server process (50-150 us, the GIL released meanwhile). Called in
the event loop it would add up over all requests of a step, so a thread does it. Two would take the GIL, and on a small
machine the engine's core, from each other: with one, an engine behind Triton made 75% instead of 63% of its steps
when it streamed every token (tests/bench/triton_overhead.py on 2 cores).

A request never has more than one response waiting. The loop leaves the newest snapshot in the request's `Reply`; if the
one before has not left yet, the two leave as one. While the senders keep up that is one response a step; when they do
not, responses get larger instead of queues longer, and the engine never waits for a slow reader.

The trap: `is_cancelled` must not be asked once the final response is on its way, because the server frees the object
it would look at. `Reply` guards both with one lock.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, Literal, Protocol

from puzzle_trtllm.serve.triton.request import ReplyFormat
from puzzle_trtllm.serve.triton.response import Sent, Snapshot, Tensor, render

Status = Literal["UNAVAILABLE", "INVALID_ARGUMENT", "CANCELLED", "INTERNAL"]
Log = Callable[[str], None]


class ResponseSender(Protocol):
    """Triton's InferenceResponseSender."""

    def send(self, response: Any = ..., flags: int = ...) -> None: ...
    def is_cancelled(self) -> bool: ...


class Encoder(Protocol):
    """How tensors and errors become Triton's objects (`backend.py`; a fake in tests)."""

    FINAL: int

    def response(self, tensors: list[Tensor]) -> Any: ...
    def error(self, status: Status, message: str) -> Any: ...


class Outbox:
    """The sender thread."""

    def __init__(self, encoder: Encoder, *, log: Log = print) -> None:
        self._encoder = encoder
        self._log = log
        self._queue: queue.SimpleQueue[Reply | None] = queue.SimpleQueue()
        self.responses_sent = 0
        """Since the start, for the metrics."""
        self._thread = threading.Thread(target=self._send_all, name="puzzle-send", daemon=True)
        self._thread.start()

    def open_reply(self, sender: ResponseSender, form: ReplyFormat) -> Reply:
        """A new request's end of the wire."""
        return Reply(sender, form, self._queue, self._encoder)

    def close(self) -> None:
        """Send what waits, then end the thread."""
        self._queue.put(None)
        self._thread.join(timeout=5)

    def _send_all(self) -> None:
        while (reply := self._queue.get()) is not None:
            try:
                self.responses_sent += reply.flush()
            except Exception as error:  # the server may have closed the request
                self._log(f"a response could not be sent: {type(error).__name__}: {error}")


class Reply:
    """The responses of one request. `update` and `fail` belong to one thread, `flush` to the sender thread."""

    def __init__(
        self, sender: ResponseSender, form: ReplyFormat, replies: queue.SimpleQueue[Reply | None], encoder: Encoder
    ) -> None:
        self._sender = sender
        self._form = form
        self._replies = replies
        self._encoder = encoder
        self._latest: Snapshot | None = None
        self._failure: tuple[Status, str] | None = None
        self._waiting = False
        self._sent = Sent()
        self._closed = False
        self._closing = threading.Lock()

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, so that a snapshot can hold back what may become one."""
        return self._form.stop

    @property
    def ended(self) -> bool:
        """Whether the last response is decided (it may not have left yet)."""
        return self._failure is not None or (self._latest is not None and self._latest.finished)

    def update(self, snapshot: Snapshot) -> None:
        """A step was made. Ignored after the end."""
        if self.ended:
            return
        self._latest = snapshot
        if self._form.streaming or snapshot.finished:
            self._queue()

    def fail(self, status: Status, message: str) -> None:
        """End with an error. Ignored after the end."""
        if not self.ended:
            self._failure = (status, message)
            self._queue()

    def is_cancelled(self) -> bool:
        """Ask the server whether the client has gone (a round trip)."""
        with self._closing:
            return not self._closed and self._sender.is_cancelled()

    def flush(self) -> int:
        """Send what is new; returns the number of responses sent (0 or 1)."""
        self._waiting = False  # first, so that an update from now on queues again
        now, failure = self._latest, self._failure
        if self._closed or (failure is None and not self._is_news(now)):
            return 0
        final = failure is not None or (now is not None and now.finished)
        if failure is not None:
            response = self._encoder.error(*failure)
        else:
            assert now is not None
            response = self._encoder.response(render(self._form, now, self._sent))
            self._sent = Sent(max(self._sent.text_length, len(now.text)), max(self._sent.num_tokens, now.num_tokens))
        if final:
            with self._closing:
                self._closed = True
        self._sender.send(response, flags=self._encoder.FINAL if final else 0)
        return 1

    def _is_news(self, now: Snapshot | None) -> bool:
        if now is None:
            return False
        return now.finished or now.num_tokens > self._sent.num_tokens or len(now.text) > self._sent.text_length

    def _queue(self) -> None:
        if not self._waiting:
            self._waiting = True
            self._replies.put(self)
