"""Errors as OpenAI's clients expect them: {"error": {"message", "type", "param", "code"}} with an HTTP status."""

from __future__ import annotations

from typing import Any

from puzzle_trtllm.errors import ServeError


class ApiError(Exception):
    """A request that gets no answer."""

    def __init__(
        self, message: str, *, status: int = 400, kind: str = "invalid_request_error", param: str | None = None,
        code: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """The JSON of the response."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


def unsupported(param: str, why: str) -> ApiError:
    """A parameter of OpenAI's that this server cannot honour."""
    return ApiError(f"{param}: {why}", param=param, code="unsupported_parameter")


def unavailable(message: str, *, code: str = "unavailable") -> ApiError:
    """Not now."""
    return ApiError(message, status=503, kind="service_unavailable_error", code=code)


def error_of_server(error: ServeError) -> ApiError:
    """What Triton's refusal means to an HTTP client: its fault 400, full or dead 503, anything else 500."""
    if error.status == "INVALID_ARGUMENT":
        return ApiError(str(error))
    if error.status in ("UNAVAILABLE", "NOT_FOUND", "DEADLINE_EXCEEDED"):
        return unavailable(str(error))
    if error.status == "CANCELLED":
        return unavailable(str(error), code="cancelled")
    return ApiError(str(error), status=500, kind="server_error", code="internal_error")
