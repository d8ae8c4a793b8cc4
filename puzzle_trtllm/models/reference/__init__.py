"""The gpt-oss (child) forward pass over a paged KV cache, in plain PyTorch: the numerical truth of this project."""
