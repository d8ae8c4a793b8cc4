"""Stage `serve`: the runtimes, Triton, clients, load generation, metrics and the report."""
