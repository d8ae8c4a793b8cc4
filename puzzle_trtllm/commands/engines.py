"""`build`, `repository`, `serve`: from a checkpoint to an engine folder, and from an engine to a Triton server."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from puzzle_trtllm.commands.output import (
    JsonOption,
    OverwriteOption,
    facts_table,
    print_json,
    print_table,
    quoted,
    show_bytes,
)
from puzzle_trtllm.errors import PuzzleError
from puzzle_trtllm.models.trtllm.upstream import Line

if TYPE_CHECKING:
    from rich.table import Table

    from puzzle_trtllm.engine import Engine
    from puzzle_trtllm.serve.openai.process import OpenAiFront
    from puzzle_trtllm.serve.triton.security import GrpcTls
    from puzzle_trtllm.serve.triton.server import TritonServer


GpuDeviceIdsOption = Annotated[
    str | None,
    typer.Option("--gpu-device-ids", help='Several instances, each on its own GPUs: "0,1;2,3" makes two.'),
]
MaxOpenRequestsOption = Annotated[
    int | None,
    typer.Option(
        "--max-open-requests",
        min=1,
        help="Waiting and running, of an instance; one more is refused (default: twice what runs at once, or 1024).",
    ),
]
StepTimeoutOption = Annotated[
    float,
    typer.Option(
        "--step-timeout",
        min=0,
        help="Seconds without a step of the engine, while requests are open, until it counts as dead; 0: never.",
    ),
]


def build_command(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="Checkpoint folder or hub id; with --explain a config.json is enough.", metavar="CHECKPOINT"
        ),
    ],
    config: Annotated[str, typer.Option("--config", help="Engine config: a YAML file or a shipped name.")],
    out: Annotated[
        Path | None, typer.Argument(help="Folder of the engine, to be made; not with --explain.", metavar="OUT")
    ] = None,
    fold: Annotated[
        Literal["tensor", "channel", "none"] | None,
        typer.Option("--fold", help="How KV scales go into the weights (default: as the config says)."),
    ] = None,
    allow_unit_scale: Annotated[
        bool, typer.Option("--allow-unit-scale", help="Accept an FP8 KV cache at scale 1, with --fold none.")
    ] = False,
    target: Annotated[
        Line | None,
        typer.Option("--target", help="TensorRT-LLM line, as `doctor` tells it (default: as the config says)."),
    ] = None,
    only_explain: Annotated[
        bool, typer.Option("--explain", help="Only show the LLM arguments that would be written, and why.")
    ] = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Build an engine folder from a checkpoint.

    It holds the serving copy of the checkpoint, with its KV scales folded in, and the arguments to load it.
    """
    if only_explain:
        options: dict[str, Any] = {"fold": fold, "allow_unit_scale": allow_unit_scale, "target": target}
        _explain(checkpoint, config, options, as_json=as_json)
        return
    if out is None:
        raise PuzzleError("missing", key="OUT", expected="the engine's folder; only --explain goes without")
    from puzzle_trtllm.build.engine_build import build_engine

    engine = build_engine(
        checkpoint,
        out,
        config=config,
        fold=fold,
        allow_unit_scale=allow_unit_scale,
        target=target,
        overwrite=overwrite,
        quiet=False,
    )
    if as_json:
        print_json(engine_json(engine))
    else:
        print_table(engine_table(engine))


def _explain(checkpoint: str, config: str, options: Mapping[str, Any], *, as_json: bool) -> None:
    from puzzle_trtllm.build.derived_values import to_nested
    from puzzle_trtllm.build.engine_build import explain

    values = explain(checkpoint, config=config, **options, quiet=False)
    if as_json:
        print_json({"llm_args": to_nested(values), "reasons": {key: reason for key, _, reason in values}})
        return
    from rich.table import Table

    table = Table(title=f"{checkpoint} with {config}", title_justify="left")
    for column in ("argument", "value", "because"):
        table.add_column(column, overflow="fold")
    for key, value, reason in values:
        table.add_row(key, str(value), reason)
    print_table(table)


def engine_json(engine: Engine) -> dict[str, Any]:
    """What `build --json` says of an engine."""
    manifest = engine.manifest
    return {
        "path": str(engine.path),
        "runtime": manifest.runtime,
        "kv_dtype": manifest.kv_dtype,
        "kv_fold": manifest.kv_fold.mode,
        "weight_bytes": manifest.weight_bytes,
        "memory_bytes": manifest.memory_bytes,
        "llm_args": engine.llm_args,
    }


