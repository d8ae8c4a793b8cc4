"""Clients of the served model: what to ask for (`request`) and how to ask it over gRPC (`triton_client`)."""
