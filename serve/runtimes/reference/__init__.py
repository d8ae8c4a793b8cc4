"""Our runtime: TensorRT-LLM's LLM API over PyTorch, in an engine process of its own. Importing it imports no torch."""

from puzzle_trtllm.serve.runtimes.api import (
    EngineDeadError,
    GenerationError,
    KvCacheConfig,
    RequestError,
    SamplingParams,
)
from puzzle_trtllm.serve.runtimes.reference.llm import LLM

__all__ = ["LLM", "EngineDeadError", "GenerationError", "KvCacheConfig", "RequestError", "SamplingParams"]
