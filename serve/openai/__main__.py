"""`python -m puzzle_trtllm.serve.openai ENGINE --grpc-url HOST:PORT ...`: the front alone, before any running server.

`puzzle-trtllm serve ENGINE --openai-port PORT` starts it beside the server that it starts; this is for a front on
another machine or of another number of processes.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from puzzle_trtllm.engine import Engine
from puzzle_trtllm.errors import PuzzleError


def main() -> int:
    """Serve until SIGTERM or SIGINT. Exit code 2 and one line for the user's error."""
    parser = argparse.ArgumentParser(prog="python -m puzzle_trtllm.serve.openai", description=__doc__)
    parser.add_argument("engine", help="engine folder: its tokenizer, chat template and limits")
    parser.add_argument("--grpc-url", required=True, help="host:port of Triton's gRPC endpoint")
    parser.add_argument("--metrics-url", help="Triton's metrics, for /metrics and for /health: is the engine up?")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=9000, help="default 9000")
    parser.add_argument("--model", help="name of the model; default: the engine folder's")
    parser.add_argument("--secret", type=Path, help="file with the API key, which is also sent to Triton")
    options = parser.parse_args()
    try:
        _serve(options)
    except PuzzleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _serve(options: argparse.Namespace) -> None:
    import uvicorn

    from puzzle_trtllm.serve.client.secret import read_secret
    from puzzle_trtllm.serve.client.triton_client import TritonLlmClient
    from puzzle_trtllm.serve.openai.app import check_server, make_app
    from puzzle_trtllm.serve.openai.model_card import ModelCard
    from puzzle_trtllm.serve.triton.ports import choose_ports
    from puzzle_trtllm.serve.triton.probe import metrics_text, read_metrics, values_of

    def is_healthy() -> bool:
        if options.metrics_url is None:
            return True
        metrics = read_metrics(options.metrics_url)
        return metrics is not None and 0 not in values_of(metrics, "puzzle_engine_up")

    def metrics() -> str | None:
        return None if options.metrics_url is None else metrics_text(options.metrics_url)

    secret = None if options.secret is None else read_secret(options.secret)
    card = ModelCard.of_engine(Engine.open(options.engine), options.model)
    client = TritonLlmClient(options.grpc_url, secret=secret)
    choose_ports(options.host, {"OpenAI": options.port})
    asyncio.run(check_server(client))
    app = make_app(card, client, api_key=secret, is_healthy=is_healthy, metrics=metrics)
    uvicorn.run(
        app, host=options.host, port=options.port, log_level="warning", access_log=False, timeout_graceful_shutdown=3
    )


if __name__ == "__main__":
    sys.exit(main())
