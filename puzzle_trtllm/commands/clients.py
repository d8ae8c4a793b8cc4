"""`generate`, `evaluate`: what talks to a running server, and the options of all that do."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from puzzle_trtllm.commands.output import JsonOption, print_json, print_table
from puzzle_trtllm.errors import ConfigError, PuzzleError

if TYPE_CHECKING:
    from puzzle_trtllm.chat import ChatTokenizer
    from puzzle_trtllm.serve.client.request import GenerationRequest, GenerationResult
    from puzzle_trtllm.serve.client.triton_client import TritonLlmClient
    from puzzle_trtllm.serve.metrics.result_file import ResultFile
    from puzzle_trtllm.serve.openai.answers import AnswerStream

UrlOption = Annotated[str, typer.Option("--url", help="host:port of the server's gRPC endpoint.")]
EngineOption = Annotated[
    Path | None, typer.Option("--engine", help="The engine folder behind the URL: its tokenizer, and provenance.")
]
TokenizerOption = Annotated[
    Path | None, typer.Option("--tokenizer", help="Checkpoint folder whose tokenizer and chat template to use.")
]
NameOption = Annotated[str | None, typer.Option("--name", help="What to call the server in results.")]
CaCertOption = Annotated[
    Path | None, typer.Option("--ca-cert", help="Speak TLS; believe servers whose certificate this CA signed (PEM).")
]
ClientCertOption = Annotated[
    Path | None, typer.Option("--client-cert", help="Certificate to show to a server with mutual TLS (PEM).")
]
ClientKeyOption = Annotated[Path | None, typer.Option("--client-key", help="Its key (PEM).")]
SecretOption = Annotated[
    Path | None, typer.Option("--secret", help="File with the secret of a server that restricts inference.")
]
OutOption = Annotated[Path | None, typer.Option("--out", help="Result file to write, for `report`.")]
DEFAULT_URL = "localhost:8001"


def generate_command(
    prompt: Annotated[
        str, typer.Argument(help="The prompt; with --tokenizer it is the user's turn of a chat.", metavar="PROMPT")
    ],
    url: UrlOption = DEFAULT_URL,
    tokenizer: TokenizerOption = None,
    effort: Annotated[str | None, typer.Option("--effort", help="low, medium or high; with --tokenizer.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="To generate, at most.")] = 256,
    temperature: Annotated[float | None, typer.Option(help="Sample at this temperature; 0 is greedy.")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="Sample from the so many likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", help="Sample from the likeliest tokens that have this share together.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Equal seeds draw equal tokens. Default: a new one each time.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="Stop string; may be given several times.")
    ] = None,
    ca_cert: CaCertOption = None,
    client_cert: ClientCertOption = None,
    client_key: ClientKeyOption = None,
    secret: SecretOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continue a prompt on a running server.

    The text is printed as it streams in; in a chat only the answer goes to stdout, the reasoning before it to stderr
    (a server without token ids, NVIDIA's own model, tells them not apart: both go to stdout).
    Ctrl-C cancels the generation on the server too.
    """
    from puzzle_trtllm.serve.client.request import GenerationRequest

    text, input_ids, chat = prompt, None, None
    if tokenizer is not None:
        from puzzle_trtllm.chat import ChatTokenizer

        chat = ChatTokenizer.from_folder(tokenizer)
        text = chat.render_chat([{"role": "user", "content": prompt}], reasoning_effort=effort)
        input_ids = chat.encode(text)
    elif effort is not None:
        raise PuzzleError("needs --tokenizer, whose chat template it goes into", key="--effort")
    request = GenerationRequest(
        prompt=text if input_ids is None else None,
        input_ids=input_ids,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop or None,
    )
    connection = connector(ca_cert, client_cert, client_key, secret)(url)
    if as_json:
        print_json(result_json(asyncio.run(generate_answer(connection, request, text))))
    else:
        asyncio.run(stream_answer(connection, request, text, chat))


def connector(
    ca_cert: Path | None, client_cert: Path | None, client_key: Path | None, secret: Path | None
) -> Callable[[str], TritonLlmClient]:
    """url -> our client; it speaks TLS as soon as one of the files is given."""
    from puzzle_trtllm.serve.client.secret import read_secret
    from puzzle_trtllm.serve.client.tls import ClientTls
    from puzzle_trtllm.serve.client.triton_client import TritonLlmClient

    tls = None
    if ca_cert or client_cert or client_key:
        tls = ClientTls(ca_cert=ca_cert, client_cert=client_cert, client_key=client_key)
    return partial(TritonLlmClient, tls=tls, secret=None if secret is None else read_secret(secret))


async def generate_answer(connection: TritonLlmClient, request: GenerationRequest, text: str) -> GenerationResult:
    """The whole answer; `text` is the prompt, for a server that takes no token ids."""
    async with connection as client:
        return await client.generate(_readable(request, text, client))


def _readable(request: GenerationRequest, text: str, client: TritonLlmClient) -> GenerationRequest:
    """As text to a server that takes no token ids (a stock llmapi model); `evaluate` does so too."""
    return request if client.gives_token_ids else replace(request, prompt=text, input_ids=None)


