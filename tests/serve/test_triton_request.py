"""From input tensors to the LLM API's arguments: what is accepted, and how a refusal reads."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from puzzle_trtllm.serve.runtimes.api import SamplingParams
from puzzle_trtllm.serve.triton.contract import INPUTS
from puzzle_trtllm.serve.triton.request import (
    ReplyFormat,
    RequestLimits,
    RequestRefusedError,
    is_stop,
    parse_request,
)

LIMITS = RequestLimits(vocab_size=100, max_seq_len=32)
NUMPY = {"BOOL": bool, "INT32": np.int32, "UINT64": np.uint64, "FP32": np.float32, "STRING": object}
DTYPES = {spec.name: NUMPY[spec.dtype] for spec in INPUTS}


def tensors(text: str | bytes = "hi", **values):
    inputs = {"text_input": np.array([text.encode() if isinstance(text, str) else text], dtype=object)}
    for name, value in values.items():
        inputs[name] = np.array(value if isinstance(value, list) else [value], dtype=DTYPES[name])
    return inputs


def test_the_defaults_are_the_runtimes() -> None:
    call = parse_request(tensors("a prompt"), LIMITS)
    assert (call.prompt, call.sampling, call.reply) == ("a prompt", {}, ReplyFormat())


def test_every_sampling_parameter_reaches_its_argument() -> None:
    given_ = {
        "best_of": 1, "temperature": 0.5, "top_k": 3, "top_p": 0.25, "frequency_penalty": 0.125,
        "presence_penalty": -0.5, "max_tokens": 7, "min_tokens": 2, "seed": 2**63, "ignore_eos": True,
        "exclude_input_from_output": True, "return_perf_metrics": True, "stop": [b"ab", "\u00e9".encode()],
    }  # fmt: skip
    call = parse_request(tensors(**{f"sampling_param_{name}": value for name, value in given_.items()}), LIMITS)
    assert call.sampling == {**given_, "stop": ["ab", "\u00e9"]}
    assert call.reply.stop == ("ab", "\u00e9")
    parameters = SamplingParams(**call.sampling)
    assert all(getattr(parameters, name) == value for name, value in call.sampling.items())


def test_the_limits_themselves_are_allowed() -> None:
    limits = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "max_tokens": 1, "min_tokens": 0}
    call = parse_request(tensors(**{f"sampling_param_{name}": value for name, value in limits.items()}), LIMITS)
    assert call.sampling == limits


def test_every_sampling_tensor_of_the_contract_is_known_to_sampling_params() -> None:
    names = {spec.name.removeprefix("sampling_param_") for spec in INPUTS if spec.name.startswith("sampling_param_")}
    assert names <= set(SamplingParams.__dataclass_fields__)


@pytest.mark.parametrize("max_seq_len", [32, 1 << 17])
def test_a_text_far_beyond_the_context_is_refused_before_it_becomes_tokens(max_seq_len: int) -> None:
    limits = RequestLimits(max_seq_len=max_seq_len)
    longest = max(1 << 20, 32 * max_seq_len)
    assert parse_request(tensors("a" * longest), limits).prompt == "a" * longest
    with pytest.raises(RequestRefusedError, match=rf"text_input: the prompt is too long \(found {longest + 1} char"):
        parse_request(tensors("a" * (longest + 1)), limits)


def test_as_many_stop_strings_as_allowed() -> None:
    stops = ["\u00e9" * 1024] * 64
    assert (
        parse_request(tensors(sampling_param_stop=[stop.encode() for stop in stops]), LIMITS).sampling["stop"] == stops
    )


def test_the_reply_is_what_was_asked_for() -> None:
    call = parse_request(
        tensors(streaming=True, stream_delta=True, return_output_ids=True, return_finish_reason=False,
                return_stop_reason=True, return_cumulative_logprob=True), LIMITS,
    )  # fmt: skip
    assert call.reply == ReplyFormat(
        streaming=True, delta=True, output_ids=True, finish_reason=False, stop_reason=True, cumulative_logprob=True
    )


def test_a_cumulative_logprob_has_the_runtime_compute_logprobs() -> None:
    assert parse_request(tensors(return_cumulative_logprob=True), LIMITS).sampling == {"logprobs": 1}


def test_token_ids_replace_an_empty_text() -> None:
    assert parse_request(tensors("", input_ids=[5, 99, 0]), LIMITS).prompt == [5, 99, 0]


def test_where_no_limit_is_known_any_length_and_any_token_pass() -> None:
    assert parse_request(tensors("", input_ids=[10**6] * 64), RequestLimits()).prompt == [10**6] * 64
    assert parse_request(tensors("a" * (1 << 21)), RequestLimits()).prompt == "a" * (1 << 21)


def test_stop_is_recognised() -> None:
    assert is_stop(tensors(stop=True))
    assert not is_stop(tensors(stop=False)) and not is_stop(tensors())


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "text_input: missing (expected one prompt)"),
        ({"text_input": np.array([b"a", b"b"], dtype=object)}, "text_input: one prompt a request (found shape [2]"),
        ({"text_input": np.array([[b"a"]], dtype=object)}, "text_input: one prompt a request (found shape [1, 1]"),
        (tensors(b"\xff"), "text_input: not valid UTF-8 (found byte 0"),
        (tensors(""), "text_input: the prompt is empty"),
        (tensors("a", input_ids=[1]), "input_ids: given beside a text_input that is not empty"),
        (tensors("", input_ids=[]), "input_ids: no token ids (found shape [0]"),
        (tensors("", input_ids=[[1, 2]]), "input_ids: no token ids (found shape [1, 2]"),
        (tensors("", input_ids=[1] * 32), "input_ids: the prompt is too long (found 32 tokens"),
        (tensors("", input_ids=[0, 100]), "input_ids: no such token (found 100, expected ids from 0 and below 100)"),
        (tensors("", input_ids=[-1]), "input_ids: no such token (found -1"),
        (tensors(sampling_param_temperature=-0.5), "sampling_param_temperature: impossible value (found -0.5"),
        (tensors(sampling_param_temperature=float("nan")), "sampling_param_temperature: impossible value (found nan"),
        (tensors(sampling_param_temperature=float("inf")), "sampling_param_temperature: impossible value (found inf"),
        (tensors(sampling_param_top_p=0.0), "sampling_param_top_p: impossible value (found 0.0, expected above 0"),
        (tensors(sampling_param_top_p=1.5), "sampling_param_top_p: impossible value (found 1.5"),
        (
            tensors(sampling_param_exclude_input_from_output=False),
            "sampling_param_exclude_input_from_output: impossible value (found False, expected True",
        ),
        (tensors(sampling_param_top_k=-1), "sampling_param_top_k: impossible value (found -1"),
        (tensors(sampling_param_max_tokens=0), "sampling_param_max_tokens: impossible value (found 0"),
        (tensors(sampling_param_min_tokens=-1), "sampling_param_min_tokens: impossible value (found -1"),
        (tensors(sampling_param_best_of=2), "sampling_param_best_of: impossible value (found 2, expected 1"),
        (tensors(sampling_param_presence_penalty=float("inf")), "sampling_param_presence_penalty: impossible value"),
        (tensors(sampling_param_stop=[b""]), "sampling_param_stop: an empty stop string"),
        (
            tensors(sampling_param_stop=[b"a"] * 65),
            "sampling_param_stop: too many stop strings (found 65, expected at mo",
        ),
        (
            tensors(sampling_param_stop=[b"a", b"a" * 1025]),
            "sampling_param_stop: a stop string is too long (found 1025",
        ),
        (tensors(sampling_param_max_tokens=[1, 2]), "sampling_param_max_tokens: one value (found shape [2]"),
        (tensors(image_url=[b"http://x"]), "image_url: this input is not supported by this model"),
        (tensors(lora_id=1), "lora_id: LoRA adapters are not supported by this model"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_refusal_names_tensor_found_and_expected(inputs, message: str) -> None:
    with pytest.raises(RequestRefusedError, match=re.escape(message)) as refusal:
        parse_request(inputs, LIMITS)
    assert "\n" not in str(refusal.value) and "expected" in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("max_tokens", "the input sampling_param_max_tokens"),
        ("sampling_param_max_tokens", "the input sampling_param_max_tokens"),
        ("stop", "the input stop"),
        ("sampling_param_max_token", "inputs of the model's metadata alone"),
    ],
)
def test_a_parameter_that_was_meant_as_an_input_is_refused(name: str, expected: str) -> None:
    with pytest.raises(
        RequestRefusedError, match=f"^{name}: a parameter, which would do nothing .*expected {expected}"
    ):
        parse_request(tensors(), LIMITS, {name: 5})
    assert parse_request(tensors(), LIMITS, {"id": "7", "traceparent": "00-1"}).sampling == {}


def test_streaming_needs_a_decoupled_model() -> None:
    with pytest.raises(RequestRefusedError, match=r"^streaming: .*decoupled"):
        parse_request(tensors(streaming=True), RequestLimits(streaming_allowed=False))


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=40))
def test_token_ids_pass_exactly_when_all_lie_in_the_vocabulary_and_fit(token_ids: list[int]) -> None:
    fits = all(0 <= token_id < 100 for token_id in token_ids) and len(token_ids) < 32
    try:
        assert parse_request(tensors("", input_ids=token_ids), LIMITS).prompt == token_ids
        assert fits
    except RequestRefusedError as refusal:
        assert not fits and str(refusal).startswith("input_ids: ")
