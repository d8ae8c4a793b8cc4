"""What all commands share: how errors end, `--debug`, and options that take several values.

Exit codes: 0 done, 2 the user's error (one line on stderr, no traceback unless `--debug`), 1 ours (a traceback, and
please report it), 130 interrupted. A missing optional package is the user's error too: the line names the extra that
brings it.
"""

from __future__ import annotations

import errno
import importlib.util
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from puzzle_trtllm.errors import PuzzleError

USER_ERROR, INTERRUPTED = 2, 130

EXTRA_OF_PACKAGE: Mapping[str, str] = {
    "torch": "reference",
    "transformers": "reference",
    "safetensors": "reference",
    "modelopt": "calibrate",
    "datasets": "calibrate",
    "pyarrow": "calibrate",
    "accelerate": "calibrate",
    "tritonclient": "serve",
    "grpc": "serve",
    "google": "serve",
    "fastapi": "serve",
    "uvicorn": "serve",
    "pytriton": "triton-wheel",
    "tensorrt_llm": "trtllm",
}
"""Import name of an optional package: the extra in pyproject.toml that installs it."""

SEVERAL_VALUES: Mapping[str, re.Pattern[str]] = {
    "--seq-len": re.compile(r"\d+"),
    "--effort": re.compile(r"low|medium|high"),
    "--baseline": re.compile(r"[^-=][^=]*=.+"),
}
"""Options that may be followed by several values, and what a value looks like."""

ORDER = (
    "inspect",
    "plan",
    "calibrate",
    "derive",
    "verify",
    "build",
    "repository",
    "serve",
    "generate",
    "bench",
    "evaluate",
    "report",
    "doctor",
    "demo",
)
"""Commands as `--help` lists them: in the order in which a child is made."""

_MACHINE_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EFBIG,
    errno.EIO,
    errno.ESTALE,
    errno.EMFILE,
    errno.ENFILE,
)
"""What a disk or a limit of the machine says."""


class PuzzleGroup(TyperGroup):
    """The root command."""

    def list_commands(self, ctx: Any) -> list[str]:
        """In the order of ORDER."""
        return sorted(super().list_commands(ctx), key=ORDER.index)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take `--debug` wherever it stands, and give every value of a list its option."""
        end = args.index("--") if "--" in args else len(args)
        ctx.meta["puzzle_trtllm.debug"] = "--debug" in args[:end]
        ours = [arg for arg in args[:end] if arg != "--debug"]
        return list(super().parse_args(ctx, [*repeat_options(ours), *args[end:]]))

    def invoke(self, ctx: Any) -> Any:
        """Run the command; the user's errors become one line and exit code 2."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            line = explain(error)
            if line is None:
                raise
            if ctx.meta["puzzle_trtllm.debug"]:
                traceback.print_exc()
            from puzzle_trtllm.terminal import visible

            print(f"error: {visible(line)}", file=sys.stderr)
            raise typer.Exit(USER_ERROR) from None


class PuzzleCommand(TyperCommand):
    """Every command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse empty values: as a path, what a shell makes of an unset variable would be the current folder."""
        values, _, parameters = self.make_parser(ctx).parse_args(list(args))
        for parameter in parameters:
            value = values[parameter.name]
            if "" in (value if isinstance(value, list | tuple) else (value,)):
                is_option = parameter.param_type_name == "option"
                key = parameter.opts[0] if is_option else parameter.metavar or parameter.name.upper()
                raise PuzzleError("is empty: is it a shell variable that is not set?", key=key)
        return list(super().parse_args(ctx, args))


def explain(error: Exception) -> str | None:
    """The one line for an error that the user can mend; None for one that is ours."""
    if isinstance(error, PuzzleError):
        return " ".join(line.strip() for line in str(error).splitlines())
    if isinstance(error, ModuleNotFoundError) and error.name:
        extra = EXTRA_OF_PACKAGE.get(error.name.partition(".")[0])
        return extra and f"the package {error.name} is not installed: {_how_to_install(extra)}"
    nowhere = isinstance(error, FileNotFoundError) and not error.filename  # no temporary folder, or no working folder
    if isinstance(error, OSError) and (nowhere or error.errno in _MACHINE_ERRORS):
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return None


def _how_to_install(extra: str) -> str:
    """Beside TensorRT-LLM these two extras would replace packages of its own."""
    if extra in ("serve", "calibrate") and importlib.util.find_spec("tensorrt_llm") is not None:
        there = "as docs/deploy.md says" if extra == "serve" else "in an environment without TensorRT-LLM"
        return f"install it {there} (the extra {extra} would replace packages of TensorRT-LLM's)"
    return f"pip install 'puzzle-trtllm[{extra}]'"


def repeat_options(args: Sequence[str]) -> Iterator[str]:
    """`--seq-len 1 2` as `--seq-len 1 --seq-len 2`, for the options in SEVERAL_VALUES."""
    option, first = "", False
    for arg in args:
        if arg in SEVERAL_VALUES:
            option, first = arg, True
        elif first:
            first = False
        elif option and SEVERAL_VALUES[option].fullmatch(arg):
            yield option
        else:
            option = ""
        yield arg