async def stream_answer(
    connection: TritonLlmClient, request: GenerationRequest, text: str, chat: ChatTokenizer | None
) -> None:
    """Print the answer as it comes, and how it ended; `text` as above."""
    from puzzle_trtllm.harmony import speaks_harmony
    from puzzle_trtllm.serve.openai.answers import AnswerStream

    async with connection as client:
        request = _readable(request, text, client)
        harmony = None
        if chat is not None and client.gives_token_ids and speaks_harmony(chat.tokenizer):
            harmony = chat.tokenizer
        own = request if harmony is None else replace(request, stop=None)
        answer = AnswerStream(client, own, harmony=harmony, stops=request.stop or ())
        await show_answer(answer)
    num_tokens = f"{answer.usage.completion_tokens} tokens, " if client.gives_token_ids else ""
    _write(f"{num_tokens}finish reason: {answer.finish_reason}\n", sys.stderr)


async def show_answer(answer: AnswerStream) -> None:
    """Print it as it comes: the reasoning on stderr, the rest on stdout."""
    reasons = False
    async with aclosing(answer.parts()) as parts:
        async for part in parts:
            _write(part.reasoning, sys.stderr)
            reasons = reasons or bool(part.reasoning)
            if part.content and reasons:
                print("\n", file=sys.stderr, flush=True)
                reasons = False
            _write(part.content, sys.stdout)
    if reasons:
        print(file=sys.stderr, flush=True)
    print()


def _write(text: str, stream: TextIO | None) -> None:
    """A pipe or a file gets what the model said, a terminal nothing that it would obey, who has closed it nothing."""
    from puzzle_trtllm.terminal import visible

    print(visible(text) if stream is not None and stream.isatty() else text, end="", file=stream, flush=True)


def result_json(result: GenerationResult) -> dict[str, object]:
    """What `generate --json` says: the text, its tokens, and times in ms from the moment of sending."""
    return {
        "text": result.text,
        "token_ids": result.token_ids,
        "num_output_tokens": result.num_output_tokens,
        "finish_reason": result.finish_reason,
        "ttft_ms": (result.first_token_ns - result.sent_ns) / 1e6,
        "e2e_ms": (result.end_ns - result.sent_ns) / 1e6,
    }


def evaluate_command(
    problems: Annotated[Path, typer.Option("--problems", help="Problem set, .jsonl with prompt and answer.")],
    url: UrlOption = DEFAULT_URL,
    engine: EngineOption = None,
    tokenizer: TokenizerOption = None,
    effort: Annotated[
        list[str] | None,
        typer.Option("--effort", metavar="EFFORT ...", help="Some of low, medium, high (default: all)."),
    ] = None,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="Problems in flight.")] = 16,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="For reasoning and answer.")] = 4096,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0, help="Sample at this temperature; 0 is greedy.")
    ] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Of what is sampled from; with --temperature.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Equal seeds draw equal answers.")] = 0,
    grader: Annotated[str, typer.Option("--grader", help="exact, numeric or regex.")] = "numeric",
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first so many problems.")] = None,
    prompt_key: Annotated[str, typer.Option("--prompt-key", help="What the file calls a prompt.")] = "prompt",
    answer_key: Annotated[str, typer.Option("--answer-key", help="What the file calls an answer.")] = "answer",
    name: NameOption = None,
    ca_cert: CaCertOption = None,
    client_cert: ClientCertOption = None,
    client_key: ClientKeyOption = None,
    secret: SecretOption = None,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure accuracy at each reasoning effort.

    Every problem at every effort through the server; accuracy and mean tokens per request. Greedy, unless a temperature
    is given (gpt-oss is published at 1). Interrupted, the same command with the same --out goes on at the first effort
    that is missing there.
    """
    from puzzle_trtllm.chat import REASONING_EFFORTS
    from puzzle_trtllm.folders import check_writable
    from puzzle_trtllm.serve.evaluate.result import Decoding
    from puzzle_trtllm.serve.evaluate.runner import UnfinishedEvaluationError, evaluate
    from puzzle_trtllm.yaml_files import as_model

    if out is not None:
        check_writable(out)
    folder = tokenizer or (engine / "model" if engine is not None else None)
    if folder is None:
        raise PuzzleError("missing: prompts need a chat template", key="--tokenizer", expected="it or --engine")
    sampling = {"temperature": temperature, "top_p": top_p, "seed": seed}
    decoding = as_model(sampling, Decoding, "decoding", ConfigError)
    try:
        result = evaluate(
            url,
            problems=problems,
            tokenizer_folder=folder,
            efforts=tuple(effort or REASONING_EFFORTS),
            decoding=decoding,
            concurrency=concurrency,
            max_tokens=max_tokens,
            grader=grader,
            limit=limit,
            prompt_key=prompt_key,
            answer_key=answer_key,
            engine=engine,
            name=name,
            out=out,
            connect=connector(ca_cert, client_cert, client_key, secret),
        )
    except UnfinishedEvaluationError as error:
        show_result(error.finished, out, as_json=as_json)
        raise
    show_result(result, out, as_json=as_json)


def show_result(result: ResultFile, out: Path | None, *, as_json: bool) -> None:
    """On stdout first: a disk that filled up in the meantime does not take the numbers with it."""
    if as_json:
        print_json(result.model_dump(mode="json"))
    else:
        print_table(result)
    if out is not None:
        result.save(out)
        print(f"written to {out}", file=sys.stderr)
