"""Long prompts at the OpenAI front: few become tokens at once, and nobody else waits for them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import openai
import pytest

from puzzle_trtllm.serve.openai import app
from puzzle_trtllm.serve.openai.model_card import ModelCard
from tests.serve.openai_front import ScriptedTarget, running_front, toy_card
from tests.serve.scripted import HANG_S, wait_until


@pytest.fixture(scope="module")
def card(make_checkpoint):
    return toy_card(make_checkpoint([(4, None)]))


@pytest.fixture
def slow_front(card, monkeypatch):
    """A front that makes no tokens of long prompts before `gate` is set; `begun` are those that it is at, or was."""
    shared = SimpleNamespace(gate=threading.Event(), begun=[])
    of_completion, target = ModelCard.of_completion, ScriptedTarget()
    target.steps = [[5]]

    def slow(self, request, prompt, request_id):
        if len(prompt) > 1_000:
            shared.begun.append(prompt)
            assert shared.gate.wait(HANG_S)
        return of_completion(self, request, prompt, request_id)

    monkeypatch.setattr(ModelCard, "of_completion", slow)
    with running_front(card, target) as url, ThreadPoolExecutor(6) as clients:
        client = openai.OpenAI(base_url=url, api_key="-", max_retries=0)
        shared.ask = lambda prompt, timeout=HANG_S: client.completions.create(
            model="toy", prompt=prompt, timeout=timeout
        )
        shared.ask_beside = lambda *arguments: clients.submit(shared.ask, *arguments)
        yield shared
        shared.gate.set()


LONG = "1+" * 40_000


def test_few_long_prompts_become_tokens_at_once_and_no_short_one_waits_for_them(slow_front):
    """Each takes memory for every token, which may not be there for one a core."""
    asked = [slow_front.ask_beside(LONG) for _ in range(6)]
    wait_until(lambda: len(slow_front.begun) == 2, what="the first two")
    assert slow_front.ask("1+1=").usage.completion_tokens == 1
    assert len(slow_front.begun) == 2
    slow_front.gate.set()
    assert all("room for 256" in str(each.exception()) for each in asked)
    assert len(slow_front.begun) == 6


def test_few_long_bodies_become_json_at_once(slow_front, monkeypatch):
    """One that was made for it takes 900 MB as JSON, and all that wait would hold theirs."""
    begun, json_of = [], app._json_of

    def slow(content):
        if len(content) > 64 << 10:
            begun.append(content)
            assert slow_front.gate.wait(HANG_S)
        return json_of(content)

    monkeypatch.setattr(app, "_json_of", slow)
    asked = [slow_front.ask_beside(LONG) for _ in range(4)]
    wait_until(lambda: len(begun) == 2, what="the first two")
    assert slow_front.ask("1+1=").usage.completion_tokens == 1
    assert len(begun) == 2
    slow_front.gate.set()
    assert all("room for 256" in str(each.exception()) for each in asked)


def test_a_long_prompt_whose_client_has_gone_does_not_wait_its_turn(slow_front):
    stay = [slow_front.ask_beside(LONG) for _ in range(2)]
    wait_until(lambda: len(slow_front.begun) == 2, what="the first two")
    leave = [slow_front.ask_beside(LONG, 0.3) for _ in range(3)]
    assert all(isinstance(each.exception(), openai.APITimeoutError) for each in leave)
    for _ in range(3):
        slow_front.ask("1+1=")  # the front has seen what came before
    slow_front.gate.set()
    assert all("room for 256" in str(each.exception()) for each in stay)
    assert "room for 256" in str(slow_front.ask_beside(LONG).exception())
    assert len(slow_front.begun) == 3
