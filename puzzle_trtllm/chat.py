"""Text to tokens and chat to text, without importing transformers.

A checkpoint folder brings `tokenizer.json` and a chat template (`chat_template.jinja`, or `chat_template` inside
tokenizer_config.json). Both are read here with the libraries that transformers itself uses underneath (tokenizers,
jinja2), so that clients and the Triton stub start in a fraction of a second; a test holds the result to
`AutoTokenizer.apply_chat_template`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Template, TemplateError, TemplateSyntaxError, meta
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from puzzle_trtllm.errors import CheckpointError, PuzzleError

Parsed = TypeVar("Parsed")

REASONING_EFFORTS = ("low", "medium", "high")


@dataclass(frozen=True, kw_only=True)
class ChatTokenizer:
    """A checkpoint's tokenizer and chat template."""

    folder: Path
    tokenizer: Tokenizer
    config: Mapping[str, Any]

    @classmethod
    def from_folder(cls, folder: str | Path) -> ChatTokenizer:
        """Raises CheckpointError when the folder has no readable tokenizer."""
        folder = Path(folder)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError("missing", file=file, expected="a checkpoint folder, such as an engine's model/")
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises bare Exception
            raise CheckpointError(f"cannot be read: {error}", file=file) from None
        return cls(folder=folder, tokenizer=tokenizer, config=_read_config(folder / "tokenizer_config.json"))

    @property
    def largest_id(self) -> int:
        """Ids may have gaps, so it says more than their number about the embedding that is needed; -1 if empty."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    @property
    def has_template(self) -> bool:
        return (self.folder / "chat_template.jinja").is_file() or isinstance(self.config.get("chat_template"), str)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises CheckpointError for tokens that the model does not have."""
        if self.largest_id >= vocab_size:
            raise CheckpointError(
                "has tokens outside the model's vocabulary (another model's tokenizer?)",
                file=self.folder / "tokenizer.json",
                found=f"token id {self.largest_id}",
                expected=f"below {vocab_size}",
            )

    def check_template(self) -> None:
        """Raises CheckpointError for a chat template that is none; what it does with a conversation is not known."""
        if self.has_template:
            _ = self._template

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` as it stands: special tokens in it are recognised, none are added.

        As a batch of one, for which tokenizers lets go of the GIL, and without offsets, which nobody reads.
        Raises PuzzleError for half a surrogate pair, which JSON can say (`"\\ud800"`) but UTF-8 cannot, and for a text
        that its regular expression gives up on: gpt-oss's does on ten million times the same letter.
        """
        try:
            return list(self.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids)
        except TypeError:
            raise PuzzleError("not text that UTF-8 can hold (half a surrogate pair?)") from None
        except BaseException as error:  # a panic in Rust is no Exception, and would end the task of who awaits this
            if type(error).__name__ != "PanicException":
                raise
            raise PuzzleError(f"the tokenizer cannot read this text: {error}") from None

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        reasoning_effort: str | None = None,
        add_generation_prompt: bool = True,
        now: datetime | None = None,
    ) -> str:
        """The prompt text of a conversation; templates that print the date print that of `now` (None: today).

        Raises CheckpointError when there is no template or it refuses.
        """
        arguments: dict[str, Any] = {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
        if now is not None:
            arguments["strftime_now"] = now.strftime
        if reasoning_effort is not None:
            arguments["reasoning_effort"] = reasoning_effort
        for name in ("bos_token", "eos_token", "pad_token"):
            token = self.config.get(name)
            arguments[name] = token.get("content") if isinstance(token, dict) else (token or "")
        template = self._template
        try:
            return template.render(**arguments)
        except Exception as error:  # a template is a program: whatever it does with odd values
            raise CheckpointError(f"the chat template refuses this conversation: {error}", file=self.folder) from None

    def template_takes(self, name: str) -> bool:
        """Whether the chat template reads a variable, `reasoning_effort` say. Raises CheckpointError without one."""
        return name in self._parsed(lambda source: meta.find_undeclared_variables(_environment().parse(source)))

    @cached_property
    def _template_source(self) -> str:
        file = self.folder / "chat_template.jinja"
        try:
            source = file.read_text(encoding="utf-8") if file.is_file() else self.config.get("chat_template")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"cannot be read: {error}", file=file) from None
        if not isinstance(source, str):
            raise CheckpointError("missing", file=file, expected="a chat template")
        return source

    def _parsed(self, parse: Callable[[str], Parsed]) -> Parsed:
        try:
            return parse(self._template_source)
        except TemplateSyntaxError as error:
            place = f"chat template, line {error.lineno}"
            raise CheckpointError(f"not a template: {error.message}", file=self.folder, key=place) from None

    @cached_property
    def _template(self) -> Template:
        return self._parsed(_environment().from_string)


def _read_config(file: Path) -> Mapping[str, Any]:
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot be read: {error}", file=file) from None
    if not isinstance(config, dict):
        raise CheckpointError("unknown form", file=file, found=type(config).__name__, expected="an object")
    return config


class _Generation(Extension):
    """`{% generation %}`, with which templates mark for training what the assistant says; here it is mere text."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_template_error
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: jinja2's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_template_error(message: str) -> None:
    raise TemplateError(message)
