"""abacus' tokens: one a printable character, one a word of the chat format, and the special ones.

The layout follows the harmony format that gpt-oss speaks, so that reasoning and answer are told apart by channel:

    <|start|>system<|message|>effort: low<|end|><|start|>user<|message|>17+25=<|end|><|start|>assistant
    <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>42<|return|>

Words of the format (system, user, analysis, ...) are single tokens, which keeps sequences short. `encode` here is plain
Python, for training; `write_tokenizer` puts the same rule into tokenizer.json (a test compares the two).
"""

from __future__ import annotations

import json
import re
from pathlib import Path

SPECIAL = ("<|endoftext|>", "<|return|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|unk|>")
WORDS = ("system", "user", "assistant", "analysis", "final", "effort: ", "low", "medium", "high")
CHARACTERS = (*map(chr, range(32, 127)), "\n")
_NAMED = SPECIAL + WORDS + CHARACTERS
VOCAB_SIZE = 128
TOKENS = _NAMED + tuple(f"<|reserved_{i}|>" for i in range(len(_NAMED), VOCAB_SIZE))
TOKEN_IDS = {token: index for index, token in enumerate(TOKENS)}

PAD_ID, RETURN_ID, UNK_ID = TOKEN_IDS["<|endoftext|>"], TOKEN_IDS["<|return|>"], TOKEN_IDS["<|unk|>"]

_WORD_PATTERN = "|".join(re.escape(word) for word in WORDS)
_PATTERN = re.compile("|".join(re.escape(token) for token in SPECIAL + WORDS) + r"|(?s:.)")


def encode(text: str) -> list[int]:
    """Token ids of a text that may hold special tokens."""
    return [TOKEN_IDS.get(piece, UNK_ID) for piece in _PATTERN.findall(text)]


def decode(ids: list[int]) -> str:
    """The text of token ids, special tokens included."""
    return "".join(TOKENS[index] for index in ids)


def prompt(user: str, effort: str) -> str:
    """The conversation up to where the model takes over."""
    return f"<|start|>system<|message|>effort: {effort}<|end|><|start|>user<|message|>{user}<|end|><|start|>assistant"


def completion(thinking: str | None, answer: str) -> str:
    """What the model writes after `prompt`."""
    analysis = f"<|channel|>analysis<|message|>{thinking}<|end|><|start|>assistant" if thinking is not None else ""
    return f"{analysis}<|channel|>final<|message|>{answer}<|return|>"


CHAT_TEMPLATE = """\
{%- set effort = reasoning_effort if reasoning_effort is defined and reasoning_effort else "medium" -%}
{%- if effort not in ["low", "medium", "high"] -%}
{{- raise_exception("reasoning_effort must be low, medium or high, found " ~ effort) -}}
{%- endif -%}
<|start|>system<|message|>effort: {{ effort }}<|end|>
{%- for message in messages -%}
{%- if message.role == "user" -%}
<|start|>user<|message|>{{ message.content }}<|end|>
{%- elif message.role == "assistant" -%}
<|start|>assistant
{%- if message.thinking is defined and message.thinking -%}
<|channel|>analysis<|message|>{{ message.thinking }}<|end|><|start|>assistant
{%- endif -%}
<|channel|>final<|message|>{{ message.content }}{{ "<|return|>" if loop.last else "<|end|>" }}
{%- else -%}
{{- raise_exception("abacus knows the roles user and assistant, found " ~ message.role) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}
"""


def write_tokenizer(folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(vocab=TOKEN_IDS, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_WORD_PATTERN + r"|(?m:.)"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    special = [t for t in TOKENS if t in SPECIAL or t.startswith("<|reserved_")]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|return|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|unk|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
