"""A live tritonserver, driven over gRPC and HTTP as clients do; the runtime behind it is scripted (it echoes).

One server for the whole file: what one test does to its own requests must not show in another's.
"""

from __future__ import annotations

import asyncio
import json
import queue
import urllib.error
import urllib.request

import grpc
import numpy as np
import pytest
from tritonclient.grpc import InferenceServerClient, InferInput, service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from puzzle_trtllm.errors import ServeError
from puzzle_trtllm.serve.client.errors import error_of_words
from puzzle_trtllm.serve.client.request import GenerationRequest
from puzzle_trtllm.serve.client.triton_client import TritonLlmClient, generate
from puzzle_trtllm.serve.triton.contract import INPUTS, OUTPUTS
from puzzle_trtllm.serve.triton.server import TritonServer
from tests.serve.scripted import HANG_S, SCRIPTED, metric, scripted_engine, settle, short_lived, wait_until

MAX_OPEN = 8
MAX_SEQ_LEN = 5000


@pytest.fixture(scope="module")
def server(make_checkpoint, tmp_path_factory):
    engine = scripted_engine(
        tmp_path_factory.mktemp("scripted") / "engine", make_checkpoint([(4, None), (2, 16)]),
        step_ms=5, max_batch_size=MAX_OPEN, max_seq_len=MAX_SEQ_LEN,
    )  # fmt: skip
    with short_lived(TritonServer(engine, max_open_requests=MAX_OPEN, **SCRIPTED)) as server:
        yield server


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, HANG_S))


def echo(prompt: str, length: int) -> str:
    return (prompt * length)[:length]


# --- what is served -----------------------------------------------------------------------------------------------


def test_the_model_is_ready_and_is_what_the_contract_says(server) -> None:
    with InferenceServerClient(server.grpc_url) as client:
        assert client.is_server_ready() and client.is_model_ready("tensorrt_llm")
        config = client.get_model_config("tensorrt_llm", as_json=True)["config"]
    assert config["model_transaction_policy"] == {"decoupled": True} and config.get("max_batch_size", 0) == 0
    assert [tensor["name"] for tensor in config["input"]] == [spec.name for spec in INPUTS]
    assert [tensor["name"] for tensor in config["output"]] == [spec.name for spec in OUTPUTS]


def test_streaming_and_not_give_the_same_generation(server) -> None:
    async def scenario():
        async with TritonLlmClient(server.grpc_url) as client:
            request = {"prompt": "hello ", "max_tokens": 20}
            whole = await client.generate(GenerationRequest(streaming=False, **request))
            chunks = [chunk async for chunk in client.stream(GenerationRequest(**request))]
            return whole, chunks

    whole, chunks = run(scenario())
    assert whole.text == echo("hello ", 20) and whole.token_ids == [ord(c) for c in whole.text]
    assert (whole.num_output_tokens, whole.finish_reason, len(whole.token_times_ns)) == (20, "length", 20)
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [token_id for chunk in chunks for token_id in chunk.token_ids] == whole.token_ids
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert chunks[-1].num_output_tokens == 20


def test_a_stream_brings_its_tokens_before_the_last_one_is_generated(server) -> None:
    """The fourth token never comes; how many come in one response depends on who is busy."""

    async def scenario() -> str:
        async with TritonLlmClient(server.grpc_url) as client:
            chunks = client.stream(GenerationRequest(prompt="hang:3 ", max_tokens=8))
            text = ""
            while len(text) < 3:
                text += (await anext(chunks)).text
            await chunks.aclose()
            return text

    assert run(scenario()) == "han"
    body = {"text_input": "hang:3 ", "sampling_param_max_tokens": 8, "streaming": True, "stream_delta": True}
    with open_url(f"{server.http_url}/v2/models/tensorrt_llm/generate_stream", body) as response:
        text = ""
        while len(text) < 3:
            line = response.readline()
            text += json.loads(line.removeprefix(b"data: "))["text_output"] if line.strip() else ""
    assert text == "han"


def test_token_ids_in_give_what_text_in_gives(server) -> None:
    by_ids = generate(input_ids=[ord(c) for c in "12+3="], url=server.grpc_url, max_tokens=9)
    assert by_ids.text == generate("12+3=", url=server.grpc_url, max_tokens=9).text == echo("12+3=", 9)


def test_a_long_prompt_outgrows_the_first_shared_memory(server) -> None:
    """Triton starts with 1 MiB between its processes; token ids of 4999 and text of many requests pass through it."""
    prompt = "x" * (MAX_SEQ_LEN - 2)
    assert generate(prompt, url=server.grpc_url, max_tokens=3).text == "xxx"


