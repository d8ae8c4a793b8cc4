"""What `doctor` finds out: about this machine (machine.py), or about a checkout of TensorRT-LLM (source.py)."""
