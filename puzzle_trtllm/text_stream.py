"""The text of token ids as they come, without decoding it again from the start."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

MAX_HELD = 32
"""Tokens without a whole character at their end that are kept, and decoded again with every further one."""


class TextStream:
    """A character is held back until its last byte's token has come."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._held: list[int] = []
        """Tokens whose text has not been given."""

    def feed(self, token_id: int) -> str:
        """The text that is certain now and was not before."""
        text = self._stream.step(self._tokenizer, token_id)
        if text is not None:
            self._held.clear()
            return text
        self._held.append(token_id)
        return self._let_go() if len(self._held) > MAX_HELD else ""

    def rest(self) -> str:
        """The text held back: bytes that never became a character show as U+FFFD."""
        return self._decode(self._held)

    def _let_go(self) -> str:
        """No character is as long as that: they are tokens without text (skipped ones), bytes that are no UTF-8, or
        spell U+FFFD. Give what later tokens cannot change: up to where both sides decode as they do together."""
        held = [token_id for token_id in self._held if self._decode([token_id])]
        whole = self._decode(held)
        splits = range(len(held) - 1, 0, -1)
        cut = next((at for at in splits if self._decode(held[:at]) + self._decode(held[at:]) == whole), 0)
        self._stream, self._held = DecodeStream(skip_special_tokens=self._skip_special), held[cut:]
        for token_id in self._held:
            self._stream.step(self._tokenizer, token_id)
        return self._decode(held[:cut])

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special)
