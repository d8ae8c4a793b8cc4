"""Requests and responses as KServe protocol buffers, made by hand.

tritonclient's own InferInput and InferResult take tens of microseconds a response (numpy objects, a dictionary of
outputs); a load generator reads tens of thousands of responses a second, so here tensors are bytes: integers and
floats little-endian, a STRING tensor as length (uint32) and bytes for each element.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from tritonclient.grpc import service_pb2

from puzzle_trtllm.errors import ServeError
from puzzle_trtllm.serve.client.request import GenerationRequest

_LENGTH = struct.Struct("<I")
_NO_PROMPT = "sampling_param_exclude_input_from_output"
"""Always asked for: where nothing is said, NVIDIA's model repeats the prompt before an answer that does not stream."""


def pack_strings(values: Iterable[str]) -> bytes:
    """Raises TypeError or UnicodeEncodeError for what is no text or holds half of a surrogate pair."""
    parts = []
    for value in values:
        data = str.encode(value)
        parts += [_LENGTH.pack(len(data)), data]
    return b"".join(parts)


def unpack_string(data: bytes) -> str:
    """The first (here: only) element of a STRING tensor."""
    if len(data) < 4:
        return ""
    (length,) = _LENGTH.unpack_from(data)
    return data[4 : 4 + length].decode("utf-8", errors="replace")


def unpack_int32(data: bytes) -> list[int]:
    """A list of ints; `array` is faster than numpy for the one or two elements that are usual."""
    return array("i", data).tolist()


def _pack_int32(values: Sequence[int]) -> bytes:
    try:
        return struct.pack(f"<{len(values)}i", *values)
    except struct.error as error:
        raise ServeError(f"not 32-bit integers: {error}", key="input_ids", status="INVALID_ARGUMENT") from None


_PACK: dict[str, Callable[[Any], bytes]] = {
    "BOOL": lambda value: b"\x01" if value else b"\x00",
    "INT32": lambda value: struct.pack("<i", value),
    "UINT64": lambda value: struct.pack("<Q", value),
    "FP32": lambda value: struct.pack("<f", value),
}


class RequestBuilder:
    """Builds ModelInferRequests for a server that knows the inputs `known_inputs`.

    Extras that the server does not know are left out; where that changes the result (`input_ids`, `ignore_eos`,
    `min_tokens`) a ServeError says so instead.
    """

    def __init__(self, model: str, known_inputs: Collection[str]) -> None:
        self._model = model
        self._known = frozenset(known_inputs)

    @property
    def gives_token_ids(self) -> bool:
        """Whether the server sends the token ids that it generated."""
        return "return_output_ids" in self._known

    @property
    def streams_delta(self) -> bool:
        """Whether responses hold only what is new (else everything so far)."""
        return "stream_delta" in self._known

    def build(self, request: GenerationRequest) -> Any:
        """Raises ServeError (INVALID_ARGUMENT) for what the server or the protocol cannot carry."""
        message = self._begin(request.request_id, "" if request.prompt is None else request.prompt)
        if request.input_ids is not None:
            self._need("input_ids", request.input_ids)
            self._add(message, "input_ids", "INT32", [len(request.input_ids)], _pack_int32(request.input_ids))
        self._scalar(message, "streaming", "BOOL", request.streaming)
        for name in ("stream_delta", "return_output_ids"):
            if name in self._known:
                self._scalar(message, name, "BOOL", True)
        self._scalar(message, "return_finish_reason", "BOOL", True)
        if _NO_PROMPT in self._known:
            self._scalar(message, _NO_PROMPT, "BOOL", True)
        self._add_sampling(message, request)
        return message

    def build_stop(self, request_id: str) -> Any:
        """Cancels the running requests of this id."""
        message = self._begin(request_id, "")
        self._scalar(message, "stop", "BOOL", True)
        return message

    def _begin(self, request_id: str, prompt: str) -> Any:
        try:
            message = service_pb2.ModelInferRequest(model_name=self._model, id=request_id)
        except (TypeError, ValueError):
            raise _not_text("request_id") from None
        self._strings(message, "text_input", [prompt])
        return message

    def _add_sampling(self, message: Any, request: GenerationRequest) -> None:
        self._scalar(message, "sampling_param_max_tokens", "INT32", request.max_tokens)
        self._scalar(message, "sampling_param_temperature", "FP32", request.temperature)
        self._scalar(message, "sampling_param_top_k", "INT32", request.top_k)
        self._scalar(message, "sampling_param_top_p", "FP32", request.top_p)
        self._scalar(message, "sampling_param_frequency_penalty", "FP32", request.frequency_penalty)
        self._scalar(message, "sampling_param_presence_penalty", "FP32", request.presence_penalty)
        self._scalar(message, "sampling_param_seed", "UINT64", request.seed)
        if request.stop:
            self._strings(message, "sampling_param_stop", request.stop)
        for name, dtype, value in (
            ("sampling_param_ignore_eos", "BOOL", request.ignore_eos),
            ("sampling_param_min_tokens", "INT32", request.min_tokens),
        ):
            if value is not None:
                self._need(name, value)
                self._scalar(message, name, dtype, value)

    def _need(self, name: str, value: object) -> None:
        if name not in self._known:
            found = f"{len(value)} values" if isinstance(value, Sequence) else value
            raise ServeError("this server's model has no such input", key=name, found=found, status="INVALID_ARGUMENT")

    def _strings(self, message: Any, name: str, values: Sequence[str]) -> None:
        try:
            self._add(message, name, "BYTES", [len(values)], pack_strings(values))
        except (TypeError, UnicodeEncodeError):
            raise _not_text(name) from None

    def _scalar(self, message: Any, name: str, dtype: str, value: float | bool | None) -> None:
        if value is None:
            return
        try:
            self._add(message, name, dtype, [1], _PACK[dtype](value))
        except (struct.error, OverflowError):  # the second for a float that is too large
            raise ServeError("out of range", key=name, found=value, expected=dtype, status="INVALID_ARGUMENT") from None

    @staticmethod
    def _add(message: Any, name: str, dtype: str, shape: list[int], data: bytes) -> None:
        message.inputs.add(name=name, datatype=dtype, shape=shape)
        message.raw_input_contents.append(data)


def _not_text(name: str) -> ServeError:
    return ServeError("not text that UTF-8 can carry", key=name, status="INVALID_ARGUMENT")
