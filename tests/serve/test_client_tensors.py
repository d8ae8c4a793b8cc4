"""Our hand-made tensors, held against tritonclient's own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import InferInput
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor

from puzzle_trtllm.errors import ServeError
from puzzle_trtllm.serve.client.request import GenerationRequest
from puzzle_trtllm.serve.client.tensors import RequestBuilder, pack_strings, unpack_int32, unpack_string
from puzzle_trtllm.serve.triton.contract import EXTRA_INPUTS, INPUTS, INPUTS_BY_NAME

ALL = [spec.name for spec in INPUTS]
STOCK = [name for name in ALL if name not in EXTRA_INPUTS]
NUMPY = {"BOOL": bool, "INT32": np.int32, "UINT64": np.uint64, "FP32": np.float32, "BYTES": object}


@given(st.lists(st.text(max_size=20), min_size=1, max_size=5))
def test_strings_are_packed_as_tritonclient_does(values: list[str]) -> None:
    array = np.array([value.encode() for value in values], dtype=object)
    assert pack_strings(values) == serialize_byte_tensor(array).item()
    assert unpack_string(pack_strings(values)) == values[0]


@given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=8))
def test_integers_are_unpacked_as_numpy_does(values: list[int]) -> None:
    assert unpack_int32(np.array(values, dtype="<i4").tobytes()) == values


def test_an_empty_tensor_is_an_empty_text() -> None:
    assert unpack_string(b"") == ""


def refusal(**fields) -> str:
    """The words in which a request of these fields is refused as INVALID_ARGUMENT."""
    with pytest.raises(ServeError) as error:
        RequestBuilder("tensorrt_llm", ALL).build(GenerationRequest(**fields))
    assert error.value.status == "INVALID_ARGUMENT"
    return str(error.value)


def decoded(message) -> dict[str, list]:
    """Inputs of a request, read with tritonclient's and numpy's means; types and shapes checked on the way."""
    found = {}
    for tensor, data in zip(message.inputs, message.raw_input_contents, strict=True):
        spec = INPUTS_BY_NAME[tensor.name]
        assert tensor.datatype == spec.dtype.replace("STRING", "BYTES")
        assert len(tensor.shape) == 1 and (spec.dims != (1,) or tensor.shape[0] == 1)
        if tensor.datatype == "BYTES":
            values = [value.decode() for value in deserialize_bytes_tensor(data)]
        else:
            values = np.frombuffer(data, dtype=NUMPY[tensor.datatype]).tolist()
        assert len(values) == tensor.shape[0]
        found[tensor.name] = values
    return found


EVERYTHING = GenerationRequest(
    prompt="2+2=", max_tokens=7, temperature=0.5, top_k=3, top_p=0.25, seed=2**64 - 1, stop=["a", "bc"],
    ignore_eos=True, min_tokens=2, streaming=True, request_id="one",
)  # fmt: skip


def test_every_field_reaches_its_tensor() -> None:
    message = RequestBuilder("tensorrt_llm", ALL).build(EVERYTHING)
    assert (message.model_name, message.id) == ("tensorrt_llm", "one")
    assert decoded(message) == {
        "text_input": ["2+2="], "streaming": [True], "stream_delta": [True], "return_output_ids": [True],
        "return_finish_reason": [True], "sampling_param_max_tokens": [7], "sampling_param_temperature": [0.5],
        "sampling_param_top_k": [3], "sampling_param_top_p": [0.25], "sampling_param_seed": [2**64 - 1],
        "sampling_param_stop": ["a", "bc"], "sampling_param_ignore_eos": [True], "sampling_param_min_tokens": [2],
        "sampling_param_exclude_input_from_output": [True],
    }  # fmt: skip


def test_the_bytes_are_those_of_tritonclient() -> None:
    message = RequestBuilder("tensorrt_llm", ALL).build(EVERYTHING)
    for tensor, data in zip(message.inputs, message.raw_input_contents, strict=True):
        theirs = InferInput(tensor.name, list(tensor.shape), tensor.datatype)
        values = decoded(message)[tensor.name]
        values = [value.encode() for value in values] if tensor.datatype == "BYTES" else values
        theirs.set_data_from_numpy(np.array(values, dtype=NUMPY[tensor.datatype]))
        assert theirs._get_content() == data, tensor.name


def test_what_is_not_asked_for_is_left_to_the_server() -> None:
    found = decoded(RequestBuilder("tensorrt_llm", ALL).build(GenerationRequest(input_ids=[1, 2], streaming=False)))
    assert found == {
        "text_input": [""], "input_ids": [1, 2], "streaming": [False], "stream_delta": [True],
        "return_output_ids": [True], "return_finish_reason": [True],
        "sampling_param_exclude_input_from_output": [True],
    }  # fmt: skip


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("knows", [True, False])
def test_a_stock_server_is_told_not_to_repeat_the_prompt(streaming: bool, knows: bool) -> None:
    """Unasked, NVIDIA's model puts it before an answer that does not stream."""
    name = "sampling_param_exclude_input_from_output"
    builder = RequestBuilder("tensorrt_llm", [each for each in STOCK if knows or each != name])
    found = decoded(builder.build(GenerationRequest(prompt="a", streaming=streaming)))
    assert found.get(name) == ([True] if knows else None)


