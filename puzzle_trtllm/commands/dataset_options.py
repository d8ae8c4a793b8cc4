"""The options that say what to calibrate on, in one home: `calibrate experts` and `calibrate kv` take the same ones."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer

Command = Callable[..., None]


def takes_dataset(*, max_tokens: int) -> Callable[[Command], Command]:
    """Replace a command's parameter `data` (a DataOptions) by the options below; `max_tokens` is its default.

    They stand where `data` stood, so that `--help` lists them there.
    """

    def decorate(command: Command) -> Command:
        hints = get_type_hints(command, localns={"DataOptions": dict}, include_extras=True)
        shared = _options(max_tokens)
        parameters: list[inspect.Parameter] = []
        for name, parameter in inspect.signature(command).parameters.items():
            parameters += shared.values() if name == "data" else [parameter.replace(annotation=hints[name])]

        def run(**values: Any) -> None:
            options = {name: values.pop(name) for name in shared}
            command(**values, data=options | {"efforts": options["efforts"] or ()})

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _options(max_tokens: int) -> dict[str, inspect.Parameter]:
    """By keyword of `load_dataset`."""
    dataset = typer.Option(
        help="A .jsonl, .txt or .parquet file, a folder of data files, or a dataset's name on the Hugging Face hub; "
        "default: the checkpoint's own calibration.jsonl, else a few bundled conversations."
    )
    effort = typer.Option(
        "--effort",
        metavar="EFFORT ...",
        help="Reasoning efforts, in turn, for conversations that name none: --effort low medium high.",
    )
    column = typer.Option(help="Its column with messages, text or token ids; default: the one of that name.")
    pack = typer.Option("--pack", help="Fill rows of --sequence-length with several records.")
    length = typer.Option(
        min=1, help="Cut sequences at this many tokens; without it a longer one than fits is an error."
    )
    table: dict[str, tuple[Any, Any]] = {
        "dataset": (Annotated[str | None, dataset], None),
        "dataset_config": (Annotated[str | None, typer.Option(help="Config of a dataset on the hub.")], None),
        "split": (Annotated[str, typer.Option(help="Split of a dataset on the hub or in a folder.")], "train"),
        "column": (Annotated[str | None, column], None),
        "efforts": (Annotated[list[str] | None, effort], None),
        "max_samples": (Annotated[int, typer.Option(min=1, help="Records of the dataset at most.")], 512),
        "max_tokens": (Annotated[int, typer.Option(min=1, help="Tokens at most.")], max_tokens),
        "sequence_length": (Annotated[int | None, length], None),
        "pack": (Annotated[bool, pack], False),
        "seed": (Annotated[int, typer.Option(help="Which records are drawn.")], 0),
    }
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return {
        name: inspect.Parameter(name, kind, annotation=annotation, default=default)
        for name, (annotation, default) in table.items()
    }


def warn_if_bundled(is_bundled: bool) -> None:
    """One line on stderr, when nothing but our few conversations was calibrated on."""
    if is_bundled:
        from puzzle_trtllm.terminal import warn

        warn("calibrated on the bundled conversations, which are few; name your own traffic with --dataset")
