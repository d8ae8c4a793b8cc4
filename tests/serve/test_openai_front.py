"""The OpenAI front through the official client, over a scripted server: said, counted, refused, cancelled."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import urllib.error
import urllib.request
from types import SimpleNamespace

import openai
import pytest

from puzzle_trtllm.chat import ChatTokenizer
from puzzle_trtllm.errors import CheckpointError, ServeError
from puzzle_trtllm.serve.openai import app
from puzzle_trtllm.serve.openai.__main__ import main as front_main
from puzzle_trtllm.serve.openai.app import CLIENT_GONE, check_server, make_app
from puzzle_trtllm.serve.openai.errors import ApiError
from puzzle_trtllm.serve.openai.model_card import ModelCard
from puzzle_trtllm.serve.openai.protocol import ChatRequest
from tests.serve.openai_front import ScriptedTarget, running_front, toy_card
from tests.serve.scripted import scripted_engine, wait_until

USER = [{"role": "user", "content": "12+30="}]
ANSWER = "<|channel|>analysis<|message|>02 04<|end|><|start|>assistant<|channel|>final<|message|>42<|return|>"


@pytest.fixture(scope="module")
def card(make_checkpoint):
    return toy_card(make_checkpoint([(4, None)]))


@pytest.fixture(scope="module")
def shared(card):
    target = ScriptedTarget()
    with running_front(card, target) as url:
        yield SimpleNamespace(target=target, url=url, client=openai.OpenAI(base_url=url, api_key="-", max_retries=0))


@pytest.fixture
def front(shared, card):
    """A front whose model says ANSWER, a token a response."""
    shared.target.__init__()
    shared.target.steps = [[token_id] for token_id in card.tokenizer.encode(ANSWER)]
    return shared


def ask(front, **options):
    return front.client.chat.completions.create(**{"model": "toy", "messages": USER, **options})


def test_reasoning_and_answer_come_apart_with_exact_counts(front, card):
    reply = ask(front, reasoning_effort="high")
    message = reply.choices[0].message
    assert (message.reasoning_content, message.content) == ("02 04", "42")
    assert reply.choices[0].finish_reason == "stop"
    prompt = card.tokenizer.render_chat(USER, reasoning_effort="high")
    assert reply.usage.prompt_tokens == len(card.tokenizer.encode(prompt))
    assert reply.usage.completion_tokens == len(card.tokenizer.encode(ANSWER))
    assert reply.usage.completion_tokens_details.reasoning_tokens == len(card.tokenizer.encode("02 04"))
    assert card.tokenizer.decode(front.target.requests[0].input_ids) == prompt


def test_streamed_chunks_add_up_to_the_whole_answer(front):
    whole = ask(front)
    chunks = list(ask(front, stream=True, stream_options={"include_usage": True}))
    *parts, usage = chunks
    deltas = [chunk.choices[0].delta for chunk in parts]
    assert deltas[0].role == "assistant"
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == "02 04"
    assert "".join(d.content or "" for d in deltas) == "42"
    assert [c.choices[0].finish_reason for c in parts] == [None] * (len(parts) - 1) + ["stop"]
    assert (usage.choices, usage.usage) == ([], whole.usage)
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in ask(front, stream=True))


def test_with_continuous_usage_every_chunk_has_the_counts_so_far(front):
    whole = ask(front).usage
    options = {"include_usage": True, "continuous_usage_stats": True}
    *parts, last = ask(front, stream=True, stream_options=options)
    counts = [
        (chunk.usage.completion_tokens, chunk.usage.completion_tokens_details.reasoning_tokens) for chunk in parts
    ]
    assert counts == sorted(counts) and counts[0] == (1, 0)
    reasoning = [chunk.choices[0].delta.model_extra.get("reasoning_content") for chunk in parts]
    of_reasoning = [count for text, (_, count) in zip(reasoning, counts, strict=True) if text]
    assert of_reasoning == list(range(1, whole.completion_tokens_details.reasoning_tokens + 1))
    assert parts[-1].usage == last.usage == whole


def test_what_load_generators_always_send_is_taken_where_it_changes_nothing(front):
    options = {"include_usage": True, "include_obfuscation": False}
    neutral = {"repetition_penalty": 1.0, "min_p": 0}
    *_, last = ask(front, stream=True, stream_options=options, logprobs=None, extra_body=neutral)
    assert last.usage == ask(front).usage
    assert front.target.requests[0].max_tokens == front.target.requests[1].max_tokens


def test_a_completion_begins_with_its_first_token_though_that_shows_nothing(front):
    """What a load generator takes for the time to first token; only one first chunk where the token shows."""
    front.target.steps, front.target.text = [[7], ServeError("dead", status="UNAVAILABLE")], ""
    stream = front.client.completions.create(model="toy", prompt="1+1=", stream=True)
    assert next(stream).choices[0].text == ""
    with pytest.raises(openai.APIError, match="dead"):
        next(stream)
    front.target.steps, front.target.text = [[7]], "x"
    stream = front.client.completions.create(model="toy", prompt="1+1=", stream=True)
    assert [chunk.choices[0].text for chunk in stream] == ["x", ""]


def test_the_stream_ends_with_done(front):
    body = {"model": "toy", "messages": USER, "stream": True}
    with post(front.url + "/chat/completions", body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.read().decode().endswith("data: [DONE]\n\n")


def test_a_stop_string_ends_the_answer_but_not_the_thinking_before_it(front, card):
    text = "<|channel|>analysis<|message|>a\n\nb<|end|><|start|>assistant<|channel|>final<|message|>42\n\n43"
    front.target.steps = [[token_id] for token_id in card.tokenizer.encode(text)]
    front.target.finish_reason = "length"
    for stream in (False, True):
        reply = ask(front, stop=["\n\n"], stream=stream)
        if stream:
            parts = [chunk.choices[0] for chunk in reply]
            content = "".join(part.delta.content or "" for part in parts)
            assert (content, parts[-1].finish_reason) == ("42", "stop")
        else:
            assert reply.choices[0].message.reasoning_content == "a\n\nb"
            assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == ("42", "stop")
            assert reply.usage.completion_tokens == len(card.tokenizer.encode(text)) - 2
    wait_until(lambda: front.target.cancelled == 2, what="both generations are cancelled")
    assert [request.stop for request in front.target.requests] == [None, None]


def test_completions_take_text_token_ids_and_several_prompts(front, card):
    front.target.steps, front.target.text, front.target.finish_reason = [[7, 7]], "xx", "length"
    ids = card.tokenizer.encode("1+1=")
    create = front.client.completions.create
    for prompt in ("1+1=", ids):
        reply = create(model="toy", prompt=prompt, max_tokens=2)
        assert (reply.choices[0].text, reply.choices[0].finish_reason) == ("xx", "length")
        assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(ids), 2)
    several = create(model="toy", prompt=["1+1=", "2+2=", "3+3="])
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert several.usage.completion_tokens == 6
    assert {tuple(r.input_ids) for r in front.target.requests[:2]} == {tuple(ids)}
    assert [r.max_tokens for r in front.target.requests] == [2, 2, 16, 16, 16]
    assert "".join(chunk.choices[0].text for chunk in create(model="toy", prompt="1+1=", stream=True)) == "xx"


def test_sampling_parameters_reach_the_server(front):
    ask(front, temperature=0.5, top_p=0.9, seed=3, presence_penalty=0.5, max_completion_tokens=9)
    sent = front.target.requests[-1]
    assert (sent.temperature, sent.top_p, sent.seed, sent.presence_penalty) == (0.5, 0.9, 3, 0.5)
    assert sent.max_tokens == 9
    ask(front, temperature=0)
    assert (front.target.requests[-1].temperature, front.target.requests[-1].top_p) == (None, None)


@pytest.mark.parametrize(
    ("config", "asked", "sent"),
    [
        ({}, {}, (1.0, 1.0, None)),  # OpenAI's default samples
        ({"do_sample": False}, {}, (None, None, None)),
        ({"do_sample": False}, {"temperature": 0.7}, (0.7, 1.0, None)),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 40}, {}, (0.6, 0.95, 40)),
        ({"do_sample": True, "temperature": 0.6}, {"temperature": 0}, (None, None, None)),
    ],
)
def test_what_a_request_leaves_out_comes_from_the_model(card, config, asked, sent):
    own = ModelCard(name="toy", tokenizer=card.tokenizer, max_seq_len=256, generation_config=config)
    request = own.of_chat(ChatRequest.parse({"model": "toy", "messages": USER, **asked}), "id")
    assert (request.temperature, request.top_p, request.top_k) == sent


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"temperature": "hot"}, r"generation_config\.json: temperature: .*valid number .found 'hot'"),
        ({"top_p": 5}, "top_p: .*less than or equal to 1"),
        ({"top_k": -1}, "top_k: .*greater than or equal to 0"),
        ({"do_sample": "no"}, "do_sample: .*valid boolean"),
    ],
)
def test_defaults_that_no_server_takes_are_told_at_the_start(make_checkpoint, tmp_path, config, message):
    engine = scripted_engine(tmp_path / "engine", make_checkpoint([(4, None)]))
    (engine.model_path / "generation_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        ModelCard.of_engine(engine)


def test_null_in_a_generation_config_says_nothing(make_checkpoint, tmp_path):
    """A top_p of null beside a temperature would be greedy on older servers."""
    engine = scripted_engine(tmp_path / "engine", make_checkpoint([(4, None)]))
    config = {"do_sample": True, "temperature": 0.7, "top_p": None, "eos_token_id": 1}
    (engine.model_path / "generation_config.json").write_text(json.dumps(config))
    request = ModelCard.of_engine(engine).of_chat(ChatRequest.parse({"model": "engine", "messages": USER}), "id")
    assert (request.temperature, request.top_p) == (0.7, 1.0)


def test_a_chat_without_a_limit_may_fill_the_context(front):
    ask(front)
    sent = front.target.requests[-1]
    assert sent.max_tokens == 256 - len(sent.input_ids)


@pytest.mark.parametrize(
    ("body", "param", "code", "words"),
    [
        ({"n": 2}, "n", "unsupported_parameter", "only 1, found 2"),
        ({"logprobs": True}, "logprobs", "unsupported_parameter", "no log-probabilities"),
        ({"repetition_penalty": 1.1}, "repetition_penalty", "unsupported_parameter", "only 1.0, found 1.1"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options", "invalid_value", "False"),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter", "calls no tools"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter", "only"),
        ({"reasoning_effort": "extreme"}, "reasoning_effort", "invalid_value", "'low', 'medium' or 'high'"),
        ({"temperature": 3}, "temperature", "invalid_value", "less than or equal to 2"),
        ({"max_tokenz": 3}, "max_tokenz", "unknown_parameter", "unknown parameter"),
        ({"messages": []}, "messages", "invalid_value", "at least 1"),
        ({"messages": None}, "messages", "invalid_value", "list"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", None, "only text"),
        ({"messages": [{"role": "user", "content": "1" * 300}]}, "messages", "context_length_exceeded", "256"),
        (
            {"messages": [{"role": "user", "content": "1" * (1 << 20)}]},
            "messages",
            "context_length_exceeded",
            "characters",
        ),
        ({"stop": [""]}, "stop", None, "empty"),
        ({"stop": ["a"] * 65}, "stop", None, "65 strings, expected at most 64"),
        ({"stop": "a" * 1025}, "stop", None, "1025 characters, expected at most 1024"),
        ({"stream_options": {"include_usage": True}}, "stream_options", None, "stream: true"),
        ({"seed": -1}, "seed", "invalid_value", "greater than or equal to 0"),
    ],
)
def test_bad_input_is_400_with_the_parameters_name_and_nothing_is_sent(front, body, param, code, words):
    status, error = refused(front.url + "/chat/completions", {"model": "toy", "messages": USER, **body})
    assert (status, error["type"], error["param"], error["code"]) == (400, "invalid_request_error", param, code)
    assert words in error["message"]
    assert front.target.requests == []


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/chat/completions", {"messages": [{"role": "user", "content": "half a pair: \ud800"}]}),
        ("/chat/completions", {"messages": USER, "stop": "\udfff"}),
        ("/completions", {"prompt": "\ud800"}),
        ("/completions", {"prompt": "1", "stop": ["\ud800"]}),
        ("/completions", {"prompt": "1", "\ud800": 1}),
    ],
)
def test_half_a_surrogate_pair_is_400_wherever_it_stands(front, path, body):
    status, error = refused(front.url + path, {"model": "toy", **body})
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert "half of a surrogate pair" in error["message"]
    assert front.target.requests == []


def test_a_whole_surrogate_pair_is_a_character(front, card):
    body = b'{"model": "toy", "prompt": "\\ud83d\\ude00"}'
    with post(front.url + "/completions", body):
        assert card.tokenizer.encode("\U0001f600") == front.target.requests[-1].input_ids


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"model": "toy", "n": ' + b"[" * 5000 + b"]" * 5000 + b"}"])
def test_a_body_nested_too_deeply_is_400(front, body):
    status, error = refused(front.url + "/chat/completions", body)
    assert (status, error["message"]) == (400, "the request body is nested too deeply")


@pytest.mark.parametrize("asked", [{}, {"reasoning_effort": "low"}])
def test_a_model_without_a_chat_template_refuses_chats(card, tmp_path, asked):
    own = ChatTokenizer(folder=tmp_path, tokenizer=card.tokenizer.tokenizer, config={})
    bare = ModelCard(name="toy", tokenizer=own, max_seq_len=256)
    with pytest.raises(ApiError, match=r"^messages: .*expected a chat template") as caught:
        bare.of_chat(ChatRequest.parse({"model": "toy", "messages": USER, **asked}), "id")
    assert (caught.value.status, caught.value.param) == (400, "messages")


def test_other_refusals_have_their_own_statuses(front):
    with pytest.raises(openai.NotFoundError, match="this server has 'toy'") as caught:
        ask(front, model="gpt-4")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert refused(front.url + "/chat/completions", b"{")[0] == 400
    assert refused(front.url + "/embeddings", {})[0] == 404
    assert refused(front.url + "/completions", {"model": "toy", "prompt": []})[0] == 400
    assert refused(front.url + "/completions", {"model": "toy", "prompt": "a", "echo": True})[0] == 400
    assert [model.id for model in front.client.models.list()] == ["toy"]
    assert front.client.models.retrieve("toy").max_model_len == 256


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("status", "http"), [("UNAVAILABLE", 503), ("INVALID_ARGUMENT", 400), ("INTERNAL", 500), ("CANCELLED", 503)]
)
def test_what_the_server_refuses_has_its_http_status_streamed_or_not(front, stream, status, http):
    front.target.steps = [ServeError("the queue is full", status=status)]
    with pytest.raises(openai.APIStatusError, match="the queue is full") as caught:
        ask(front, stream=stream)
    assert caught.value.status_code == http


def test_an_engine_that_dies_in_the_middle_ends_the_stream_with_an_error(front, card):
    front.target.steps = [*front.target.steps[:5], ServeError("the engine is dead", status="UNAVAILABLE")]
    with pytest.raises(openai.APIError, match="the engine is dead"):
        list(ask(front, stream=True))


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_cancels_the_generation(front, begun, stream):
    """Before the first token or after it, streamed or not."""
    front.target.steps = [*(front.target.steps[:12] if begun else []), 60.0, [7]]
    client = front.client.with_options(timeout=0.5)
    with pytest.raises(Exception, match="timed out"):  # openai 2 lets httpx's own error out of a stream that has begun
        for _ in ask(SimpleNamespace(client=client), stream=stream):
            pass
    wait_until(lambda: front.target.cancelled == 1, what="cancelled", timeout_s=5)


def test_a_client_that_goes_away_while_it_sends_is_no_error_of_ours(card):
    """An exception that leaves the application is a traceback in the log."""
    sent = []
    arrives = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])

    async def receive():
        return next(arrives)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"", "headers": []}
    asyncio.run(make_app(card, ScriptedTarget())(scope, receive, send))
    assert sent[0]["status"] == CLIENT_GONE


def test_a_body_that_is_too_long_is_413(front, monkeypatch):
    monkeypatch.setattr(app, "MAX_BODY_BYTES", 1000)
    status, error = refused(front.url + "/chat/completions", {"model": "toy", "messages": USER, "user": "x" * 1000})
    assert (status, error["message"]) == (413, "the request body has more than 1,000 bytes")
    assert front.target.requests == []


@pytest.mark.parametrize("nobody_there", [True, False])
def test_a_front_alone_that_cannot_start_says_so_in_one_line(
    make_checkpoint, tmp_path, monkeypatch, capfd, nobody_there
):
    """uvicorn would show a traceback, and exit with a code of its own."""
    engine = scripted_engine(tmp_path / "engine", make_checkpoint([(4, None)]))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = 0 if nobody_there else taken.getsockname()[1]
        command = ["openai", str(engine.path), "--grpc-url", "127.0.0.1:1", "--port", str(port)]
        monkeypatch.setattr(sys, "argv", command)
        assert front_main() == 2
    error = capfd.readouterr().err.strip()
    expected = "error: 127.0.0.1:1: failed to connect" if nobody_there else f"error: port {port} (OpenAI) is in use"
    assert error.startswith(expected) and "\n" not in error


def test_a_server_without_token_ids_is_no_server_to_stand_before():
    target = ScriptedTarget()
    target.gives_token_ids = False
    with pytest.raises(ServeError, match="gives no token ids"):
        asyncio.run(check_server(target))


def test_with_an_api_key_only_those_who_know_it_get_in(card):
    with running_front(card, ScriptedTarget(), api_key="s" * 20, is_healthy=lambda: False) as url:
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=url, api_key="wrong", max_retries=0).models.list()
        assert openai.OpenAI(base_url=url, api_key="s" * 20).models.list().data
        status, error = refused(url.removesuffix("/v1") + "/health", None)
        assert (status, error["code"]) == (503, "unavailable")
        assert refused(url.removesuffix("/v1") + "/metrics", None)[0] == 401


@pytest.mark.parametrize("page", ["# TYPE up gauge\nup 1\n", None])
def test_the_servers_metrics_are_where_load_generators_look_for_them(card, page):
    """AIPerf reads /metrics of the URL that it loads, and cannot read Triton's, which answers HEAD with a body."""
    with running_front(card, ScriptedTarget(), metrics=lambda: page) as url:
        place = url.removesuffix("/v1") + "/metrics"
        if page is None:
            assert refused(place, None)[0] == 503
        else:
            with post(place, None) as response:
                assert response.headers["content-type"].startswith("text/plain")
                assert response.read().decode() == page


def post(url, body):
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    return urllib.request.urlopen(urllib.request.Request(url, data, {"content-type": "application/json"}), timeout=20)


def refused(url, body):
    """(HTTP status, error object)."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(url, body)
    return caught.value.code, json.loads(caught.value.read())["error"]


def test_health(front):
    with post(front.url.removesuffix("/v1") + "/health", None) as response:
        assert response.status == 200