def test_a_stock_server_gets_no_extras() -> None:
    builder = RequestBuilder("tensorrt_llm", STOCK)
    found = decoded(builder.build(GenerationRequest(prompt="a", max_tokens=3)))
    assert not set(found) & EXTRA_INPUTS and found["sampling_param_max_tokens"] == [3]
    assert not builder.gives_token_ids and not builder.streams_delta


@pytest.mark.parametrize(
    ("fields", "tensor"),
    [
        ({"input_ids": [1]}, "input_ids"),
        ({"prompt": "a", "ignore_eos": True}, "sampling_param_ignore_eos"),
        ({"prompt": "a", "min_tokens": 3}, "sampling_param_min_tokens"),
    ],
)
def test_an_extra_that_a_stock_server_would_miss_is_an_error(fields, tensor: str) -> None:
    with pytest.raises(ServeError, match=f"{tensor}: this server's model has no such input") as error:
        RequestBuilder("tensorrt_llm", STOCK).build(GenerationRequest(**fields))
    assert error.value.status == "INVALID_ARGUMENT"


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_tokens", 2**31), ("max_tokens", 1.5), ("min_tokens", 2**40), ("top_k", 2**40), ("seed", -1), ("seed", 2**64),
     ("temperature", 1e39), ("temperature", 10**400), ("top_p", -1e39)],
)  # fmt: skip
def test_a_number_that_its_tensor_cannot_hold(field: str, value: float) -> None:
    assert f"sampling_param_{field}: out of range" in refusal(prompt="a", **{field: value})


@pytest.mark.parametrize("value", [2**31, 1.5, "1"])
def test_token_ids_that_are_no_32_bit_integers(value) -> None:
    assert "input_ids: not 32-bit integers" in refusal(input_ids=[1, value])


@pytest.mark.parametrize("text", ["half a pair: \ud800", 3])
@pytest.mark.parametrize("field", ["prompt", "stop", "request_id"])
def test_text_that_utf8_cannot_carry(field: str, text) -> None:
    found = refusal(**{"prompt": "a", field: [text] if field == "stop" else text})
    assert found.endswith(": not text that UTF-8 can carry")


def test_a_stop_of_an_id_that_utf8_cannot_carry() -> None:
    with pytest.raises(ServeError, match="request_id: not text") as error:
        RequestBuilder("tensorrt_llm", ALL).build_stop("\ud800")
    assert error.value.status == "INVALID_ARGUMENT"


@pytest.mark.parametrize("fields", [{}, {"prompt": "a", "input_ids": [1]}])
def test_a_request_has_one_prompt(fields) -> None:
    with pytest.raises(ServeError, match="exactly one of prompt and input_ids"):
        GenerationRequest(**fields)
