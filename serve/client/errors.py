"""What a server's refusal means: gRPC statuses, and the words that stand for them in a stream's responses.

Our model writes its status before the text (`UNAVAILABLE: the queue is full`). Triton's own refusals, made before the
model sees a request, and the words of NVIDIA's model are bare text; their status is read from how they begin.
"""

from __future__ import annotations

import re
from typing import Any

from puzzle_trtllm.errors import ServeError

_OURS = re.compile(r"^(UNAVAILABLE|INVALID_ARGUMENT|CANCELLED|INTERNAL): (.*)$", re.DOTALL)
_BARE = (
    (re.compile(r"^Request cancelled by client"), "CANCELLED"),  # this and the next: NVIDIA's model, of `stop`
    (re.compile(r"^A request id must be provided"), "INVALID_ARGUMENT"),
    (re.compile(r"unknown model: .* has no available versions"), "UNAVAILABLE"),  # it is loading, or unloaded
    (re.compile(r"unknown model", re.IGNORECASE), "NOT_FOUND"),
    (re.compile(r"not ready|not healthy|unavailable|stopp|shut", re.IGNORECASE), "UNAVAILABLE"),
    (
        re.compile(r"^(\[request id: [^\]]*\] )?(unexpected|expected|incomplete|inference (input|request)|input)"),
        "INVALID_ARGUMENT",
    ),
)


def error_of_words(words: str, *, url: str) -> ServeError:
    """The error in a stream's response; status UNKNOWN where the words do not tell."""
    ours = _OURS.match(words)
    if ours is not None:
        return ServeError(ours.group(2), file=url, status=ours.group(1))
    for pattern, status in _BARE:
        if pattern.search(words):
            return ServeError(words, file=url, status=status)
    return ServeError(words, file=url, status="UNKNOWN")


def error_of_status(error: Any, *, url: str) -> ServeError:
    """A grpc.aio.AioRpcError: the connection or the call itself failed."""
    if error.code().name == "CANCELLED":  # not by us, who would see no status: a server that stops cuts its calls off
        return ServeError("the server cut off the call", file=url, status="UNAVAILABLE")
    details = str(error.details() or "no details")
    nobody = re.match(r"failed to connect|errors resolving", details)
    expected = "the gRPC host:port that `puzzle-trtllm serve` prints; --ca-cert where it speaks TLS" if nobody else None
    return ServeError(details, file=url, expected=expected, status=error.code().name)
