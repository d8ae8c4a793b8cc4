"""Sending responses without holding up the event loop.

Triton's `response_sender.send` is a round trip to the server process (50-150 us, the GIL released meanwhile). Called in
the event loop it would add up over all requests of a step, so a thread does it. Two would take the GIL, and on a small
machine the engine's core, from each other: with one, an engine behind Triton made 75% instead of 63% of its steps
when it streamed every token (tests/bench/triton_overhead.py on 2 cores).

A request never has more than one response waiting. The loop leaves the newest snapshot in the request's `Reply`; if the
one before has not left yet, the two leave as one. While the senders keep up that is one response a step; when they do
not, responses get larger instead of queues longer, and the engine never waits for a slow reader.

A response that cannot be sent (its tensors do not fit into shared memory, say) ends its request with INTERNAL, because
a hole in a stream or an answer that never comes are worse. What counts as sent, or as answered, is what did leave.

The traps: `is_cancelled` must not be asked once the final response is on its way, because the server frees the object
it would look at; `Reply` guards both with one lock. And a send with the final flag closes Triton's sender even when it
fails, so that nobody can be told any more: what may fail goes without the flag, which follows alone and needs next to
no room.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from typing import Any, Literal, Protocol

from puzzle_trtllm.serve.triton.request import ReplyFormat
from puzzle_trtllm.serve.triton.response import Sent, Snapshot, Tensor, render

Status = Literal["UNAVAILABLE", "INVALID_ARGUMENT", "CANCELLED", "INTERNAL"]
Log = Callable[[str], None]
Room = Callable[[], int]
OnLost = Callable[["Reply", str], None]
"""Told of a request that had to end because a response of it could not be sent, and why."""

_SURE_BYTES = 1 << 20
_SURE_ROOM = 16 << 20
"""A last response up to this size carries the final flag itself while shared memory has this much room: Triton's pool
grows by 1 MiB, and others take from it too. Any other is followed by the flag alone, one more round trip."""


class ResponseSender(Protocol):
    """Triton's InferenceResponseSender."""

    def send(self, response: Any = ..., flags: int = ...) -> None: ...
    def is_cancelled(self) -> bool: ...


class Encoder(Protocol):
    """How tensors and errors become Triton's objects (`backend.py`; a fake in tests)."""

    FINAL: int

    def response(self, tensors: list[Tensor]) -> Any: ...
    def error(self, status: Status, message: str) -> Any: ...


def free_shared_memory() -> int:
    """Bytes for which /dev/shm has room, whoever takes them; 0 where it does not say. A call takes about 1 us."""
    try:
        status = os.statvfs("/dev/shm")
    except OSError:
        return 0
    return status.f_bavail * status.f_frsize


class Outbox:
    """The sender thread. `room` tells how many bytes shared memory still takes."""

    def __init__(self, encoder: Encoder, *, room: Room = free_shared_memory, log: Log = print) -> None:
        self._encoder = encoder
        self._room = room
        self._log = log
        self._queue: queue.SimpleQueue[Reply | None] = queue.SimpleQueue()
        self.responses_sent = 0
        """Since the start, for the metrics."""
        self.answers_sent = 0
        """Requests whose last output has left, likewise."""
        self._thread = threading.Thread(target=self._send_all, name="puzzle-send", daemon=True)
        self._thread.start()

    def open_reply(
        self, sender: ResponseSender, form: ReplyFormat, *, on_lost: OnLost = lambda reply, why: None
    ) -> Reply:
        """A new request's end of the wire. `on_lost` is called in the sender thread."""
        return Reply(sender, form, self._queue, self._encoder, self._room, on_lost)

    def close(self) -> None:
        """Send what waits, then end the thread."""
        self._queue.put(None)
        self._thread.join(timeout=5)

    def _send_all(self) -> None:
        while (reply := self._queue.get()) is not None:
            try:
                sent = reply.flush()
                self.responses_sent += sent
                self.answers_sent += sent if reply.answered else 0
            except Exception as error:  # the server may have closed the request
                self._log(f"a last response could not be sent: {type(error).__name__}: {error}")


class Reply:
    """The responses of one request. `update` and `fail` belong to one thread, `flush` to the sender thread."""

    def __init__(
        self,
        sender: ResponseSender,
        form: ReplyFormat,
        replies: queue.SimpleQueue[Reply | None],
        encoder: Encoder,
        room: Room,
        on_lost: OnLost,
    ) -> None:
        self._sender = sender
        self._form = form
        self._replies = replies
        self._encoder = encoder
        self._room = room
        self._on_lost = on_lost
        self._latest: Snapshot | None = None
        self._failure: tuple[Status, str] | None = None
        self._waiting = False
        self._sent = Sent()
        self.answered = False
        """Whether the last output has left."""
        self._closed = False
        self._closing = threading.Lock()

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, so that a snapshot can hold back what may become one. Only a stream shows a text early."""
        return self._form.stop if self._form.streaming else ()

    @property
    def ended(self) -> bool:
        """Whether the last response is decided (it may not have left yet)."""
        return self._failure is not None or (self._latest is not None and self._latest.finished)

    @property
    def failed(self) -> bool:
        """Whether that is an error."""
        return self._failure is not None

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
        if failure is None:
            assert now is not None
            failure = self._try_to_send(now)
        if failure is not None:
            self._send_error(*failure)
        return 1

    def _try_to_send(self, now: Snapshot) -> tuple[Status, str] | None:
        """Returns how the request has to end instead, if it cannot be sent."""
        try:
            self._send(now)
            return None
        except Exception as error:
            why = f"a response could not be sent: {type(error).__name__}: {error}"
            self._on_lost(self, why)
            return "INTERNAL", why

    def _send(self, now: Snapshot) -> None:
        response = self._encoder.response(render(self._form, now, self._sent))
        if now.finished:
            self._send_last(response, size_limit=_size_limit(now))
            self.answered = True
            return
        self._sender.send(response, flags=0)
        self._sent = Sent(max(self._sent.text_length, len(now.text)), max(self._sent.num_tokens, now.num_tokens))

    def _send_error(self, status: Status, message: str) -> None:
        try:
            self._send_last(self._encoder.error(status, message))
        except Exception:
            # No room for words, or a model that is not decoupled: it may send once, and what failed counts.
            self._send_flag()

    def _send_last(self, response: Any, *, size_limit: int = 0) -> None:
        if size_limit <= _SURE_BYTES and self._room() >= _SURE_ROOM:
            self._send_flag(response)
            return
        self._sender.send(response, flags=0)
        self._send_flag()

    def _send_flag(self, response: Any = None) -> None:
        with self._closing:
            self._closed = True
        self._sender.send(response, flags=self._encoder.FINAL)

    def _is_news(self, now: Snapshot | None) -> bool:
        if now is None:
            return False
        return now.finished or now.num_tokens > self._sent.num_tokens or len(now.text) > self._sent.text_length

    def _queue(self) -> None:
        if not self._waiting:
            self._waiting = True
            self._replies.put(self)


def _size_limit(now: Snapshot) -> int:
    """More bytes than a response with all of it has: a character takes up to four in UTF-8, a token id four."""
    return 4 * (len(now.text) + now.num_tokens)
