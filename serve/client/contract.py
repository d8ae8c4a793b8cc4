"""Whether a Triton model is one that our clients can talk to: NVIDIA's llmapi contract, ours included.

Names alone would not do: the older `tensorrt_llm` model of the C++ backend has the same model name with tensors of its
own, and what it refuses, it refuses request by request in words about tensors that the user never sent.
"""

from __future__ import annotations

from typing import Any

from puzzle_trtllm.errors import ServeError

NEEDED_INPUTS = {
    "text_input": "TYPE_STRING",
    "streaming": "TYPE_BOOL",
    "sampling_param_max_tokens": "TYPE_INT32",
    "return_finish_reason": "TYPE_BOOL",
}
NEEDED_OUTPUTS = {"text_output": "TYPE_STRING"}


def count_instances(config: Any) -> int:
    """How many engines the server runs, each instance being one; `config` is inference.ModelConfig."""
    # A group of kind GPU has `count` instances on each of its GPUs; those of kind CPU, as llmapi models are, name none.
    return sum(group.count * max(1, len(group.gpus)) for group in config.instance_group) or 1


def check_contract(config: Any, model: str, *, url: str) -> None:
    """`config` is inference.ModelConfig. Raises ServeError (INVALID_ARGUMENT) for the first thing that differs."""
    from tritonclient.grpc import model_config_pb2

    for kind, tensors, needed in (
        ("input", config.input, NEEDED_INPUTS),
        ("output", config.output, NEEDED_OUTPUTS),
    ):
        types = {tensor.name: model_config_pb2.DataType.Name(tensor.data_type) for tensor in tensors}
        for name, expected in needed.items():
            if types.get(name) != expected:
                found = types.get(name) or ", ".join(sorted(types)[:6]) or "no tensors"
                raise ServeError(
                    f"the server's model is not an llmapi model: {kind} {name}",
                    file=url,
                    key=model,
                    found=found,
                    expected=expected,
                    status="INVALID_ARGUMENT",
                )
    if not config.model_transaction_policy.decoupled:
        raise ServeError(
            "the server's model cannot stream",
            file=url,
            key=model,
            found="decoupled: false",
            expected="decoupled: true",
            status="INVALID_ARGUMENT",
        )
