"""The client against a server that behaves like NVIDIA's own llmapi model: no extras, text so far, "None" reasons.

The server is a small gRPC service in this process, so its every word is the test's.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from puzzle_trtllm.chat import ChatTokenizer
from puzzle_trtllm.commands.clients import generate_answer, stream_answer
from puzzle_trtllm.demo.story import ABACUS
from puzzle_trtllm.errors import ServeError
from puzzle_trtllm.serve.client.errors import error_of_words
from puzzle_trtllm.serve.client.request import GenerationRequest
from puzzle_trtllm.serve.client.tensors import pack_strings, unpack_string
from puzzle_trtllm.serve.client.triton_client import TritonLlmClient
from puzzle_trtllm.serve.triton.contract import INPUTS, OUTPUTS
from tests.serve.scripted import HANG_S


class StockServer(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Plays `script`: texts so far, whole responses, an Exception in-band, or a status that aborts the stream."""

    def __init__(self, script) -> None:
        self.script = script
        self.metadata: dict[str, str] = {}
        self.prompt = ""
        self.begun, self.cancelled = asyncio.Event(), asyncio.Event()
        self.without: set[str] = set()
        self.decoupled = True
        self.instance_groups: list[dict] = []

    async def ModelConfig(self, request, context):
        reply = service_pb2.ModelConfigResponse()
        reply.config.model_transaction_policy.decoupled = self.decoupled
        for group in self.instance_groups:
            reply.config.instance_group.add(**group)
        for tensors, specs in ((reply.config.input, INPUTS), (reply.config.output, OUTPUTS)):
            for spec in specs:
                if not spec.extra and spec.name not in self.without:
                    tensors.add(name=spec.name, data_type=f"TYPE_{spec.dtype}")
        return reply

    async def ModelStreamInfer(self, requests, context):
        self.metadata = dict(context.invocation_metadata())
        async for request in requests:
            self.prompt = unpack_string(request.raw_input_contents[0])
            assert "input_ids" not in {tensor.name for tensor in request.inputs}
            break
        self.begun.set()
        try:
            for index, item in enumerate(self.script):
                if isinstance(item, grpc.StatusCode):
                    await context.abort(item, "scripted abort")
                if isinstance(item, Exception):
                    yield service_pb2.ModelStreamInferResponse(error_message=str(item))
                    continue
                if isinstance(item, service_pb2.ModelStreamInferResponse):
                    yield item
                    continue
                yield self.response(item, "stop" if index == len(self.script) - 1 else "None")
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    @staticmethod
    def response(text: str | None, finish_reason: str):
        message = service_pb2.ModelStreamInferResponse()
        if text is not None:
            for name, value in (("finish_reason", finish_reason), ("text_output", text)):
                message.infer_response.outputs.add(name=name, datatype="BYTES", shape=[1])
                message.infer_response.raw_output_contents.append(pack_strings([value]))
        return message


@asynccontextmanager
async def stock_server(*script, port: int = 0) -> AsyncIterator[tuple[StockServer, str]]:
    service, server = StockServer(script), grpc.aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(service, server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield service, f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, HANG_S))


def test_text_so_far_becomes_chunks_of_what_is_new() -> None:
    async def scenario():
        async with stock_server("a", "ab", "ab", "abcd") as (service, url), TritonLlmClient(url) as client:
            assert not client.gives_token_ids
            chunks = [chunk async for chunk in client.stream(GenerationRequest(prompt="x"))]
            return service.metadata, chunks

    metadata, chunks = run(scenario())
    assert [chunk.text for chunk in chunks] == ["a", "b", "", "cd"]
    assert [chunk.finish_reason for chunk in chunks] == [None, None, None, "stop"]
    assert all(chunk.token_ids == [] and chunk.num_output_tokens is None for chunk in chunks)
    assert "triton_grpc_error" not in metadata, "it crashes servers from before spring 2026"


def response_of(*tensors: tuple[str, bytes], names: int | None = None) -> service_pb2.ModelStreamInferResponse:
    message = service_pb2.ModelStreamInferResponse()
    for name, data in tensors:
        message.infer_response.raw_output_contents.append(data)
        message.infer_response.outputs.add(name=name)
    del message.infer_response.outputs[names:]
    return message


@pytest.mark.parametrize(
    "wrong",
    [
        response_of(("text_output", b""), ("output_ids", b"\1\0\0")),
        response_of(("output_ids", b"\xff\xff\xff\xff")),
        response_of(("text_output", b""), names=0),
    ],
)
def test_tensors_that_are_none_of_an_llmapi_models_are_an_error_of_the_server(wrong) -> None:
    async def scenario():
        async with stock_server("a", wrong) as (_, url), TritonLlmClient(url) as client:
            with pytest.raises(ServeError, match="wrong response") as error:
                await client.generate(GenerationRequest(prompt="x"))
            return error.value.status

    assert run(scenario()) == "INTERNAL"


