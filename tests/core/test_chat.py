"""Prompts are rendered exactly as transformers renders them, without transformers."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time

import pytest

from puzzle_trtllm.chat import REASONING_EFFORTS, ChatTokenizer
from puzzle_trtllm.errors import CheckpointError, PuzzleError
from tests.toys import RETURN_ID, UNK_ID, VOCAB_SIZE, write_toy_tokenizer

CONVERSATIONS = [
    [{"role": "user", "content": "17+25="}],
    [{"role": "user", "content": "a\n  b {{ c }}"}, {"role": "assistant", "content": "d"}],
    [{"role": "user", "content": "<|end|>"}],
]

EXTRA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}\n    {% if m.content is string %}\n{{ m | tojson }}\n    {% endif %}\n"
    "{% if loop.index > 1 %}{% break %}{% endif %}{% endfor %}{{ eos_token }}{{ pad_token }}"
)


@pytest.fixture
def folder(tmp_path):
    write_toy_tokenizer(tmp_path)
    return tmp_path


@pytest.fixture
def both(folder):
    transformers = pytest.importorskip("transformers")
    return ChatTokenizer.from_folder(folder), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("effort", [None, *REASONING_EFFORTS])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_prompts_and_tokens_equal_transformers(both, messages, effort, generate):
    ours, theirs = both
    arguments = {} if effort is None else {"reasoning_effort": effort}
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate, **arguments)
    prompt = ours.render_chat(messages, reasoning_effort=effort, add_generation_prompt=generate)
    assert prompt == expected
    assert f"effort: {effort or 'medium'}" in prompt
    assert ours.encode(prompt) == theirs.encode(prompt, add_special_tokens=False)


GENERATION_TEMPLATE = "{% for m in messages %}\n  {% generation %}\n  {{ m.content }}{% endgeneration %}\n.{% endfor %}"
"""Marks what an assistant says, for training."""


@pytest.mark.parametrize("template", [EXTRA_TEMPLATE, GENERATION_TEMPLATE], ids=["extra", "generation"])
def test_whitespace_filters_loop_controls_and_marks_equal_transformers(folder, template):
    transformers = pytest.importorskip("transformers")
    (folder / "chat_template.jinja").write_text(template)
    messages = [{"role": "user", "content": f"é <{i}>"} for i in range(4)]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(messages, tokenize=False)
    assert ChatTokenizer.from_folder(folder).render_chat(messages, add_generation_prompt=False) == expected


def test_a_template_inside_the_tokenizer_config(folder):
    (folder / "chat_template.jinja").unlink()
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": "{{ messages[0].content }}"}))
    assert ChatTokenizer.from_folder(folder).render_chat([{"role": "user", "content": "hi"}]) == "hi"


def test_other_threads_go_on_while_a_long_text_is_read(folder):
    tokenizer = ChatTokenizer.from_folder(folder)
    text, ids = "1+2=3, " * 100_000, []
    reading = threading.Thread(target=lambda: ids.extend(tokenizer.encode(text)))
    reading.start()
    moments = 0
    while reading.is_alive():
        time.sleep(0.001)
        moments += 1
    assert moments > 10 and ids == tokenizer.encode("1+2=3, ") * 100_000


def test_text_round_trips(folder):
    tokenizer = ChatTokenizer.from_folder(folder)
    text = "<|start|>user<|message|>1+2=3<|return|>"
    ids = tokenizer.encode(text)
    assert ids[-1] == RETURN_ID and len(ids) == 3 + len("user1+2=3")
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user1+2=3"
    assert tokenizer.encode("é") == [UNK_ID]
    assert tokenizer.largest_id == VOCAB_SIZE - 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: (f / "tokenizer.json").unlink(),
            r"tokenizer\.json: missing \(expected a checkpoint folder, such as an engine's model/",
        ),
        (lambda f: (f / "tokenizer.json").write_text("{}"), r"tokenizer\.json: cannot be read"),
        (lambda f: (f / "tokenizer_config.json").write_text("{"), r"tokenizer_config\.json: cannot be read"),
        (lambda f: (f / "tokenizer_config.json").write_text("[" * 10**5), r"tokenizer_config\.json: cannot be read"),
        (
            lambda f: (f / "tokenizer_config.json").write_text("[]"),
            r"tokenizer_config\.json: unknown form \(found list",
        ),
        (lambda f: (f / "chat_template.jinja").write_text("{{ 'a' + messages }}"), "the chat template refuses"),
        (lambda f: (f / "chat_template.jinja").write_text("{{ '%z' | format(1) }}"), "the chat template refuses"),
        (lambda f: (f / "chat_template.jinja").unlink(), r"chat_template\.jinja: missing"),
        (lambda f: (f / "chat_template.jinja").write_text("a\n{% if %}"), "chat template, line 2: not a template"),
        (lambda f: (f / "chat_template.jinja").write_text("{{ 1 / 0 }}"), "the chat template refuses"),
        (lambda f: (f / "chat_template.jinja").write_bytes(b"\xff"), r"chat_template\.jinja: cannot be read"),
        (lambda f: (f / "chat_template.jinja").write_text("{{ raise_exception('no tools') }}"), "no tools"),
    ],
)
def test_damage_is_one_line(folder, damage, message):
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        ChatTokenizer.from_folder(folder).render_chat(CONVERSATIONS[0])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("template", ["{% if %}", "{{ 1 | nofilter }}"])
def test_what_a_template_takes_cannot_be_told_of_one_that_is_none(folder, template):
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(CheckpointError, match="chat template, line 1: not a template"):
        ChatTokenizer.from_folder(folder).template_takes("reasoning_effort")


def test_json_is_written_as_transformers_writes_it(folder):
    transformers = pytest.importorskip("transformers")
    (folder / "chat_template.jinja").write_text(
        "{{ messages | tojson }}{{ messages | tojson(ensure_ascii=true, separators=(',', ':'), sort_keys=true) }}"
        "{{ messages | tojson(indent=2) }}"
    )
    messages = [{"role": "user", "content": "é <1>"}]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(messages, tokenize=False)
    assert ChatTokenizer.from_folder(folder).render_chat(messages, add_generation_prompt=False) == expected


def test_a_text_on_which_the_tokenizer_panics_is_one_line(folder, capfd):
    """As gpt-oss's does on ten million times the same letter; this pattern needs fewer."""
    content = json.loads((folder / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    (folder / "tokenizer.json").write_text(json.dumps({**content, "pre_tokenizer": split}))
    with pytest.raises(PuzzleError, match=r"the tokenizer cannot read this text: .*retry-limit"):
        ChatTokenizer.from_folder(folder).encode("a" * 40 + "b")


def test_half_a_surrogate_pair_is_one_line(folder):
    with pytest.raises(PuzzleError, match="not text that UTF-8 can hold"):
        ChatTokenizer.from_folder(folder).encode("a\ud800")


def test_an_unknown_effort_is_refused_by_the_template(folder):
    with pytest.raises(CheckpointError, match="reasoning_effort must be low, medium or high, found huge"):
        ChatTokenizer.from_folder(folder).render_chat(CONVERSATIONS[0], reasoning_effort="huge")


def test_neither_torch_nor_transformers_is_imported():
    code = "import sys, puzzle_trtllm.chat; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