def test_many_streams_at_once_keep_apart(server) -> None:
    async def scenario():
        async with TritonLlmClient(server.grpc_url, connections=2) as client:
            prompts = [f"{index}:abcdefg " for index in range(MAX_OPEN)]
            results = await asyncio.gather(
                *(client.generate(GenerationRequest(prompt=prompt, max_tokens=60)) for prompt in prompts)
            )
            return prompts, results

    prompts, results = run(scenario())
    assert [result.text for result in results] == [echo(prompt, 60) for prompt in prompts]


# --- clients that users already have ------------------------------------------------------------------------------


def inputs(text: str = "hello ", **values) -> list[InferInput]:
    dtypes = {"BOOL": bool, "INT32": np.int32, "FP32": np.float32, "UINT64": np.uint64, "BYTES": object}
    tensors = [InferInput("text_input", [1], "BYTES")]
    tensors[0].set_data_from_numpy(np.array([text.encode()], dtype=object))
    for name, (dtype, value) in values.items():
        array = np.array(value if isinstance(value, list) else [value], dtype=dtypes[dtype])
        tensors.append(InferInput(name, list(array.shape), dtype))
        tensors[-1].set_data_from_numpy(array)
    return tensors


def test_nvidias_stream_client_gets_text_so_far_and_errors_that_leave_its_stream_alive(server) -> None:
    """One stream, three requests, no header: the error of the second is words in its response."""
    answers: queue.Queue = queue.Queue()
    with InferenceServerClient(server.grpc_url) as client:
        client.start_stream(callback=lambda result, error: answers.put((result, error)))
        streaming = {"streaming": ("BOOL", True), "return_finish_reason": ("BOOL", True)}
        bad = {"sampling_param_top_p": ("FP32", 2.0)}
        for request_id, extra in (("one", {}), ("bad", bad), ("two", {})):
            tensors = inputs(sampling_param_max_tokens=("INT32", 4), **streaming, **extra)
            client.async_stream_infer("tensorrt_llm", tensors, request_id=request_id, enable_empty_final_response=True)
        texts: dict[str, list[str]] = {"one": [], "two": []}
        errors, ended = [], set()
        while ended != {"one", "two"} or not errors:
            result, error = answers.get(timeout=HANG_S)
            if error is not None:
                errors.append(str(error))
                continue
            response = result.get_response()
            texts[response.id].append(result.as_numpy("text_output")[0].decode())
            assert result.as_numpy("output_ids") is None
            if response.parameters["triton_final_response"].bool_param:
                ended.add(response.id)
                assert result.as_numpy("finish_reason").tolist() == [b"length"]
    assert len(errors) == 1 and "sampling_param_top_p: impossible value (found 2.0" in errors[0]
    for so_far in texts.values():
        assert so_far[-1] == "hell" and all("hell".startswith(text) for text in so_far)
        assert so_far == sorted(so_far, key=len)


def open_url(url: str, body: dict):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=HANG_S)


def post(url: str, body: dict) -> tuple[int, str]:
    try:
        with open_url(url, body) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_http_generate(server) -> None:
    url = f"{server.http_url}/v2/models/tensorrt_llm/generate"
    asked = {"id": "7", "text_input": "hello ", "sampling_param_max_tokens": 8, "return_output_ids": True}
    status, body = post(url, asked)
    answer = json.loads(body)
    assert (status, answer["id"], answer["text_output"], answer["num_output_tokens"]) == (200, "7", "hello he", 8)
    status, body = post(url, {"text_input": "hello ", "sampling_param_max_tokens": 0})
    assert status == 400 and "sampling_param_max_tokens: impossible value (found 0" in body


def test_http_generate_stream(server) -> None:
    url = f"{server.http_url}/v2/models/tensorrt_llm/generate_stream"
    body = {"text_input": "hello ", "sampling_param_max_tokens": 8, "streaming": True, "stream_delta": True}
    status, text = post(url, body)
    events = [json.loads(line[5:]) for line in text.splitlines() if line.startswith("data:")]
    assert status == 200 and "".join(event.get("text_output", "") for event in events) == "hello he"


@pytest.mark.parametrize("endpoint", ["generate", "generate_stream"])
@pytest.mark.parametrize("key", ["max_tokens", "sampling_param_max_token"])
def test_a_key_over_http_that_is_no_input_is_refused_and_not_ignored(server, endpoint: str, key: str) -> None:
    status, body = post(f"{server.http_url}/v2/models/tensorrt_llm/{endpoint}", {"text_input": "hello ", key: 8})
    assert status == 400 and f"INVALID_ARGUMENT: {key}: a parameter" in body


def test_unary_inference_is_tritons_to_refuse(server) -> None:
    with InferenceServerClient(server.grpc_url) as client, pytest.raises(InferenceServerException, match="decoupled"):
        client.infer("tensorrt_llm", inputs())


