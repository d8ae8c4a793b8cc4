"""What executes an engine: `tensorrt_llm` on NVIDIA GPUs, `reference` (ours, PyTorch) everywhere."""
