"""`evaluate`: every problem at every reasoning effort, through the server, and graded.

The client renders the chat template (Triton's model knows none) and sends token ids, so that special tokens mean what
they meant in training. Token ids come back too and are decoded here with special tokens kept: only then are channels
unambiguous. A stock server gets and gives text, whose tokens are counted by encoding it again (token_counts.py).

An effort is saved as soon as it is measured; the same evaluation started again measures only what is missing.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from puzzle_trtllm.chat import REASONING_EFFORTS, ChatTokenizer
from puzzle_trtllm.errors import BenchError, ConfigError, PuzzleError
from puzzle_trtllm.serve.bench.load import Answer, errors_of, hold_concurrency
from puzzle_trtllm.serve.bench.progress import LoadProgress
from puzzle_trtllm.serve.bench.result import TokenCounts
from puzzle_trtllm.serve.bench.target import Connect, Target, connect_triton, prompt_tokenizer
from puzzle_trtllm.serve.bench.token_counts import count_by_tokenizer
from puzzle_trtllm.serve.client.request import GenerationRequest
from puzzle_trtllm.serve.evaluate.answers import final_answer, final_answer_of_tokens
from puzzle_trtllm.serve.evaluate.graders import Grader, find_grader
from puzzle_trtllm.serve.evaluate.problems import Problem, ProblemSet, load_problems
from puzzle_trtllm.serve.evaluate.result import GREEDY, Decoding, EffortResult, EvaluationResult, GradedAnswer
from puzzle_trtllm.serve.metrics.provenance import Provenance
from puzzle_trtllm.serve.metrics.records import RequestCounts
from puzzle_trtllm.serve.metrics.statistics import wilson_interval

SAME_EVALUATION = ("name", "url", "problems_fingerprint", "grader", "max_tokens", "decoding", "concurrency")
"""What two evaluations have in common whose efforts may stand in one file."""


class UnfinishedEvaluationError(BenchError):
    """An effort failed after others were finished."""

    def __init__(self, message: str, finished: EvaluationResult) -> None:
        super().__init__(message)
        self.finished = finished
        """Holds the efforts before."""


def evaluate(
    url: str,
    *,
    problems: str | Path,
    tokenizer_folder: str | Path,
    concurrency: int,
    max_tokens: int,
    decoding: Decoding = GREEDY,
    efforts: Sequence[str] = REASONING_EFFORTS,
    grader: str = "numeric",
    limit: int | None = None,
    prompt_key: str = "prompt",
    answer_key: str = "answer",
    engine: str | Path | None = None,
    name: str | None = None,
    out: str | Path | None = None,
    connect: Connect = connect_triton,
    quiet: bool = False,
) -> EvaluationResult:
    """Evaluate the server at `url` on a problem set at each of `efforts`, `concurrency` problems at a time.

    tokenizer_folder: the checkpoint (or an engine's `model/`) whose chat template and tokenizer the server's model has.
    max_tokens: room for reasoning and answer; an answer that needs more is truncated.
    decoding: greedy, or sampled; equal seeds draw equal answers from equal servers.
    limit: only the first so many problems. prompt_key, answer_key: what the problem set calls them.
    engine: the engine folder behind the URL, for provenance.
    out: the result's file, written after every effort; efforts that it holds already are not measured again.

    Raises ConfigError for a bad problem set, grader or effort, CheckpointError for a bad tokenizer folder, BenchError
    for an `out` that holds another evaluation, or when an effort has no successful request (UnfinishedEvaluationError
    with the efforts before it, if there are any), ServeError when nobody answers.
    """
    grade = find_grader(grader)
    problem_set = load_problems(problems, limit=limit, prompt_key=prompt_key, answer_key=answer_key)
    _check_answers(problem_set, grade)
    _check_efforts(efforts)
    tokenizer = prompt_tokenizer(engine=engine, tokenizer_folder=tokenizer_folder)
    result = EvaluationResult(
        name=name or url,
        url=url,
        problems_file=str(problem_set.file),
        problems_fingerprint=problem_set.fingerprint,
        grader=grader,
        max_tokens=max_tokens,
        decoding=decoding,
        concurrency=concurrency,
        efforts={},
        provenance=Provenance.collect(engine=engine),
    )
    if out is not None and Path(out).exists():
        earlier = _load_same(Path(out), result)
        if set(efforts) <= set(earlier.efforts):
            return earlier  # as it is: this run measured nothing that its provenance could stand for
        result = result.going_on_from(earlier)
    missing = [effort for effort in efforts if effort not in result.efforts]
    run = _measure_efforts(result, missing, problem_set, tokenizer, grade, out=out, connect=connect, quiet=quiet)
    result, failure = asyncio.run(run)
    if failure is not None:
        raise UnfinishedEvaluationError(str(failure), finished=result) if result.efforts else failure
    return result


def _load_same(file: Path, result: EvaluationResult) -> EvaluationResult:
    """What `file` holds. Raises BenchError when that is not the evaluation that `result` is."""
    earlier = EvaluationResult.load(file)
    differences = {key: (getattr(earlier, key), getattr(result, key)) for key in SAME_EVALUATION}
    then, now = earlier.provenance.engine, result.provenance.engine
    if then is None or now is None:
        differences["engine"] = ((then and then.path) or "none", (now and now.path) or "none")
    elif not then.describes(now):
        differences["engine"] = (f"{then.path}, built otherwise", now.path)
    for key, (found, expected) in differences.items():
        if found != expected:
            message = "holds another evaluation; remove it or write elsewhere"
            raise BenchError(message, file=file, key=key, found=found, expected=expected)
    return earlier


def _check_answers(problem_set: ProblemSet, grade: Grader) -> None:
    """A problem that this grader cannot grade is an error now, not after an hour."""
    for problem in problem_set.problems:
        try:
            grade("", problem.answer)
        except ConfigError as error:
            raise ConfigError(f"problem {problem.id}: {error}", file=problem_set.file) from None


def _check_efforts(efforts: Sequence[str]) -> None:
    """Not every chat template refuses an effort that it does not know."""
    known = ", ".join(REASONING_EFFORTS)
    if not efforts:
        raise ConfigError("no reasoning effort to evaluate", expected=known)
    for effort, times in Counter(efforts).items():
        if effort not in REASONING_EFFORTS:
            raise ConfigError("unknown reasoning effort", key="effort", found=repr(effort), expected=known)
        if times > 1:
            raise ConfigError("a reasoning effort named twice", key="effort", found=effort)


async def _measure_efforts(
    result: EvaluationResult,
    efforts: Sequence[str],
    problem_set: ProblemSet,
    tokenizer: ChatTokenizer,
    grade: Grader,
    *,
    out: str | Path | None,
    connect: Connect,
    quiet: bool,
) -> tuple[EvaluationResult, PuzzleError | None]:
    """`result` with `efforts`, one after the other, so that each has a rate of its own; and what ended them early."""
    async with connect(result.url) as target:
        token_counts: TokenCounts = "server" if target.gives_token_ids else "tokenizer"
        if result.token_counts not in (None, token_counts):
            problem = "efforts already measured have their tokens counted in another way"
            raise BenchError(problem, key="token_counts", found=result.token_counts, expected=token_counts)
        for effort in efforts:
            try:
                answers = await _answers(target, result, problem_set, tokenizer, effort, quiet=quiet)
                graded = grade_effort(answers, problem_set.problems, tokenizer, grade, effort=effort)
                result = result.with_effort(effort, graded, token_counts)
                if out is not None:
                    result.save(out)
            except PuzzleError as error:
                return result, error
    return result, None


async def _answers(
    target: Target,
    result: EvaluationResult,
    problem_set: ProblemSet,
    tokenizer: ChatTokenizer,
    effort: str,
    *,
    quiet: bool,
) -> list[Answer]:
    """Of one effort, in the order of the problems."""
    requests = [
        _request(
            problem,
            tokenizer,
            effort,
            as_ids=target.gives_token_ids,
            max_tokens=result.max_tokens,
            **result.decoding.of_problem(index),
        )
        for index, problem in enumerate(problem_set.problems)
    ]
    title = f"{result.name} at {effort} effort"
    with LoadProgress(title, num_requests=len(requests), quiet=quiet) as progress:
        answers = await hold_concurrency(
            target.stream, requests, concurrency=result.concurrency, is_truncated=_ran_out, observer=progress
        )
    counted = answers if target.gives_token_ids else count_by_tokenizer(answers, tokenizer)
    return [_with_its_end(answer) for answer in counted]


def _with_its_end(answer: Answer) -> Answer:
    """An answer that the model ended at once has failed no more than another: its one token is the end itself."""
    record = answer.record
    if record.token_times_ns or answer.finish_reason is None:
        return answer
    return replace(answer, record=replace(record, status="completed", error=None, token_times_ns=(record.end_ns,)))


def _request(
    problem: Problem, tokenizer: ChatTokenizer, effort: str, *, as_ids: bool, **fields: Any
) -> GenerationRequest:
    """One response a request: nobody times the tokens of an evaluation, and receiving them one by one costs CPU."""
    prompt = tokenizer.render_chat([{"role": "user", "content": problem.prompt}], reasoning_effort=effort)
    if as_ids:
        return GenerationRequest(input_ids=tokenizer.encode(prompt), streaming=False, **fields)
    return GenerationRequest(prompt=prompt, streaming=False, **fields)


def _ran_out(request: GenerationRequest, num_tokens: int, finish_reason: str | None) -> bool:
    """True when the answer ended because its tokens did; a server that gives no reason is judged by the count."""
    if finish_reason is not None:
        return finish_reason == "length"
    return request.max_tokens is not None and num_tokens >= request.max_tokens


def grade_effort(
    answers: Sequence[Answer],
    problems: Sequence[Problem],
    tokenizer: ChatTokenizer,
    grade: Grader,
    *,
    effort: str,
) -> EffortResult:
    """Grade one effort's answers (in the order of `problems`). Raises BenchError when none succeeded."""
    records = [answer.record for answer in answers]
    counts = RequestCounts.of(records)
    if not counts.answered:
        first = next(errors_of(answers), "no reason given")
        raise BenchError(f"zero successful requests at {effort} effort ({counts}); the first says: {first}")
    graded = [
        _grade_answer(answer, problem, tokenizer, grade) for answer, problem in zip(answers, problems, strict=True)
    ]
    num_correct = sum(answer.correct for answer in graded)
    low, high = wilson_interval(num_correct, counts.answered)
    wall_s = (max(record.end_ns for record in records) - min(record.sent_ns for record in records)) / 1e9
    return EffortResult(
        accuracy=num_correct / counts.answered,
        accuracy_low=low,
        accuracy_high=high,
        num_problems=len(problems),
        num_correct=num_correct,
        requests=counts,
        errors=dict(Counter(errors_of(answers))),
        mean_output_tokens=sum(r.num_output_tokens for r in records if r.is_answered) / counts.answered,
        measured_requests_per_s=counts.answered / wall_s,
        wall_s=wall_s,
        answers=graded,
    )


def _grade_answer(answer: Answer, problem: Problem, tokenizer: ChatTokenizer, grade: Grader) -> GradedAnswer:
    final = None
    if answer.record.is_answered:
        ids = answer.token_ids
        final = final_answer_of_tokens(ids, tokenizer) if ids else final_answer(answer.text)
    return GradedAnswer(
        id=problem.id,
        correct=final is not None and grade(final, problem.answer),
        final=final,
        num_output_tokens=answer.record.num_output_tokens,
        status=answer.record.status,
    )
