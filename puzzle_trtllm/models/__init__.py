"""The child three ways: for transformers (`huggingface`), for our own runtime (`reference`), for TensorRT-LLM."""
