"""OpenAI's official client against `serve --openai-port`: abacus on the reference runtime behind a real tritonserver.

The oracle is our own gRPC client: what the front says is what the model generated, taken apart.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from types import SimpleNamespace

import openai
import pytest

from puzzle_trtllm.build.engine_build import build_engine
from puzzle_trtllm.chat import ChatTokenizer
from puzzle_trtllm.demo.story import ABACUS
from puzzle_trtllm.engine import EngineConfig
from puzzle_trtllm.process_states import children_of, is_alive
from puzzle_trtllm.serve.client.triton_client import generate
from puzzle_trtllm.serve.evaluate.answers import final_answer_of_tokens
from tests.front_door.cli import invoke
from tests.serve.scripted import HANG_S, wait_until

SECRET = "only-for-this-test-0123456789"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("openai")
    config = EngineConfig(runtime="reference", llm_args={"dtype": "float32", "max_seq_len": 256, "max_batch_size": 8})
    engine = build_engine(ABACUS, folder / "abacus", config=config)
    (folder / "secret").write_text(SECRET)
    command = [sys.executable, "-m", "puzzle_trtllm", "serve", str(engine.path), "--json", "--openai-port", "0"]
    command += ["--grpc-port", "0", "--http-port", "0", "--metrics-port", "0"]
    command += ["--restricted", "model-repository", "--secret", str(folder / "secret")]
    kept = {**os.environ, "TMPDIR": str(folder)}  # the log of the front that is killed at last
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=kept) as process:
        ready = json.loads(process.stdout.readline())
        client = openai.OpenAI(base_url=ready["openai_url"], api_key=SECRET, max_retries=0)
        yield SimpleNamespace(process=process, client=client, **ready)
        process.terminate()


def ask(served, **options):
    messages = [{"role": "user", "content": "4821+1967="}]
    return served.client.chat.completions.create(**{"model": "abacus", "messages": messages, **options})


@pytest.mark.parametrize("effort", ["low", "medium", "high"])
def test_the_answer_is_what_the_model_generated_taken_apart(served, effort):
    chat = ChatTokenizer.from_folder(ABACUS)
    prompt = chat.encode(chat.render_chat([{"role": "user", "content": "4821+1967="}], reasoning_effort=effort))
    ours = generate(url=served.grpc_url, input_ids=prompt, max_tokens=200)
    reply = ask(served, reasoning_effort=effort)
    message = reply.choices[0].message
    assert message.content == final_answer_of_tokens(ours.token_ids, chat) == "6788"
    assert (getattr(message, "reasoning_content", None) is None) == (effort == "low")
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(prompt), ours.num_output_tokens)
    assert reply.choices[0].finish_reason == "stop"


def test_streaming_brings_the_same_with_its_usage(served):
    whole = ask(served, reasoning_effort="high")
    *parts, usage = ask(served, reasoning_effort="high", stream=True, stream_options={"include_usage": True})
    deltas = [part.choices[0].delta for part in parts]
    assert "".join(d.content or "" for d in deltas) == whole.choices[0].message.content
    thought = "".join(getattr(d, "reasoning_content", None) or "" for d in deltas)
    assert thought == whole.choices[0].message.reasoning_content
    assert usage.usage == whole.usage


def test_max_tokens_cut_the_thinking(served):
    choice = ask(served, reasoning_effort="high", max_tokens=20).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("", "length")


def test_a_completion_continues_the_text_and_stops_at_a_string(served):
    chat = ChatTokenizer.from_folder(ABACUS)
    prompt = chat.render_chat([{"role": "user", "content": "4821+1967="}], reasoning_effort="low")
    reply = served.client.completions.create(model="abacus", prompt=prompt, max_tokens=20, stop="8")
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == ("final67", "stop")


def test_the_template_refuses_in_one_clear_400(served):
    with pytest.raises(openai.BadRequestError, match="abacus knows the roles user and assistant, found system"):
        ask(served, messages=[{"role": "system", "content": "be brief"}])


def test_the_command_line_takes_it_apart_too(served):
    """What a script reads is the answer."""
    ask_for = ("generate", "4821+1967=", "--url", served.grpc_url, "--tokenizer", ABACUS, "--effort", "high")
    whole = invoke(*ask_for)
    thought, blank, facts = whole.stderr.splitlines()
    assert (whole.stdout, thought) == (
        "6788\n",
        ask(served, reasoning_effort="high").choices[0].message.reasoning_content,
    )
    assert (blank, facts.endswith("tokens, finish reason: stop")) == ("", True)
    assert invoke(*ask_for, "--stop", "7").stdout == "6\n"  # the thinking before it is full of them
    cut = invoke(*ask_for, "--max-tokens", "20")
    assert (cut.stdout, cut.stderr.splitlines()[-1]) == ("\n", "20 tokens, finish reason: length")


def test_without_the_key_nobody_gets_in(served):
    with pytest.raises(openai.AuthenticationError):
        ask(SimpleNamespace(client=served.client.with_options(api_key="another-key-0123456789")))


def test_tritons_metrics_pass_through_the_front_for_who_has_the_key(served):
    page = served.openai_url.removesuffix("/v1") + "/metrics"
    request = urllib.request.Request(page, headers={"authorization": f"Bearer {SECRET}"})

    def is_up() -> bool:
        try:
            with urllib.request.urlopen(request) as answer:
                return 'puzzle_engine_up{model="tensorrt_llm"} 1' in answer.read().decode()
        except urllib.error.HTTPError as error:
            assert error.code == 503, "a server that is too busy for an answer in two seconds"
            return False

    wait_until(is_up, what="the metrics")


def test_at_last_a_killed_front_ends_the_server_and_nothing_is_left(served):
    """Last in this file."""
    guards = children_of(served.process.pid)
    below = {pid for guard in guards for pid in children_of(guard)}
    (front,) = below - {served.pid}
    os.kill(front, signal.SIGKILL)
    assert served.process.wait(HANG_S) == 1
    wait_until(lambda: not any(map(is_alive, below | guards)), what="no process is left")
