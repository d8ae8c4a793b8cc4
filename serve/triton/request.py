"""What a client asks for: the input tensors of one request, checked and turned into arguments of the LLM API.

Triton has already refused unknown tensors, wrong types and wrong dims; what is left are values, and misspelt names of
which HTTP generate made parameters, which would do nothing. Every refusal names the tensor, what was found and what was
expected, and is answered INVALID_ARGUMENT before the engine hears of the request: a bad request must never disturb
those that run (a token id outside the vocabulary would kill a GPU engine).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from puzzle_trtllm.serve.triton.contract import INPUTS, INPUTS_BY_NAME, SAMPLING_PREFIX

Inputs = Mapping[str, npt.NDArray[Any]]
"""The tensors of a request by name; STRING tensors hold bytes objects."""

MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 1024
"""Characters. Every step looks for all of a request's stop strings, while all other requests wait."""

_TEXT_ALWAYS_READ = 1 << 20
_CHARACTERS_A_TOKEN = 32
"""More than any text has on average, of those that are anything but runs of one character."""

_SAMPLING_NAMES = tuple(spec.name for spec in INPUTS if spec.name.startswith(SAMPLING_PREFIX))

_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "best_of": (lambda value: value == 1, "1 (one continuation a request)"),
    "temperature": (lambda value: 0 <= value < math.inf, "a finite number, at least 0"),
    "top_k": (lambda value: value >= 0, "at least 0 (0 means all)"),
    "top_p": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "frequency_penalty": (math.isfinite, "a finite number"),
    "presence_penalty": (math.isfinite, "a finite number"),
    "max_tokens": (lambda value: value >= 1, "at least 1"),
    "min_tokens": (lambda value: value >= 0, "at least 0"),
    "exclude_input_from_output": (bool, "True (an answer never repeats its prompt)"),
}


class RequestRefusedError(Exception):
    """The request cannot be served as it stands; the message is for the client, INVALID_ARGUMENT."""

    def __init__(self, tensor: str, message: str, *, found: object = None, expected: str | None = None) -> None:
        details = [f"found {found}"] if found is not None else []
        details += [f"expected {expected}"] if expected is not None else []
        super().__init__(f"{tensor}: {message}" + (f" ({', '.join(details)})" if details else ""))


@dataclass(frozen=True, kw_only=True)
class ReplyFormat:
    """What the responses hold."""

    streaming: bool = False
    delta: bool = False
    """Only what is new since the last response, instead of everything so far."""
    output_ids: bool = False
    finish_reason: bool = False
    stop_reason: bool = False
    cumulative_logprob: bool = False
    stop: tuple[str, ...] = ()
    """Text that might become one of these is held back until it is known."""


@dataclass(frozen=True, kw_only=True)
class GenerateCall:
    """A checked request, in the LLM API's terms."""

    prompt: str | list[int]
    sampling: dict[str, Any]
    """Keyword arguments of SamplingParams; absent where the client left the default."""
    reply: ReplyFormat


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """What the model can take."""

    streaming_allowed: bool = True
    vocab_size: int | None = None
    max_seq_len: int | None = None
    """Prompt and output together, tokens."""


def max_text_length(max_seq_len: int) -> int:
    """Characters of a prompt beyond which it is not even made tokens: 20 million took 100 s and 6 GB to be refused."""
    return max(_TEXT_ALWAYS_READ, _CHARACTERS_A_TOKEN * max_seq_len)


def is_stop(inputs: Inputs) -> bool:
    """Whether this request only cancels the running ones of the same id."""
    return _flag(inputs, "stop")


def parse_request(inputs: Inputs, limits: RequestLimits, parameters: Collection[str] = ()) -> GenerateCall:
    """Check `inputs` and translate them; `parameters` are the names of a request's. Raises RequestRefusedError."""
    _refuse_unsupported(inputs)
    _refuse_parameters(parameters)
    sampling = _sampling(inputs)
    reply = ReplyFormat(
        streaming=_flag(inputs, "streaming"),
        delta=_flag(inputs, "stream_delta"),
        output_ids=_flag(inputs, "return_output_ids"),
        finish_reason=_flag(inputs, "return_finish_reason"),
        stop_reason=_flag(inputs, "return_stop_reason"),
        cumulative_logprob=_flag(inputs, "return_cumulative_logprob"),
        stop=tuple(sampling.get("stop", ())),
    )
    if reply.streaming and not limits.streaming_allowed:
        raise RequestRefusedError(
            "streaming",
            "this model was started with decoupled: false",
            found=True,
            expected="false, or a decoupled model",
        )
    if reply.cumulative_logprob:
        sampling["logprobs"] = 1  # runtimes sum up only what they compute; 1 is what all of them take
    return GenerateCall(prompt=_prompt(inputs, limits), sampling=sampling, reply=reply)