def engine_table(engine: Engine) -> Table:
    """What `build` prints of an engine."""
    manifest = engine.manifest
    cap = "what the GPU has" if manifest.runtime == "tensorrt_llm" else "no cap"
    limit = cap if manifest.memory_bytes is None else show_bytes(manifest.memory_bytes)
    limits = [f"{key} {engine.llm_args[key]}" for key in ("max_batch_size", "max_seq_len") if key in engine.llm_args]
    return facts_table(
        "engine",
        [
            ("folder", str(engine.path)),
            ("runtime", manifest.runtime),
            ("weights", show_bytes(manifest.weight_bytes)),
            ("KV cache", f"{manifest.kv_dtype}, scales folded per {manifest.kv_fold.mode}")
            if manifest.kv_fold.mode != "none"
            else ("KV cache", manifest.kv_dtype),
            ("memory for both", limit),
            ("limits", ", ".join(limits)),
            ("next", f"puzzle-trtllm serve {quoted(engine.path)}"),
        ],
    )


def repository_command(
    engine: Annotated[Path, typer.Argument(help="Engine folder, as `build` makes it.", metavar="ENGINE")],
    out: Annotated[Path, typer.Argument(help="Model repository, new or with other models.", metavar="OUT")],
    gpu_device_ids: GpuDeviceIdsOption = None,
    max_open_requests: MaxOpenRequestsOption = None,
    step_timeout_s: StepTimeoutOption = 600,
    decoupled: Annotated[
        bool, typer.Option("--decoupled/--no-decoupled", help="Streams; without, plain ModelInfer of one response.")
    ] = True,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write an engine as the model tensorrt_llm of a Triton model repository, for a tritonserver of your own.

    It holds no weights: its model.yaml names the engine's folder. `serve` makes one for itself.
    """
    from puzzle_trtllm.engine import Engine
    from puzzle_trtllm.folders import check_not_source
    from puzzle_trtllm.serve.triton.contract import MODEL_NAME
    from puzzle_trtllm.serve.triton.repository import write_repository

    check_not_source(out / MODEL_NAME, source=engine)
    folder = write_repository(
        Engine.open(engine),
        out,
        decoupled=decoupled,
        max_open_requests=max_open_requests,
        step_timeout_s=step_timeout_s,
        gpu_device_ids=gpu_device_ids,
        overwrite=overwrite,
    )
    if as_json:
        print_json({"path": str(folder), "model": MODEL_NAME})
    else:
        steps = [("folder", str(folder)), ("model", MODEL_NAME), ("next", f"tritonserver --model-repository {folder}")]
        print_table(facts_table("model repository", steps))


def serve_command(
    engine: Annotated[Path, typer.Argument(help="Engine folder, as `build` makes it.", metavar="ENGINE")],
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    grpc_port: Annotated[int, typer.Option("--grpc-port", min=0, max=65535, help="0: a free one.")] = 8001,
    http_port: Annotated[int, typer.Option("--http-port", min=0, max=65535, help="0: a free one.")] = 8000,
    metrics_port: Annotated[int, typer.Option("--metrics-port", min=0, max=65535, help="0: a free one.")] = 8002,
    restart: Annotated[bool, typer.Option("--restart", help="Start again when the engine dies.")] = False,
    gpu_device_ids: GpuDeviceIdsOption = None,
    max_open_requests: MaxOpenRequestsOption = None,
    engine_cores: Annotated[
        str | None,
        typer.Option("--engine-cores", help="CPU cores for the engine alone, as 1 or 4-7; the server has the others."),
    ] = None,
    grpc_cert: Annotated[
        Path | None,
        typer.Option("--grpc-cert", help="gRPC speaks TLS with this certificate (PEM); HTTP only on loopback."),
    ] = None,
    grpc_key: Annotated[Path | None, typer.Option("--grpc-key", help="Its key (PEM).")] = None,
    grpc_root_cert: Annotated[
        Path | None, typer.Option("--grpc-root-cert", help="Mutual TLS: only clients with a certificate of this CA.")
    ] = None,
    restricted: Annotated[
        str | None,
        typer.Option("--restricted", help="Protocols only for callers with the secret, such as model-repository."),
    ] = None,
    secret: Annotated[
        Path | None, typer.Option("--secret", help="File with that secret; callers send it as header puzzle-secret.")
    ] = None,
    openai_port: Annotated[
        int | None,
        typer.Option("--openai-port", min=0, max=65535, help="OpenAI's HTTP API too, at this port; 0: a free one."),
    ] = None,
    openai_model: Annotated[
        str | None, typer.Option("--openai-model", help="What its clients call the model (default: the folder's name).")
    ] = None,
    startup_timeout_s: Annotated[
        float, typer.Option("--startup-timeout", min=1, help="Seconds until the model must be ready.")
    ] = 1800,
    step_timeout_s: StepTimeoutOption = 600,
    as_json: JsonOption = False,
) -> None:
    """Serve an engine through Triton until Ctrl-C.

    With --json the URLs and the process id are printed once the model is ready.
    """
    from puzzle_trtllm.cores import parse_cores
    from puzzle_trtllm.serve.triton.security import restriction_of_options, tls_of_files
    from puzzle_trtllm.serve.triton.server import serve_engine

    tls = tls_of_files(grpc_cert, grpc_key, grpc_root_cert)
    restriction = restriction_of_options(restricted, secret)
    taken = {"--grpc-port": grpc_port, "--http-port": http_port, "--metrics-port": metrics_port}
    front = _openai_front(openai_port, openai_model, host, secret, taken=taken, has_tls=tls is not None)

    def on_ready(server: TritonServer) -> None:
        urls = {"grpc_url": server.grpc_url, "http_url": server.http_url, "metrics_url": server.metrics_url}
        urls |= {} if front is None else {"openai_url": front.url}
        # Whoever read this may have gone before a restart, on which rich would end the program.
        with contextlib.suppress(OSError, SystemExit):
            tell(server, urls)

    def tell(server: TritonServer, urls: Mapping[str, str]) -> None:
        if as_json:
            print_json({**urls, "pid": server.pid})
        else:
            steps = next_steps(server.engine, server.grpc_url, tls=tls, has_secret=restriction is not None)
            print_table(facts_table("ready; Ctrl-C stops", [*urls.items(), *steps]))

    code = serve_engine(
        engine,
        grpc_port=grpc_port,
        http_port=http_port,
        metrics_port=metrics_port,
        host=host,
        restart=restart,
        startup_timeout_s=startup_timeout_s,
        step_timeout_s=step_timeout_s,
        gpu_device_ids=gpu_device_ids,
        max_open_requests=max_open_requests,
        engine_cores=None if engine_cores is None else parse_cores(engine_cores, key="--engine-cores"),
        tls=tls,
        restriction=restriction,
        on_ready=on_ready,
        beside=front,
    )
    raise typer.Exit(code)


def next_steps(engine: Engine, url: str, *, tls: GrpcTls | None, has_secret: bool) -> list[tuple[str, str]]:
    """Commands for a server that is ready: one that tries it, and one that measures it under the engine's own load."""
    scenario = "NAME" if engine.scenario is None else quoted(engine.scenario)
    options = ""
    if tls is not None:
        options += " --ca-cert CA" if tls.root_cert is None else " --ca-cert CA --client-cert CERT --client-key KEY"
    if has_secret:
        options += " --secret FILE"
    return [
        ("try", f"puzzle-trtllm generate PROMPT --url {url} --tokenizer {quoted(engine.model_path)}{options}"),
        ("measure", f"puzzle-trtllm bench --url {url} --engine {quoted(engine.path)} --scenario {scenario}{options}"),
    ]


def _openai_front(
    port: int | None,
    model: str | None,
    host: str,
    secret: Path | None,
    *,
    taken: Mapping[str, int],
    has_tls: bool,
) -> OpenAiFront | None:
    if port is None:
        if model is not None:
            raise PuzzleError("needs --openai-port", key="--openai-model")
        return None
    for option, other in taken.items():
        if port == other != 0:
            raise PuzzleError(f"the same as {option}", key="--openai-port", found=port, expected="a port of its own")
    if has_tls:
        message = "not with --grpc-cert: it would speak plain HTTP, and has no certificate to show to Triton"
        raise PuzzleError(message, key="--openai-port", expected="a TLS proxy in front of it, or no --grpc-cert")
    import fastapi  # noqa: F401 (a missing package is told before the engine is loaded)
    import uvicorn  # noqa: F401

    from puzzle_trtllm.serve.openai.process import OpenAiFront

    return OpenAiFront(host=host, port=port, model=model, secret_file=secret)