def test_perf_metrics_and_reasons_on_request(server) -> None:
    url = f"{server.http_url}/v2/models/tensorrt_llm/generate"
    status, body = post(
        url, {"text_input": "a", "sampling_param_return_perf_metrics": True, "return_stop_reason": True,
              "return_cumulative_logprob": True, "return_finish_reason": True},
    )  # fmt: skip
    answer = json.loads(body)
    assert status == 200 and answer["finish_reason"] == "length" and answer["stop_reason"] == "None"
    assert (answer["kv_cache_reused_block"], answer["kv_cache_hit_rate"], answer["last_token_time_ns"]) == (1, 0.25, 4)


# --- cancels ------------------------------------------------------------------------------------------------------


def blocks_used(server) -> float:
    return metric(server, "puzzle_kv_blocks_used") or 0


def test_closing_a_stream_frees_its_cache(server) -> None:
    settle(server, GenerationRequest(prompt="hang"))

    async def scenario():
        async with TritonLlmClient(server.grpc_url) as client:
            chunks = client.stream(GenerationRequest(prompt="hang:4 " + "x" * 93))
            async for _ in chunks:
                break
            await asyncio.to_thread(wait_until, lambda: blocks_used(server) >= 7, what="100 tokens hold 7 blocks of 16")
            await chunks.aclose()

    cancelled = metric(server, 'puzzle_requests_total{end="cancelled"}') or 0
    run(scenario())
    wait_until(lambda: blocks_used(server) == 0, what="the blocks are free again")
    wait_until(
        lambda: metric(server, 'puzzle_requests_total{end="cancelled"}') == cancelled + 1, what="counted as cancelled"
    )


def test_a_client_that_disappears_makes_room_for_the_next(server) -> None:
    """All places are taken and one more is refused, until a client goes: no request would ever end."""
    wait_until(lambda: blocks_used(server) == 0, what="no blocks in use")
    cancelled = metric(server, 'puzzle_requests_total{end="cancelled"}') or 0

    async def scenario() -> str:
        async with TritonLlmClient(server.grpc_url) as client:
            request = GenerationRequest(prompt="hang:1 ")
            streams = [client.stream(request) for _ in range(MAX_OPEN)]
            for stream in streams:
                await anext(stream)
            with pytest.raises(ServeError, match="the queue is full"):
                await client.generate(GenerationRequest(prompt="y", max_tokens=1))
            await streams[0].aclose()
            while True:
                try:
                    text = (await client.generate(GenerationRequest(prompt="y", max_tokens=1))).text
                    break
                except ServeError as error:
                    assert error.status == "UNAVAILABLE"
                    await asyncio.sleep(0.005)
            await asyncio.to_thread(
                wait_until, lambda: metric(server, "puzzle_requests_running") == MAX_OPEN - 1, what="the others go on"
            )
            for stream in streams[1:]:
                await stream.aclose()
            return text

    assert run(scenario()) == "y"
    wait_until(
        lambda: metric(server, 'puzzle_requests_total{end="cancelled"}') == cancelled + MAX_OPEN, what="all cancelled"
    )
    wait_until(lambda: blocks_used(server) == 0, what="the blocks are free again")


def test_stop_with_the_same_id_cancels_and_says_so(server) -> None:
    async def scenario():
        async with TritonLlmClient(server.grpc_url) as client:
            other = asyncio.create_task(client.generate(GenerationRequest(prompt="other ", max_tokens=100)))
            chunks = client.stream(GenerationRequest(prompt="hang:3 ", request_id="mine"))
            with pytest.raises(ServeError, match="request 'mine' was stopped") as error:
                words = None
                async for _ in chunks:
                    words = words or await client.stop("mine")
            return error.value.status, words, (await other).text

    status, words, other = run(scenario())
    assert (status, other) == ("CANCELLED", echo("other ", 100))
    assert words.endswith("stopped 1 running request(s) with id 'mine'")
    wait_until(lambda: blocks_used(server) == 0, what="the blocks are free again")


# --- bad input ----------------------------------------------------------------------------------------------------


def message(*tensors: InferInput):
    """A request that no client of ours would build."""
    request = service_pb2.ModelInferRequest(model_name="tensorrt_llm")
    for tensor in tensors:
        request.inputs.append(tensor._get_tensor())
        request.raw_input_contents.append(tensor._get_content())
    return request


async def refusal(url: str, *tensors: InferInput) -> ServeError:
    """The error that answers these tensors."""

    async def once():
        yield message(*tensors)

    async with grpc.aio.insecure_channel(url) as channel:
        call = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(once())
        words = [response.error_message async for response in call]
    assert len(words) == 1 and words[0]
    return error_of_words(words[0], url=url)


