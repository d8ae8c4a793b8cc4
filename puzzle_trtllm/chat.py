"""Text to tokens and chat to text, without importing transformers.

A checkpoint folder brings `tokenizer.json` and a chat template (`chat_template.jinja`, or `chat_template` inside
tokenizer_config.json). Both are read here with the libraries that transformers itself uses underneath (tokenizers,
jinja2), so that clients and the Triton stub start in a fraction of a second; a test holds the result to
`AutoTokenizer.apply_chat_template`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, meta
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from puzzle_trtllm.errors import CheckpointError

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
            raise CheckpointError("missing", file=file)
        try:
            tokenizer = Tokenizer.from_file(str(file))
            config_file = folder / "tokenizer_config.json"
            config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
        except Exception as error:  # tokenizers raises bare Exception
            raise CheckpointError(f"cannot be read: {error}", file=file) from None
        return cls(folder=folder, tokenizer=tokenizer, config=config)

    @property
    def vocab_size(self) -> int:
        return int(self.tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def largest_id(self) -> int:
        """Ids may have gaps, so it says more than `vocab_size` about the embedding that is needed; -1 if empty."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    @property
    def has_template(self) -> bool:
        return (self.folder / "chat_template.jinja").is_file() or isinstance(self.config.get("chat_template"), str)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` as it stands: special tokens in it are recognised, none are added.

        As a batch of one, for which tokenizers lets go of the GIL, and without offsets, which nobody reads.
        """
        return list(self.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids)

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
        try:
            return self._template.render(**arguments)
        except TemplateError as error:
            raise CheckpointError(f"the chat template refuses this conversation: {error}", file=self.folder) from None

    def template_takes(self, name: str) -> bool:
        """Whether the chat template reads a variable, `reasoning_effort` say. Raises CheckpointError without one."""
        return name in meta.find_undeclared_variables(_environment().parse(self._template_source))

    @cached_property
    def _template_source(self) -> str:
        file = self.folder / "chat_template.jinja"
        source = file.read_text(encoding="utf-8") if file.is_file() else self.config.get("chat_template")
        if not isinstance(source, str):
            raise CheckpointError("missing", file=file, expected="a chat template")
        return source

    @cached_property
    def _template(self) -> Template:
        return _environment().from_string(self._template_source)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = _raise_template_error
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment


def _raise_template_error(message: str) -> None:
    raise TemplateError(message)
