"""Harmony, the format in which gpt-oss and its children answer: messages in channels, told apart by special tokens.

    <|channel|>analysis<|message|>3+7=10<|end|><|start|>assistant<|channel|>final<|message|>10<|return|>

A message has a header (role, channel, sometimes a recipient `to=functions.f` and a content type behind
`<|constrain|>`) and a body. What a model generates begins inside a header, because the prompt ends with
`<|start|>assistant`. Text that only looks like a special token is text: whoever has token ids must not go through text.

    HarmonyParser    the state machine, fed with special tokens and text in between; knows no tokenizer
    HarmonyDecoder   token ids, as they stream in -> pieces of messages
    split_messages   a whole text with its special tokens -> messages
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from puzzle_trtllm.text_stream import TextStream

START, END, MESSAGE, CHANNEL = "<|start|>", "<|end|>", "<|message|>", "<|channel|>"
RETURN, CALL, CONSTRAIN = "<|return|>", "<|call|>", "<|constrain|>"
ANALYSIS, FINAL = "analysis", "final"
_NEEDED = (START, END, MESSAGE, CHANNEL)
_SPECIAL_TOKEN = re.compile(r"(<\|[^|<>]*\|>)")
_RECIPIENT = re.compile(r"\bto=(\S+)")


@dataclass(frozen=True, kw_only=True)
class Header:
    """Where a message's body belongs. A message without a channel is an answer: `final`."""

    channel: str = FINAL
    recipient: str | None = None
    """Of a tool call: `functions.NAME`."""

    @classmethod
    def parse(cls, before_channel: str, after_channel: str | None) -> Header:
        """From the header's text before `<|channel|>` (a role) and after it (a channel); either may hold `to=`."""
        recipient = _RECIPIENT.search(f"{before_channel} {after_channel or ''}")
        words = (after_channel or "").split()
        return cls(
            channel=words[0] if words and not words[0].startswith("to=") else FINAL,
            recipient=recipient.group(1) if recipient else None,
        )


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Some of a message's body."""

    header: Header
    text: str
    begins: bool
    """True for the first piece of a message; its text may be empty."""


class HarmonyParser:
    """Feed it what was generated, in order; it starts inside the header of the assistant's first message."""

    def __init__(self) -> None:
        self._header_parts: list[str] = [""]
        """The header's text, one part more with every <|channel|> or <|constrain|>."""
        self._channel_part: int | None = None
        self.header: Header | None = None
        """Of the open message; None between messages and inside a header."""
        self.has_message = False

    def special(self, token: str) -> Piece | None:
        """A special token; gives a piece when it opens a message's body. Unknown ones change nothing."""
        if token == MESSAGE:
            return self._open()
        if token == START or (token in (END, RETURN, CALL) and self.header is not None):
            self._begin_header()
        elif token in (CHANNEL, CONSTRAIN):
            if self.header is not None:
                self._begin_header()
            if token == CHANNEL:
                self._channel_part = len(self._header_parts)
            self._header_parts.append("")
        return None

    def text(self, text: str) -> Piece | None:
        """Text between special tokens; inside a header it is kept there."""
        if self.header is None:
            self._header_parts[-1] += text
            return None
        return Piece(header=self.header, text=text, begins=False) if text else None

    @property
    def stray_text(self) -> str:
        """Text of a generation that never opened a message: a model that does not speak harmony."""
        return "" if self.has_message or self._channel_part is not None else "".join(self._header_parts)

    def _begin_header(self) -> None:
        self.header, self._header_parts, self._channel_part = None, [""], None

    def _open(self) -> Piece:
        at = self._channel_part
        self.header = Header.parse(self._header_parts[0], None if at is None else self._header_parts[at])
        self.has_message = True
        return Piece(header=self.header, text="", begins=True)


class HarmonyDecoder:
    """Token ids of one generation -> pieces; a character is held back until its last byte's token has come."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = special_tokens(tokenizer)
        self._parser = HarmonyParser()
        self._stream = TextStream(tokenizer, skip_special_tokens=False)
        self.analysis_tokens = 0
        """Tokens in the bodies of analysis messages so far."""

    def feed(self, token_ids: Iterable[int]) -> Iterator[Piece]:
        """The pieces that `token_ids` bring."""
        for token_id in token_ids:
            token = self._special.get(token_id)
            if token is not None:
                yield from self._flush()
                opened = self._parser.special(token)
                if opened is not None:
                    yield opened
                continue
            header = self._parser.header
            self.analysis_tokens += header is not None and header.channel == ANALYSIS
            yield from _some(self._parser.text(self._stream.feed(token_id)))

    def finish(self) -> Iterator[Piece]:
        """What was held back; and all the text, as an answer, of a generation without a single message."""
        yield from self._flush()
        if self._parser.stray_text:
            yield Piece(header=Header(), text=self._parser.stray_text, begins=True)

    def _flush(self) -> Iterator[Piece]:
        """The rest of the text since the last special token: bytes that never became a character show as U+FFFD."""
        yield from _some(self._parser.text(self._stream.rest()))
        self._stream = TextStream(self._tokenizer, skip_special_tokens=False)


def speaks_harmony(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer has harmony's tokens."""
    return all(tokenizer.token_to_id(token) is not None for token in _NEEDED)


def special_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """Id -> content of a tokenizer's special tokens."""
    added = tokenizer.get_added_tokens_decoder()
    return {token_id: token.content for token_id, token in added.items() if token.special}


def split_messages(text: str) -> list[tuple[Header, str]]:
    """The messages of a text that holds its special tokens; the last one may be cut."""
    parser = HarmonyParser()
    parts = enumerate(_SPECIAL_TOKEN.split(text))
    pieces = (parser.special(part) if index % 2 else parser.text(part) for index, part in parts)
    return join_pieces(piece for piece in pieces if piece is not None)


def join_pieces(pieces: Iterable[Piece]) -> list[tuple[Header, str]]:
    """Whole messages from their pieces."""
    messages: list[tuple[Header, list[str]]] = []
    for piece in pieces:
        if piece.begins:
            messages.append((piece.header, []))
        messages[-1][1].append(piece.text)
    return [(header, "".join(parts)) for header, parts in messages]


def _some(piece: Piece | None) -> Sequence[Piece]:
    return () if piece is None else (piece,)
