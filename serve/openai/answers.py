"""One generation, as it streams in, told apart into reasoning and content.

With channels (harmony.py): analysis is reasoning, final and commentary are content. A stop string then ends the content
and never the reasoning before it, and the generation is cancelled when it shows. Without channels the server's own
text is the content, stop strings already cut off.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing
from dataclasses import dataclass

from tokenizers import Tokenizer

from puzzle_trtllm.harmony import ANALYSIS, HarmonyDecoder, Piece
from puzzle_trtllm.serve.bench.target import Target
from puzzle_trtllm.serve.client.request import GenerationRequest
from puzzle_trtllm.serve.triton.response import hold_back


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some of an answer; empty parts say that tokens arrive which show nothing."""

    reasoning: str = ""
    content: str = ""


@dataclass(kw_only=True)
class Usage:
    """Exact counts: of the prompt's ids as sent, and of the ids that the server generated."""

    prompt_tokens: int
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    """Of them, in the bodies of analysis messages."""


class AnswerStream:
    """Iterate over `parts()`; `usage` and `finish_reason` are complete when it has ended."""

    def __init__(
        self, target: Target, request: GenerationRequest, *, harmony: Tokenizer | None, stops: Iterable[str] = ()
    ) -> None:
        """harmony: reads the model's channels (a chat); None: its text as it is, to whose stops the server sees.

        stops: of the content.
        """
        self._target = target
        self._request = request
        self._decoder = HarmonyDecoder(harmony) if harmony else None
        self._stops = StopWatch(tuple(stops))
        self.usage = Usage(prompt_tokens=len(request.input_ids or ()))
        self.finish_reason = "stop"

    async def parts(self) -> AsyncGenerator[Part, None]:
        """The answer. Closing it cancels the generation. Raises ServeError."""
        async with aclosing(self._target.stream(self._request)) as chunks:
            async for chunk in chunks:
                self.usage.completion_tokens = chunk.num_output_tokens or 0
                self.finish_reason = chunk.finish_reason or self.finish_reason
                if self._decoder is None:
                    yield Part(content=chunk.text)
                    continue
                part = self._part(self._decoder.feed(chunk.token_ids))
                self.usage.reasoning_tokens = self._decoder.analysis_tokens
                yield part
                if self._stops.has_stopped:
                    self.finish_reason = "stop"
                    return
        if self._decoder is not None:
            rest = self._part(self._decoder.finish())
            if self._stops.has_stopped:
                self.finish_reason = "stop"
            yield Part(reasoning=rest.reasoning, content=rest.content + self._stops.rest())

    def _part(self, pieces: Iterator[Piece]) -> Part:
        reasoning, content = [], []
        for piece in pieces:
            if piece.header.channel == ANALYSIS:
                reasoning.append(piece.text)
            else:
                content.append(self._stops.feed(piece.text))
        return Part(reasoning="".join(reasoning), content="".join(content))


class StopWatch:
    """Cuts a text at the first stop string in it; an end that may become one is held back until it is known."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.has_stopped = False

    def feed(self, text: str) -> str:
        """What of the text so far can be shown that was not shown before."""
        if self.has_stopped or not self._stops:
            return "" if self.has_stopped else text
        self._held += text
        found = [place for place in (self._held.find(stop) for stop in self._stops) if place >= 0]
        if found:
            self.has_stopped = True
            return self._held[: min(found)]
        shown = hold_back(self._held, self._stops)
        self._held = self._held[len(shown) :]
        return shown

    def rest(self) -> str:
        """What was held back and became no stop string."""
        rest, self._held = self._held, ""
        return "" if self.has_stopped else rest