BAD = {
    "wrong dtype": (inputs(streaming=("INT32", 1)), "streaming"),
    "no text_input": (inputs(streaming=("BOOL", True))[1:], "text_input"),
    "bad sampling value": (inputs(sampling_param_temperature=("FP32", -1.0)), "sampling_param_temperature: impossible"),
    "lora": (inputs(lora_id=("UINT64", 3)), "lora_id: LoRA adapters are not supported"),
    "image": (inputs(image_url=("BYTES", [b"http://x"])), "image_url: this input is not supported"),
    "unknown input": (inputs(sampling_param_beams=("INT32", 3)), "sampling_param_beams"),
    "wrong shape": (inputs(sampling_param_top_k=("INT32", [1, 2])), "sampling_param_top_k"),
    "prompt too long, as text": (inputs("x" * MAX_SEQ_LEN), f"{MAX_SEQ_LEN} tokens"),
    "prompt too long, as ids": (inputs("", input_ids=("INT32", [1] * MAX_SEQ_LEN)), "input_ids: the prompt is too"),
    "token out of vocabulary": (inputs("", input_ids=("INT32", [1, 10**6])), "input_ids: no such token (found 1000000"),
}  # fmt: skip


def test_malformed_requests_are_refused_by_name_and_disturb_nobody(server) -> None:
    async def scenario():
        async with TritonLlmClient(server.grpc_url) as client:
            parts: list[str] = []

            async def read() -> None:
                request = GenerationRequest(prompt="steady ", max_tokens=100_000, request_id="steady")
                async for chunk in client.stream(request):
                    parts.append(chunk.text)

            running = asyncio.create_task(read())
            refusals = {name: await refusal(server.grpc_url, *tensors) for name, (tensors, _) in BAD.items()}
            so_far = len(parts)
            while len(parts) == so_far and not running.done():
                await asyncio.sleep(0.01)
            await client.stop("steady")
            with pytest.raises(ServeError, match="was stopped"):  # the refusals came while it ran
                await running
            return refusals, "".join(parts)

    refusals, text = run(scenario())
    assert text == echo("steady ", len(text))
    for name, (_, words) in BAD.items():
        error = refusals[name]
        assert error.status == "INVALID_ARGUMENT" and words in str(error), (name, str(error))


def test_a_request_that_fails_in_the_engine_fails_alone(server) -> None:
    async def scenario():
        async with TritonLlmClient(server.grpc_url) as client:
            running = asyncio.create_task(client.generate(GenerationRequest(prompt="steady ", max_tokens=100)))
            with pytest.raises(ServeError, match="scripted failure") as late:
                await client.generate(GenerationRequest(prompt="fail:3 x", max_tokens=50))
            with pytest.raises(ServeError, match="scripted failure") as early:
                await client.generate(GenerationRequest(prompt="fail:0 x", max_tokens=50))
            return late.value.status, early.value.status, (await running).text

    assert run(scenario()) == ("INTERNAL", "INVALID_ARGUMENT", echo("steady ", 100))


def test_a_full_queue_is_unavailable_at_once_and_only_while_it_is_full(server) -> None:
    async def scenario():
        async with TritonLlmClient(server.grpc_url) as client:
            hanging = [
                asyncio.create_task(client.generate(GenerationRequest(prompt="hang", max_tokens=5)))
                for _ in range(MAX_OPEN)
            ]
            await asyncio.to_thread(
                wait_until, lambda: metric(server, "puzzle_requests_waiting") == MAX_OPEN, what="a full table"
            )
            with pytest.raises(ServeError, match=f"the queue is full: {MAX_OPEN} requests") as error:
                await client.generate(GenerationRequest(prompt="one more", max_tokens=5))
            assert not any(task.done() for task in hanging)
            for task in hanging:
                task.cancel()
            await asyncio.gather(*hanging, return_exceptions=True)
            await asyncio.to_thread(
                wait_until, lambda: metric(server, "puzzle_requests_waiting") == 0, what="an empty table"
            )
            return error.value.status, (await client.generate(GenerationRequest(prompt="ok", max_tokens=2))).text

    assert run(scenario()) == ("UNAVAILABLE", "ok")


def test_metrics_count_what_was_generated(server) -> None:
    names = ("puzzle_prompt_tokens_total", "puzzle_output_tokens_total", 'puzzle_requests_total{end="ok"}')
    settle(server, GenerationRequest(prompt="hang"))
    before = [metric(server, name) or 0 for name in names]
    generate("12345", url=server.grpc_url, max_tokens=11)
    wait_until(
        lambda: [(metric(server, name) or 0) - b for name, b in zip(names, before, strict=True)] == [5, 11, 1],
        what="5 prompt tokens, 11 output tokens, 1 request",
    )
    assert metric(server, "puzzle_engine_up") == 1 and metric(server, "puzzle_kv_blocks_total") == 1000