def test_a_result_counts_responses_where_tokens_are_unknown() -> None:
    async def scenario():
        async with stock_server("a", "ab") as (_, url), TritonLlmClient(url) as client:
            return await client.generate(GenerationRequest(prompt="x"))

    result = run(scenario())
    assert (result.text, result.num_output_tokens, result.finish_reason) == ("ab", None, "stop")
    assert (
        result.sent_ns < result.first_token_ns == result.token_times_ns[0] < result.token_times_ns[1] == result.end_ns
    )


@pytest.mark.parametrize(
    ("groups", "instances"),
    [
        ([], 1),
        ([{"count": 2, "kind": "KIND_CPU"}], 2),
        ([{"count": 2, "kind": "KIND_CPU"}, {"count": 1, "kind": "KIND_CPU"}], 3),
        ([{"count": 2, "kind": "KIND_GPU", "gpus": [0, 1, 2]}], 6),  # on each of the GPUs
    ],
)
def test_the_server_says_how_many_instances_it_runs(groups, instances) -> None:
    async def scenario():
        async with stock_server() as (service, url):
            service.instance_groups = groups
            async with TritonLlmClient(url) as client:
                return client.num_instances

    assert run(scenario()) == instances


def test_an_empty_final_response_is_no_chunk() -> None:
    async def scenario():
        async with stock_server("a", None) as (_, url), TritonLlmClient(url) as client:
            return [chunk.text async for chunk in client.stream(GenerationRequest(prompt="x"))]

    assert run(scenario()) == ["a"]


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        (grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE"),
        (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT"),
        (RuntimeError("in-band words"), "UNKNOWN"),
        (RuntimeError("CANCELLED: in-band words"), "CANCELLED"),
    ],
)
def test_errors_carry_their_status(ending, status: str) -> None:
    async def scenario():
        async with stock_server("a", ending) as (_, url), TritonLlmClient(url) as client:
            await client.generate(GenerationRequest(prompt="x"))

    with pytest.raises(ServeError, match=r"scripted abort|in-band words") as error:
        run(scenario())
    assert error.value.status == status


def test_a_call_that_the_server_cuts_off_was_not_cancelled_by_anybody() -> None:
    """So Triton ends what is open when it stops; a load that was measured meanwhile has failed requests."""

    async def scenario():
        async with stock_server("a", grpc.StatusCode.CANCELLED) as (_, url), TritonLlmClient(url) as client:
            await client.generate(GenerationRequest(prompt="x"))

    with pytest.raises(ServeError, match="the server cut off the call") as error:
        run(scenario())
    assert error.value.status == "UNAVAILABLE"


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        ("UNAVAILABLE: the queue is full: 8 requests", "UNAVAILABLE", "the queue is full: 8 requests"),
        ("INVALID_ARGUMENT: text_input: missing", "INVALID_ARGUMENT", "text_input: missing"),
        # Triton's own, as version 2.51 words them:
        ("[request id: <id_unknown>] inference input 'streaming' data-type is", "INVALID_ARGUMENT", "inference input"),
        ("unexpected inference input 'x' for model 'tensorrt_llm'", "INVALID_ARGUMENT", "unexpected"),
        (
            "[request id: r] incomplete string data for inference input 'text_input', expecting string of length 100 "
            "but only 3 bytes available",
            "INVALID_ARGUMENT",
            "incomplete string data",
        ),
        ("Request for unknown model: 'x' is not found", "NOT_FOUND", "unknown model"),
        # While a server stops, or has not loaded the model yet:
        ("Request for unknown model: 'tensorrt_llm' has no available versions", "UNAVAILABLE", "no available versions"),
        ("Stub process 'tensorrt_llm_0_0' is not healthy.", "UNAVAILABLE", "not healthy"),
        ("Error generating request: boom", "UNKNOWN", "boom"),
        # The words of NVIDIA's model for a request with `stop`:
        ("Request cancelled by client", "CANCELLED", "Request cancelled by client"),
        ("A request id must be provided for request cancellation", "INVALID_ARGUMENT", "A request id must be"),
    ],
)
def test_words_stand_for_statuses(words: str, status: str, text: str) -> None:
    error = error_of_words(words, url="host:1")
    assert error.status == status and str(error).startswith("host:1: ") and text in str(error)


