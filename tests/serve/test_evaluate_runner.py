"""`evaluate` against a scripted model that reasons as its effort says."""

from __future__ import annotations

import json
import re

import pytest

from puzzle_trtllm.build.engine_build import build_engine
from puzzle_trtllm.chat import ChatTokenizer
from puzzle_trtllm.engine import EngineConfig
from puzzle_trtllm.errors import BenchError, ConfigError, ServeError
from puzzle_trtllm.serve.bench.load import Answer
from puzzle_trtllm.serve.client.request import GenerationRequest
from puzzle_trtllm.serve.evaluate.graders import grade_numeric
from puzzle_trtllm.serve.evaluate.problems import Problem
from puzzle_trtllm.serve.evaluate.result import Decoding, EvaluationResult
from puzzle_trtllm.serve.evaluate.runner import UnfinishedEvaluationError, evaluate, grade_effort
from puzzle_trtllm.serve.metrics.records import RequestCounts, RequestRecord
from tests.serve.fake_client import FakeClient

PROBLEMS = [(12, 30), (5, 5), (99, 1), (40, 2)]


@pytest.fixture(scope="module")
def tokenizer(make_checkpoint):
    return ChatTokenizer.from_folder(make_checkpoint([(4, None)]))


@pytest.fixture
def problems(tmp_path):
    file = tmp_path / "problems.jsonl"
    records = ({"id": f"{a}+{b}", "prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in PROBLEMS)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


class Model:
    """Low effort answers at once and always 10; high effort writes an analysis and is right."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def answer(self, prompt):
        effort = re.search(r"effort: (\w+)", prompt).group(1)
        a, b = map(int, re.search(r"(\d+)\+(\d+)=", prompt).groups())
        if effort == "low":
            return "<|channel|>final<|message|>10<|return|>"
        return f"<|channel|>analysis<|message|>77<|end|><|start|>assistant<|channel|>final<|message|>{a + b}<|return|>"

    def __call__(self, _index, request):
        text = self.answer(self.tokenizer.decode(request.input_ids))
        return [[token_id] for token_id in self.tokenizer.encode(text)[: request.max_tokens]]


def run(client, problems, tokenizer, **options):
    settings = {"concurrency": 3, "max_tokens": 200, "efforts": ("low", "high"), "quiet": True}
    return evaluate(
        "host:1",
        problems=problems,
        tokenizer_folder=tokenizer.folder,
        connect=client.connect,
        **{**settings, **options},
    )


def answer(text, sent_s, end_s, *, tokens, status="completed", error=None):
    """An answer of so many tokens, all at its end."""
    end_ns = int(end_s * 1e9)
    record = RequestRecord(
        sent_ns=int(sent_s * 1e9), end_ns=end_ns, status=status, token_times_ns=(end_ns,) * tokens, error=error
    )
    return Answer(request=GenerationRequest(prompt="p"), record=record, text=text, token_ids=(), finish_reason="stop")


def graded(answers, tokenizer):
    problems = [Problem(id=f"p{index}", prompt="5+5=", answer="10") for index in range(len(answers))]
    return grade_effort(answers, problems, tokenizer, grade_numeric, effort="low")


def test_an_answer_that_broke_off_counts_neither_as_right_nor_as_answered(tokenizer):
    result = graded(
        [
            answer("10", 1.0, 3.0, tokens=10),
            answer("11", 2.0, 6.0, tokens=20, status="truncated"),
            answer("10", 2.0, 2.5, tokens=7, status="failed", error="UNAVAILABLE"),
            answer("10", 3.0, 4.0, tokens=7, status="cancelled", error="UNAVAILABLE"),
        ],
        tokenizer,
    )
    assert [(a.id, a.correct, a.final) for a in result.answers] == [
        ("p0", True, "10"), ("p1", False, "11"), ("p2", False, None), ("p3", False, None),
    ]  # fmt: skip
    assert (result.num_correct, result.num_problems, result.accuracy) == (1, 4, 0.5)
    assert (result.mean_output_tokens, result.errors) == (15.0, {"UNAVAILABLE": 2})
    # From the first sent to the last end, whichever requests those are.
    assert (result.wall_s, result.measured_requests_per_s) == (5.0, 2 / 5.0)


@pytest.mark.parametrize("gives_token_ids", [True, False])
def test_an_answer_that_ends_at_once_is_wrong_and_one_token_long(problems, tokenizer, gives_token_ids):
    # 12+30 and 5+5 end at once, with a token that the server keeps to itself; the others say 10, which is wrong too.
    client = FakeClient(
        lambda index, _: [[]] if index < 2 else [[*b"10"]], gives_token_ids=gives_token_ids, finish_reason="stop"
    )
    result = run(client, problems, tokenizer, efforts=("low",)).efforts["low"]
    assert (result.requests, result.errors, result.accuracy) == (RequestCounts(completed=4), {}, 0.0)
    assert [(a.correct, a.num_output_tokens) for a in result.answers] == [(False, 1)] * 2 + [(False, 2)] * 2


def test_a_server_that_ends_a_request_without_a_word_has_failed(problems, tokenizer):
    client = FakeClient(lambda index, _: [] if index < 2 else [[*b"10"]], finish_reason="stop")
    result = run(client, problems, tokenizer, efforts=("low",)).efforts["low"]
    assert result.requests == RequestCounts(completed=2, failed=2)


def test_an_effort_without_an_answer_is_an_error_with_the_first_reason(tokenizer):
    failed = [answer("", 0, 1, tokens=0, status="failed", error=reason) for reason in ("queue is full", "gone")]
    with pytest.raises(BenchError, match=r"zero successful requests at low effort .2 failed.*first says: queue is"):
        graded(failed, tokenizer)


def test_accuracy_tokens_and_rate_per_effort(problems, tokenizer):
    result = run(FakeClient(Model(tokenizer), finish_reason="stop"), problems, tokenizer)
    low, high = result.efforts["low"], result.efforts["high"]
    # "10" is right for 5+5 alone: 1 of 4; Wilson: center 0.3725, half 0.3269.
    assert (low.num_correct, low.num_problems, low.accuracy) == (1, 4, 0.25)
    assert (low.accuracy_low, low.accuracy_high) == pytest.approx((0.0456, 0.6994), abs=1e-4)
    assert high.accuracy == 1.0
    # <|channel|> final <|message|> 10 <|return|>: 3 special tokens and 5 + 2 characters.
    assert low.mean_output_tokens == 10
    # <|channel|> analysis <|message|> 77 <|end|> <|start|> assistant = 1 + 8 + 1 + 2 + 1 + 1 + 9 = 23, then
    # <|channel|> final <|message|> sum <|return|> = 1 + 5 + 1 + digits + 1, with 2 + 2 + 3 + 2 digits: 31 + 9 / 4.
    assert high.mean_output_tokens == 33.25
    for effort in (low, high):
        assert effort.measured_requests_per_s == pytest.approx(4 / effort.wall_s)
    assert [(answer.id, answer.final, answer.correct) for answer in low.answers] == [
        ("12+30", "10", False),
        ("5+5", "10", True),
        ("99+1", "10", False),
        ("40+2", "10", False),
    ]


def test_the_prompt_is_the_rendered_chat_at_each_effort_as_token_ids(problems, tokenizer):
    client = FakeClient(Model(tokenizer), finish_reason="stop")
    run(client, problems, tokenizer, efforts=("medium",), concurrency=1)
    expected = tokenizer.render_chat([{"role": "user", "content": "12+30="}], reasoning_effort="medium")
    first = client.requests[0]
    assert tokenizer.decode(first.input_ids) == expected
    assert (first.ignore_eos, first.top_k, first.top_p, first.max_tokens) == (None, None, None, 200)  # greedy


def test_an_answer_that_runs_out_of_tokens_is_truncated_and_wrong(problems, tokenizer):
    # <|channel|>, analysis, <|message|>, 7: 1 + 8 + 1 + 1 tokens, so 12 hold the 77, which is no answer.
    client = FakeClient(Model(tokenizer), finish_reason="length")
    high = run(client, problems, tokenizer, efforts=("high",), max_tokens=12).efforts["high"]
    assert (high.requests.truncated, high.requests.completed, high.accuracy) == (4, 0, 0.0)
    assert {answer.final for answer in high.answers} == {None}
    assert high.mean_output_tokens == 12


def test_failed_requests_are_left_out_of_the_accuracy_and_counted(problems, tokenizer):
    model = Model(tokenizer)

    def script(index, request):
        return ServeError("queue is full", status="UNAVAILABLE") if index == 1 else model(index, request)

    high = run(FakeClient(script, finish_reason="stop"), problems, tokenizer, efforts=("high",)).efforts["high"]
    assert (high.accuracy, high.num_correct, high.requests.failed, high.requests.answered) == (1.0, 3, 1, 3)
    assert high.errors == {"queue is full": 1}
    assert high.answers[1].correct is False


def test_a_stock_server_gets_text_and_its_text_is_graded(problems, tokenizer):
    client = FakeClient(lambda *_: [[1]], gives_token_ids=False, finish_reason="stop")
    result = run(client, problems, tokenizer, efforts=("low",), grader="regex")
    assert client.requests[0].prompt.endswith("<|start|>assistant")
    assert result.efforts["low"].answers[0].final == "x"


def test_the_tokens_of_a_server_that_tells_no_counts_are_those_of_its_text(problems, tokenizer):
    client = FakeClient(lambda *_: [[1] * 25], gives_token_ids=False, finish_reason="stop")
    result = run(client, problems, tokenizer, efforts=("low",), grader="regex")
    # One response of 25 characters, each a token of this tokenizer.
    assert (result.token_counts, result.efforts["low"].mean_output_tokens) == ("tokenizer", 25)
    counted = run(FakeClient(Model(tokenizer), finish_reason="stop"), problems, tokenizer, efforts=("low",))
    assert counted.token_counts == "server"


def test_an_evaluation_survives_its_file(problems, tokenizer, tmp_path):
    result = run(FakeClient(Model(tokenizer), finish_reason="stop"), problems, tokenizer, limit=2)
    assert len(result.efforts["low"].answers) == 2
    assert EvaluationResult.load(result.save(tmp_path / "evaluation.json")) == result


def test_an_interrupted_evaluation_goes_on_where_it_stopped(problems, tokenizer, tmp_path):
    out, model = tmp_path / "evaluation.json", Model(tokenizer)

    def until_somebody_presses_ctrl_c(index, request):
        if index == len(PROBLEMS) + 1:
            raise KeyboardInterrupt
        return model(index, request)

    with pytest.raises(KeyboardInterrupt):
        run(FakeClient(until_somebody_presses_ctrl_c, finish_reason="stop"), problems, tokenizer, out=out)
    saved = EvaluationResult.load(out)
    assert list(saved.efforts) == ["low"]
    second = FakeClient(model, finish_reason="stop")
    result = run(second, problems, tokenizer, out=out)
    assert result == EvaluationResult.load(out)
    assert list(result.efforts) == ["low", "high"] and result.efforts["low"] == saved.efforts["low"]
    assert len(second.requests) == len(PROBLEMS)
    assert all("effort: high" in tokenizer.decode(request.input_ids) for request in second.requests)


def test_efforts_measured_later_stand_beside_the_earlier_ones_in_their_order(problems, tokenizer, tmp_path):
    out = tmp_path / "evaluation.json"
    client = FakeClient(Model(tokenizer), finish_reason="stop")
    run(client, problems, tokenizer, efforts=("high",), out=out)
    assert list(run(client, problems, tokenizer, efforts=("low",), out=out).efforts) == ["low", "high"]
    num_asked = len(client.requests)
    assert list(run(client, problems, tokenizer, out=out).efforts) == ["low", "high"]
    assert len(client.requests) == num_asked == 2 * len(PROBLEMS)


def test_every_effort_tells_the_run_that_measured_it(problems, tokenizer, tmp_path, monkeypatch):
    out, client = tmp_path / "evaluation.json", FakeClient(Model(tokenizer), finish_reason="stop")
    for number, effort in enumerate(("high", "low", "medium", "low"), 1):
        monkeypatch.setattr("sys.argv", ["puzzle-trtllm", f"run-{number}"])
        run(client, problems, tokenizer, efforts=(effort,), out=out)
    result = EvaluationResult.load(out)
    earlier = {effort: run.command_line for effort, run in result.earlier_provenance.items()}
    assert earlier == {"low": "puzzle-trtllm run-2", "high": "puzzle-trtllm run-1"}
    assert result.provenance.command_line == "puzzle-trtllm run-3"  # the fourth measured nothing
    saved = out.read_text()
    assert run(client, problems, tokenizer, efforts=("low",), out=out) == result and out.read_text() == saved


def test_a_file_of_another_evaluation_is_refused_and_kept(problems, tokenizer, tmp_path):
    out = tmp_path / "evaluation.json"
    client = FakeClient(Model(tokenizer), finish_reason="stop")
    earlier = run(client, problems, tokenizer, efforts=("low",), out=out)
    num_asked = len(client.requests)
    for change, message in (
        ({"max_tokens": 100}, r"max_tokens: holds another evaluation.*\(found 200, expected 100\)"),
        ({"concurrency": 4}, r"concurrency: holds another evaluation"),
        ({"grader": "regex"}, r"grader: holds another evaluation.*\(found numeric, expected regex\)"),
        ({"limit": 2}, r"problems_fingerprint: holds another evaluation"),
        ({"name": "b"}, r"name: holds another evaluation"),
    ):
        with pytest.raises(BenchError, match=r"evaluation\.json: " + message):
            run(client, problems, tokenizer, out=out, **change)
    assert len(client.requests) == num_asked and EvaluationResult.load(out) == earlier


def test_sampled_answers_are_asked_for_with_a_seed_a_problem_and_are_another_evaluation(problems, tokenizer, tmp_path):
    out = tmp_path / "evaluation.json"
    client = FakeClient(Model(tokenizer), finish_reason="stop")
    sampled = Decoding(temperature=1.0, top_p=0.9, seed=7)
    result = run(client, problems, tokenizer, efforts=("low",), concurrency=1, decoding=sampled, out=out)
    asked = [(request.temperature, request.top_p, request.seed) for request in client.requests]
    assert asked == [(1.0, 0.9, 7), (1.0, 0.9, 8), (1.0, 0.9, 9), (1.0, 0.9, 10)]
    assert EvaluationResult.load(out) == result and str(result.decoding) == "temperature 1, top_p 0.9, seed 7"
    with pytest.raises(BenchError, match=r"decoding: holds another.*\(found temperature 1, .*, expected greedy\)"):
        run(client, problems, tokenizer, concurrency=1, out=out)


def test_a_temperature_alone_is_no_greedy_decoding():
    """Servers before TensorRT-LLM 1.2 would take it for one: there sampling starts with top_p."""
    assert Decoding(temperature=0.7).of_problem(2) == {"temperature": 0.7, "top_p": 1.0, "seed": 2}
    assert Decoding().of_problem(2) == {}


def test_files_from_before_sampling_are_greedy(problems, tokenizer, tmp_path):
    out = tmp_path / "evaluation.json"
    run(FakeClient(Model(tokenizer), finish_reason="stop"), problems, tokenizer, efforts=("low",), out=out)
    older = json.loads(out.read_text())
    del older["decoding"]
    out.write_text(json.dumps(older))
    result = run(FakeClient(Model(tokenizer), finish_reason="stop"), problems, tokenizer, out=out)
    assert list(result.efforts) == ["low", "high"] and str(result.decoding) == "greedy"


def test_an_engine_that_was_built_otherwise_since_is_another_evaluation(problems, tokenizer, tmp_path, make_checkpoint):
    client, out = FakeClient(Model(tokenizer), finish_reason="stop"), tmp_path / "evaluation.json"
    config = EngineConfig(runtime="reference", kv_dtype="bf16")
    engine = build_engine(make_checkpoint([(4, None)]), tmp_path / "e", config=config)
    run(client, problems, tokenizer, efforts=("low",), engine=engine.path, out=out)
    assert len(run(client, problems, tokenizer, engine=engine.path, out=out).efforts) == 2
    with pytest.raises(BenchError, match=r"engine: holds another evaluation.*\(found \S*/e, expected none\)"):
        run(client, problems, tokenizer, efforts=("medium",), out=out)
    args = engine.path / "llm_args.yaml"
    written = args.read_text()
    args.write_text(written + "stream_interval: 20\n")
    with pytest.raises(BenchError, match=r"engine: holds another evaluation.*\(found \S*/e, built otherwise, expected"):
        run(client, problems, tokenizer, efforts=("medium",), engine=engine.path, out=out)
    args.write_text(written)
    again = config.model_copy(update={"memory_bytes": 1_000_000})
    build_engine(make_checkpoint([(4, None)]), engine.path, config=again, overwrite=True)
    with pytest.raises(BenchError, match=r"engine: holds another evaluation.*\(found \S*/e, built otherwise, expected"):
        run(client, problems, tokenizer, efforts=("medium",), engine=engine.path, out=out)


def test_a_server_that_counts_otherwise_does_not_go_on(problems, tokenizer, tmp_path):
    out = tmp_path / "evaluation.json"
    run(FakeClient(Model(tokenizer), finish_reason="stop"), problems, tokenizer, efforts=("low",), out=out)
    stock = FakeClient(lambda *_: [[1]], gives_token_ids=False, finish_reason="stop")
    with pytest.raises(BenchError, match=r"token_counts: .*\(found server, expected tokenizer\)"):
        run(stock, problems, tokenizer, out=out)
    assert stock.requests == []


def test_bad_input_is_refused_before_anything_is_sent(problems, tokenizer, tmp_path):
    client = FakeClient(Model(tokenizer))
    with pytest.raises(ConfigError, match="unknown grader"):
        run(client, problems, tokenizer, grader="vibes")
    for efforts, message in (
        (("low", "hihg"), r"unknown reasoning effort \(found 'hihg', expected low, medium, high\)"),
        (("low,medium,high",), "unknown reasoning effort"),
        (("low", "low"), r"named twice \(found low\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(client, problems, tokenizer, efforts=efforts)
    with pytest.raises(ConfigError, match="no reasoning effort"):
        run(client, problems, tokenizer, efforts=())
    words = tmp_path / "words.jsonl"
    words.write_text('{"id": "a", "prompt": "b", "answer": "three"}\n')
    message = r"words\.jsonl: problem a: answer: the numeric grader needs a number .found 'three'"
    with pytest.raises(ConfigError, match=message):
        run(client, words, tokenizer)
    assert client.requests == []


def test_zero_successful_requests_are_one_clear_line(problems, tokenizer):
    client = FakeClient(lambda *_: ServeError("model not ready", status="UNAVAILABLE"))
    with pytest.raises(BenchError, match=r"zero successful requests.*model not ready"):
        run(client, problems, tokenizer)


def test_efforts_that_were_finished_survive_a_later_failure(problems, tokenizer):
    model = Model(tokenizer)

    def script(index, request):
        return model(index, request) if index < len(PROBLEMS) else ServeError("engine died", status="UNAVAILABLE")

    with pytest.raises(UnfinishedEvaluationError, match=r"zero successful requests.*engine died") as caught:
        run(FakeClient(script, finish_reason="stop"), problems, tokenizer)
    assert list(caught.value.finished.efforts) == ["low"]
    assert caught.value.finished.efforts["low"].accuracy == 0.25
