"""An asynchronous gRPC client of the `tensorrt_llm` model, lean enough to be a load generator's.

Each request gets a stream of its own on a shared connection: closing the stream cancels the generation. Works against
NVIDIA's own llmapi model too: the first thing a client asks is which inputs the model has, and it sends only those.

Errors arrive as words in a response (errors.py). The trap: the header `triton_grpc_error: true` asks for gRPC statuses
instead, and servers from before spring 2026 can crash when an error ends such a stream, so it is not sent.

    async with TritonLlmClient("127.0.0.1:8001") as client:
        async for chunk in client.stream(GenerationRequest(prompt="12+30=")):
            print(chunk.text, end="")
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from types import TracebackType
from typing import Any

import grpc  # type: ignore[import-untyped]
from tritonclient.grpc import service_pb2, service_pb2_grpc

from puzzle_trtllm.errors import ServeError
from puzzle_trtllm.serve.client.contract import check_contract, count_instances
from puzzle_trtllm.serve.client.errors import error_of_status, error_of_words
from puzzle_trtllm.serve.client.request import GenerationChunk, GenerationRequest, GenerationResult
from puzzle_trtllm.serve.client.secret import grpc_metadata
from puzzle_trtllm.serve.client.tensors import RequestBuilder, unpack_int32, unpack_string
from puzzle_trtllm.serve.client.tls import ClientTls

_MAX_RESPONSE_BYTES = 256 << 20
"""Many times the text of a million tokens; a server may be one that we should not have talked to."""
_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", _MAX_RESPONSE_BYTES),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),  # channels of their own connection, not one shared behind our back
    ("grpc.enable_http_proxy", 0),
    # After a server that loaded for minutes, gRPC would wait up to two more until it looks again.
    ("grpc.max_reconnect_backoff_ms", 5000),
)


class TritonLlmClient:
    """Use as an async context manager. `url` is host:port of Triton's gRPC endpoint.

    `connections` spreads the streams over several HTTP/2 connections. Without `tls` the connection is plain text.
    `secret` opens what the server restricts to those who know it.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str = "tensorrt_llm",
        connections: int = 1,
        tls: ClientTls | None = None,
        secret: str | None = None,
    ) -> None:
        self.url = url
        self._tls = tls
        self._metadata = grpc_metadata(secret)
        self._model = model
        self._connections = connections
        self._channels: list[grpc.aio.Channel] = []
        self._stubs: list[Any] = []
        self._next = 0
        self.num_instances = 1
        """Engines in the server, by its own account; known once connected."""
        self._builder = RequestBuilder(model, ())

    async def __aenter__(self) -> TritonLlmClient:
        """Connect. Raises ServeError: UNAVAILABLE when nobody answers, NOT_FOUND or UNAVAILABLE when the model is not
        there or not ready, INVALID_ARGUMENT when it is another kind of model."""
        self._channels = [self._connect() for _ in range(self._connections)]
        self._stubs = [service_pb2_grpc.GRPCInferenceServiceStub(channel) for channel in self._channels]
        try:
            question = service_pb2.ModelConfigRequest(name=self._model)
            reply = await self._stubs[0].ModelConfig(question, timeout=30, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            await self._close()
            raise error_of_status(error, url=self.url) from None
        try:
            check_contract(reply.config, self._model, url=self.url)
        except ServeError:
            await self._close()
            raise
        self._builder = RequestBuilder(self._model, [tensor.name for tensor in reply.config.input])
        self.num_instances = count_instances(reply.config)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._close()

    @property
    def gives_token_ids(self) -> bool:
        """False against a stock llmapi server: token counts are then unknown, and lengths cannot be enforced."""
        return self._builder.gives_token_ids

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        """The chunks as they arrive; one only, if the request is not streaming.

        Leaving the loop cancels the generation (close the iterator, as `contextlib.aclosing` does, to have that happen
        at once). Raises ServeError with the status when the server answers with an error.
        """
        message = self._builder.build(request)
        reader = _Reader(delta=self._builder.streams_delta, counts=self._builder.gives_token_ids)
        self._next = (self._next + 1) % len(self._stubs)
        # Not written by call, which would save a task: a server that answers before it has read the message, or dies
        # meanwhile, would be INTERNAL or an error of grpc's own instead of what it said.
        call = self._stubs[self._next].ModelStreamInfer([message], metadata=self._metadata)
        failure: ServeError | None = None
        try:
            async for response in call:
                if response.error_message:
                    # Read on to the stream's own end: cancelling what is just ending makes some servers leak it.
                    failure = error_of_words(response.error_message, url=self.url)
                    continue
                try:
                    chunk = reader.read(response.infer_response)
                except ValueError as error:
                    raise ServeError(f"wrong response: {error}", file=self.url, status="INTERNAL") from None
                if chunk is not None and chunk.finish_reason == "cancelled":  # NVIDIA's model, of one that was stopped
                    failure = ServeError("the server cancelled the request", file=self.url, status="CANCELLED")
                elif chunk is not None:
                    yield chunk
        except grpc.aio.AioRpcError as error:
            raise error_of_status(error, url=self.url) from None
        finally:
            call.cancel()  # does nothing to a call that has ended
        if failure is not None:
            raise failure

    async def generate(self, request: GenerationRequest) -> GenerationResult:
        """The whole continuation, with the times of its parts. Raises ServeError."""
        text: list[str] = []
        token_ids: list[int] = []
        times_ns: list[int] = []
        last: GenerationChunk | None = None
        sent_ns = time.perf_counter_ns()
        async with aclosing(self.stream(request)) as chunks:
            async for chunk in chunks:
                text.append(chunk.text)
                token_ids += chunk.token_ids
                times_ns += [chunk.received_ns] * (len(chunk.token_ids) if self.gives_token_ids else 1)
                last = chunk
        if last is None:
            raise ServeError("the server ended the request without a response", file=self.url, status="INTERNAL")
        return GenerationResult(
            text="".join(text),
            token_ids=token_ids,
            num_output_tokens=last.num_output_tokens,
            finish_reason=last.finish_reason,
            sent_ns=sent_ns,
            first_token_ns=times_ns[0] if times_ns else last.received_ns,
            token_times_ns=times_ns,
            end_ns=last.received_ns,
        )

    async def stop(self, request_id: str) -> str:
        """Cancel the running requests of this id; returns the server's words."""
        message = self._builder.build_stop(request_id)
        call = self._stubs[0].ModelStreamInfer([message], metadata=self._metadata)
        words = ""
        try:
            async for response in call:
                words = words or str(response.error_message)
        except grpc.aio.AioRpcError as error:
            raise error_of_status(error, url=self.url) from None
        answer = error_of_words(words, url=self.url)
        if answer.status != "CANCELLED":
            raise answer
        return str(answer)

    def _connect(self) -> grpc.aio.Channel:
        if self._tls is None:
            return grpc.aio.insecure_channel(self.url, options=_CHANNEL_OPTIONS)
        return grpc.aio.secure_channel(self.url, self._tls.credentials(), options=_CHANNEL_OPTIONS)

    async def _close(self) -> None:
        for channel in self._channels:
            await channel.close()
        self._channels, self._stubs = [], []


def generate(prompt: str | None = None, *, url: str, tls: ClientTls | None = None, **options: Any) -> GenerationResult:
    """`TritonLlmClient.generate` for one request, without asyncio; `options` are GenerationRequest's fields."""

    async def run() -> GenerationResult:
        async with TritonLlmClient(url, tls=tls) as client:
            return await client.generate(GenerationRequest(prompt=prompt, **options))

    return asyncio.run(run())


class _Reader:
    """Turns one request's responses into chunks; the first response tells at which place each output lies."""

    def __init__(self, *, delta: bool, counts: bool) -> None:
        self._delta = delta
        self._counts = counts
        self._text_length = 0
        self._num_tokens = 0

    def read(self, response: Any) -> GenerationChunk | None:
        """Raises ValueError for tensors that are none of an llmapi model's."""
        received_ns = time.perf_counter_ns()
        raw = response.raw_output_contents
        if not raw:
            return None  # an empty final response
        text, token_ids, finish_reason = "", [], None
        for tensor, data in zip(response.outputs, raw, strict=True):
            name = tensor.name
            if name == "text_output":
                text = unpack_string(data)
            elif name == "output_ids":
                token_ids = unpack_int32(data)
            elif name == "finish_reason":
                finish_reason = unpack_string(data)
        if not self._delta:
            text, self._text_length = text[self._text_length :], len(text)
            token_ids = token_ids[self._num_tokens :]
        if token_ids and min(token_ids) < 0:
            raise ValueError("a token id below 0")
        self._num_tokens += len(token_ids)
        return GenerationChunk(
            text=text,
            token_ids=token_ids,
            num_output_tokens=self._num_tokens if self._counts else None,
            finish_reason=None if finish_reason in (None, "None", "") else finish_reason,
            received_ns=received_ns,
        )
