"""The engine behind Triton Inference Server: the model's tensor contract, its repository, its logic, the server."""