def test_stop_is_answered_as_by_our_own_model() -> None:
    async def scenario():
        script = RuntimeError("Request cancelled by client")
        async with stock_server(script) as (_, url), TritonLlmClient(url) as client:
            return await client.stop("an id")

    assert run(scenario()).endswith(": Request cancelled by client")


def test_a_generation_that_somebody_stopped_is_no_answer() -> None:
    """NVIDIA's model ends the stream of a request that was stopped with what it had, and this finish reason."""

    async def scenario():
        script = [StockServer.response("a", "None"), StockServer.response("ab", "cancelled")]
        async with stock_server(*script) as (_, url), TritonLlmClient(url) as client:
            await client.generate(GenerationRequest(prompt="x"))

    with pytest.raises(ServeError, match="the server cancelled the request") as error:
        run(scenario())
    assert error.value.status == "CANCELLED"


@pytest.mark.parametrize("as_json", [True, False])
def test_generate_sends_a_chat_as_text_to_a_server_that_takes_no_ids(as_json: bool, capsys) -> None:
    async def scenario():
        chat = ChatTokenizer.from_folder(ABACUS)
        request = GenerationRequest(input_ids=chat.encode("a prompt"))
        async with stock_server("an ", "an answer") as (service, url):
            client = TritonLlmClient(url)
            if as_json:
                assert (await generate_answer(client, request, "a prompt")).text == "an answer"
            else:
                await stream_answer(client, request, "a prompt", chat)
        return service.prompt

    assert run(scenario()) == "a prompt"
    assert capsys.readouterr().out == ("" if as_json else "an answer\n")


def test_a_server_that_ends_without_a_word_is_an_error() -> None:
    async def scenario():
        async with stock_server() as (_, url), TritonLlmClient(url) as client:
            await client.generate(GenerationRequest(prompt="x"))

    with pytest.raises(ServeError, match="without a response"):
        run(scenario())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"without": {"text_input"}}, "tensorrt_llm: the server's model is not an llmapi model: input text_input"),
        ({"without": {"text_output"}}, "output text_output"),
        ({"decoupled": False}, "the server's model cannot stream (found decoupled: false"),
    ],
)
def test_another_kind_of_model_is_refused_before_anything_is_sent(change, words) -> None:
    async def scenario():
        async with stock_server("a") as (service, url):
            vars(service).update(change)
            async with TritonLlmClient(url):
                pass

    with pytest.raises(ServeError) as error:
        run(scenario())
    assert words in str(error.value) and "\n" not in str(error.value)
    assert error.value.status == "INVALID_ARGUMENT"


def test_nobody_there_is_unavailable() -> None:
    async def scenario():
        async with TritonLlmClient("127.0.0.1:9"):
            pass

    with pytest.raises(ServeError) as error:
        run(scenario())
    assert error.value.status == "UNAVAILABLE"


def test_closing_the_iterator_cancels_the_call() -> None:
    async def scenario():
        async with stock_server(*"abcdefghijklmnopqrstuvwxyz" * 100) as (service, url), TritonLlmClient(url) as client:
            chunks = client.stream(GenerationRequest(prompt="x"))
            async for _ in chunks:
                break
            await chunks.aclose()
            await service.cancelled.wait()

    run(scenario())


def test_cancelling_the_task_cancels_the_call() -> None:
    async def scenario():
        async with stock_server(*"abcdefghijklmnopqrstuvwxyz" * 100) as (service, url), TritonLlmClient(url) as client:
            task = asyncio.create_task(client.generate(GenerationRequest(prompt="x")))
            await service.begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await service.cancelled.wait()

    run(scenario())


@pytest.mark.slow
def test_a_server_that_was_away_for_long_is_found_again_soon() -> None:
    """An engine loads for minutes, in which an OpenAI front on another machine goes on asking: it fails 28 s long."""

    async def scenario() -> tuple[float, str]:
        loop = asyncio.get_running_loop()
        async with stock_server("a") as (_, url):
            client = TritonLlmClient(url)
            await client.__aenter__()
        back_s = loop.time() + 28
        while loop.time() < back_s:
            with pytest.raises(ServeError):
                await client.generate(GenerationRequest(prompt="x"))
            await asyncio.sleep(0.2)
        async with stock_server("a", port=int(url.rpartition(":")[2])):
            while True:
                try:
                    text = (await client.generate(GenerationRequest(prompt="x"))).text
                    return loop.time() - back_s, text
                except ServeError:
                    await asyncio.sleep(0.2)

    away_s, text = asyncio.run(asyncio.wait_for(scenario(), 90))
    assert (text, away_s < 8) == ("a", True)