def _refuse_unsupported(inputs: Inputs) -> None:
    for name in inputs:
        spec = INPUTS_BY_NAME.get(name)
        if spec is None or spec.unsupported:
            subject = "LoRA adapters are" if name.startswith("lora_") else "this input is"
            raise RequestRefusedError(name, f"{subject} not supported by this model", expected="a request without it")


def _refuse_parameters(parameters: Collection[str]) -> None:
    """Those that were meant as inputs: any other may be a header that the server hands on, or another tool's."""
    for name in parameters:
        tensor = next((known for known in (name, SAMPLING_PREFIX + name) if known in INPUTS_BY_NAME), None)
        if tensor or name.startswith(SAMPLING_PREFIX):
            expected = f"the input {tensor}" if tensor else "inputs of the model's metadata alone"
            raise RequestRefusedError(name, "a parameter, which would do nothing", expected=expected)


def _prompt(inputs: Inputs, limits: RequestLimits) -> str | list[int]:
    text = _text_input(inputs)
    token_ids = inputs.get("input_ids")
    if token_ids is None:
        if text == "":
            raise RequestRefusedError("text_input", "the prompt is empty", expected="text, or token ids in input_ids")
        _check_length(text, limits)
        return text
    if text != "":
        raise RequestRefusedError("input_ids", "given beside a text_input that is not empty", expected="one of the two")
    return _input_ids(token_ids, limits)


def _check_length(text: str, limits: RequestLimits) -> None:
    if limits.max_seq_len is not None and len(text) > (longest := max_text_length(limits.max_seq_len)):
        raise RequestRefusedError(
            "text_input",
            "the prompt is too long",
            found=f"{len(text)} characters",
            expected=f"at most {longest} (max_seq_len is {limits.max_seq_len})",
        )


def _text_input(inputs: Inputs) -> str:
    array = inputs.get("text_input")
    if array is None:
        raise RequestRefusedError("text_input", "missing", expected="one prompt")
    if array.ndim != 1 or array.size != 1:
        raise RequestRefusedError(
            "text_input", "one prompt a request", found=f"shape {list(array.shape)}", expected="shape [1]"
        )
    return _decode("text_input", array[0])


def _input_ids(array: npt.NDArray[Any], limits: RequestLimits) -> list[int]:
    if array.ndim != 1 or array.size == 0:
        raise RequestRefusedError(
            "input_ids", "no token ids", found=f"shape {list(array.shape)}", expected="at least 1"
        )
    if limits.max_seq_len is not None and array.size >= limits.max_seq_len:
        raise RequestRefusedError(
            "input_ids",
            "the prompt is too long",
            found=f"{array.size} tokens",
            expected=f"fewer than max_seq_len {limits.max_seq_len}",
        )
    worst = int(array.min()) if array.min() < 0 else int(array.max())
    if worst < 0 or (limits.vocab_size is not None and worst >= limits.vocab_size):
        upper = "" if limits.vocab_size is None else f" and below {limits.vocab_size}"
        raise RequestRefusedError("input_ids", "no such token", found=worst, expected=f"ids from 0{upper}")
    token_ids: list[int] = array.tolist()
    return token_ids


def _sampling(inputs: Inputs) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for tensor in _SAMPLING_NAMES:
        array = inputs.get(tensor)
        if array is None:
            continue
        name = tensor[len(SAMPLING_PREFIX) :]
        if name == "stop":
            arguments["stop"] = _stop_strings(tensor, array)
            continue
        value = _scalar(tensor, array)
        holds, expected = _RULES.get(name, (None, ""))
        if holds is not None and not holds(value):
            raise RequestRefusedError(tensor, "impossible value", found=value, expected=expected)
        arguments[name] = value
    return arguments


def _stop_strings(tensor: str, array: npt.NDArray[Any]) -> list[str]:
    if array.size > MAX_STOP_STRINGS:
        raise RequestRefusedError(
            tensor, "too many stop strings", found=array.size, expected=f"at most {MAX_STOP_STRINGS}"
        )
    words = [_decode(tensor, word) for word in array.reshape(-1)]
    if "" in words:
        raise RequestRefusedError(tensor, "an empty stop string", expected="text")
    longest = max(map(len, words), default=0)
    if longest > MAX_STOP_LENGTH:
        raise RequestRefusedError(
            tensor,
            "a stop string is too long",
            found=f"{longest} characters",
            expected=f"at most {MAX_STOP_LENGTH}",
        )
    return words


def _flag(inputs: Inputs, name: str) -> bool:
    array = inputs.get(name)
    return array is not None and bool(_scalar(name, array))


def _scalar(name: str, array: npt.NDArray[Any]) -> Any:
    if array.size != 1:
        raise RequestRefusedError(name, "one value", found=f"shape {list(array.shape)}", expected="shape [1]")
    return array.item()


def _decode(name: str, value: bytes | str | np.bytes_) -> str:
    if isinstance(value, str):
        return value
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestRefusedError(name, "not valid UTF-8", found=f"byte {error.start}", expected="UTF-8 text") from None
