"""What a model says is for reading: a terminal obeys none of it, and a pipe gets all of it."""

from __future__ import annotations

import asyncio
import io
import sys

import pytest

from puzzle_trtllm.commands.clients import show_answer
from puzzle_trtllm.serve.client.request import GenerationChunk, GenerationRequest
from puzzle_trtllm.serve.openai.answers import AnswerStream
from puzzle_trtllm.terminal import visible

SAID = "\x1b]52;c;cm0gLXJmIH4=\x07\tyes\n\x9b2J\r"
SHOWN = "\\x1b]52;c;cm0gLXJmIH4=\\x07\tyes\n\\x9b2J\\x0d"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Server:
    """Says SAID, whatever it is asked."""

    gives_token_ids = True

    async def stream(self, request: GenerationRequest):
        yield GenerationChunk(text=SAID, token_ids=[1], num_output_tokens=1, finish_reason="stop", received_ns=0)


def test_control_characters_are_spelt_out() -> None:
    assert visible(SAID) == SHOWN
    assert visible("caf\u00e9 \U0001f600\n\t") == "caf\u00e9 \U0001f600\n\t"


@pytest.mark.parametrize(("stream", "printed"), [(Terminal, SHOWN), (io.StringIO, SAID)])
def test_generate_sends_a_terminal_no_control_characters(
    stream: type[io.StringIO], printed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stdout = stream()
    monkeypatch.setattr(sys, "stdout", stdout)
    request = GenerationRequest(prompt="hello")
    asyncio.run(show_answer(AnswerStream(Server(), request, harmony=None, stops=())))
    assert stdout.getvalue() == printed + "\n"
