"""Triton's Python objects, in one place. Only importable inside Triton's stub, which provides the module."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import triton_python_backend_utils as pb_utils

from puzzle_trtllm.serve.triton.outbox import Status
from puzzle_trtllm.serve.triton.request import Inputs
from puzzle_trtllm.serve.triton.response import Tensor


class TritonEncoder:
    """The `Encoder` of real responses."""

    FINAL: int = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL

    def response(self, tensors: list[Tensor]) -> Any:
        return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor(name, array) for name, array in tensors])

    def error(self, status: Status, message: str) -> Any:
        """The status twice: as the code, and before the text, since over a gRPC stream only the text arrives.

        (The header `triton_grpc_error: true` would bring the code, but Triton before spring 2026 can crash when an
        error ends such a stream: https://github.com/triton-inference-server/server/pull/8708.)
        """
        code = {
            "UNAVAILABLE": pb_utils.TritonError.UNAVAILABLE,
            "INVALID_ARGUMENT": pb_utils.TritonError.INVALID_ARG,
            "CANCELLED": pb_utils.TritonError.CANCELLED,
            "INTERNAL": pb_utils.TritonError.INTERNAL,
        }[status]
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"{status}: {message}", code))


def read_inputs(request: Any) -> Inputs:
    """The tensors of an InferenceRequest by name."""
    return {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}


def read_parameters(request: Any) -> Mapping[str, Any]:
    """What came beside the tensors; HTTP generate makes a parameter of every key that names no tensor."""
    parameters: Mapping[str, Any] = json.loads(request.parameters())
    return parameters


def log_info(message: str) -> None:
    pb_utils.Logger.log_info(f"[puzzle-trtllm] {message}")
