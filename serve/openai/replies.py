"""Response objects of the two endpoints, whole and in parts."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from puzzle_trtllm.serve.openai.answers import Part, Usage


def usage_json(usages: list[Usage]) -> dict[str, Any]:
    """`usage` of one or several generations together."""
    prompt, completion = sum(u.prompt_tokens for u in usages), sum(u.completion_tokens for u in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "completion_tokens_details": {"reasoning_tokens": sum(u.reasoning_tokens for u in usages)},
    }


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What the objects of one request share."""

    model: str
    chat: bool
    id: str
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def begin(cls, *, model: str, chat: bool) -> Reply:
        return cls(model=model, chat=chat, id=f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}")

    def whole(self, choices: list[tuple[Part, str]], usages: list[Usage]) -> dict[str, Any]:
        """The one response of a request without streaming: (answer, finish reason) of each choice."""
        made = [self._choice(index, part, finish) for index, (part, finish) in enumerate(choices)]
        return self._object("chat.completion", made) | {"usage": usage_json(usages)}

    def opening(self) -> dict[str, Any]:
        """The first chunk, which shows nothing: of a chat, whose turn it is."""
        return self._chunk({"delta": {"role": "assistant", "content": ""}} if self.chat else {"text": ""}, None)

    def part(self, part: Part) -> list[dict[str, Any]]:
        """Chunks that bring some of the answer; none where nothing shows."""
        if not self.chat:
            return [self._chunk({"text": part.content}, None)] if part.content else []
        named = {"reasoning_content": part.reasoning, "content": part.content}
        return [self._chunk({"delta": {name: text}}, None) for name, text in named.items() if text]

    def closing(self, finish_reason: str) -> dict[str, Any]:
        """The chunk with the finish reason."""
        return self._chunk({"delta": {}} if self.chat else {"text": ""}, finish_reason)

    def usage(self, usage: Usage) -> dict[str, Any]:
        """The chunk behind the last one, for `stream_options.include_usage`."""
        return self._object("chat.completion.chunk", []) | {"usage": usage_json([usage])}

    def _choice(self, index: int, part: Part, finish_reason: str) -> dict[str, Any]:
        content: dict[str, Any] = {"text": part.content}
        if self.chat:
            message = {"role": "assistant", "content": part.content, "refusal": None}
            content = {"message": message | ({"reasoning_content": part.reasoning} if part.reasoning else {})}
        return {"index": index, **content, "logprobs": None, "finish_reason": finish_reason}

    def _chunk(self, content: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}
        return self._object("chat.completion.chunk", [choice])

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = kind if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}
