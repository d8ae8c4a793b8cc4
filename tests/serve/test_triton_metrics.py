"""The server's own metrics, with fakes for Triton and the runtime: what waits, what runs, what died."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from puzzle_trtllm.serve.runtimes.api import EngineDeadError
from puzzle_trtllm.serve.triton import metrics as metrics_module
from puzzle_trtllm.serve.triton.metrics import KvBlocks, MetricsThread, kv_blocks, num_active, num_steps
from tests.serve.fake_session import Sender, accept, begin, open_service
from tests.serve.scripted import HANG_S, wait_until


@pytest.fixture
def service():
    with open_service() as opened:
        yield opened


class Family:
    """pb_utils.MetricFamily, remembering in one table."""

    GAUGE, COUNTER = "gauge", "counter"
    values: dict[str, float]

    def __init__(self, *, name: str, description: str, kind: str) -> None:
        self.name, self.kind = name, kind

    def Metric(self, *, labels: dict[str, str]):
        key = self.name + (f"/{labels['end']}" if "end" in labels else "")
        assert labels["model"] == "tensorrt_llm"

        def set_(value: float) -> None:
            assert self.kind == "gauge"
            self.values[key] = value

        def increment(value: float) -> None:
            assert self.kind == "counter"
            self.values[key] = self.values.get(key, 0) + value

        return SimpleNamespace(set=set_, increment=increment)


@pytest.fixture
def metrics(service):
    Family.values = {}
    return MetricsThread(service.session, service.outbox, service.llm, metric_family=Family, log=lambda m: None)


def test_metrics_tell_waiting_from_running_and_count_tokens(service, metrics) -> None:
    (one, first), (_, second) = begin(service, streaming=True), begin(service, streaming=True)
    first.push("a")
    wait_until(lambda: len(one.responses) == 1, what="a response")
    metrics.publish()
    assert (Family.values["puzzle_requests_waiting"], Family.values["puzzle_requests_running"]) == (1, 1)
    first.push("b", None)
    second.push(RuntimeError("odd"))
    wait_until(lambda: service.session.queue_lengths() == (0, 0), what="the ends")
    wait_until(lambda: service.outbox.answers_sent == 1, what="the answer has left")
    metrics.publish()
    metrics.publish()
    expected = {
        "puzzle_engine_up": 1, "puzzle_requests_waiting": 0, "puzzle_requests_running": 0,
        "puzzle_prompt_tokens_total": 3, "puzzle_output_tokens_total": 2,
        "puzzle_requests_total/ok": 1, "puzzle_requests_total/internal": 1,
    }  # fmt: skip
    assert {name: Family.values.get(name) for name in expected} == expected


def test_ranks_under_attention_data_parallelism_are_added_up() -> None:
    """Rows as TensorRT-LLM fans them out: `numActiveRequests` is rank 0's in all of them."""

    def row(step: int, rank: int, scheduled: int) -> dict[str, object]:
        ifb = {"numScheduledRequests": scheduled}
        return {"iter": step, "attentionDpRank": rank, "numActiveRequests": 3, "inflightBatchingStats": ifb}

    before, now = [row(6, rank, 9) for rank in range(3)], [row(7, 0, 3), row(7, 1, 0), row(7, 2, 4)]
    assert num_active([*before, *now]) == 7
    assert num_active([row(7, 0, 1)]) == 3  # two of its requests had no turn in this step
    assert num_active([{"iter": 7}]) is None and num_active([]) is None


@pytest.mark.parametrize(
    ("active", "waiting", "running"),
    [(None, 2, 0), (0, 2, 0), (1, 1, 1), (2, 0, 2), (5, 0, 2)],  # 5: what ran a step ago
)
def test_what_runs_is_what_the_engine_is_at_work_on(service, metrics, active, waiting: int, running: int) -> None:
    """Of requests that are not streaming nothing is seen before their end."""
    begin(service), begin(service)
    service.llm.stats = [{"iter": 7} if active is None else {"iter": 7, "numActiveRequests": active}]
    metrics._watch_engine()
    metrics.publish()
    assert (Family.values["puzzle_requests_waiting"], Family.values["puzzle_requests_running"]) == (waiting, running)


def test_a_request_with_a_token_runs_whatever_the_engine_says(service, metrics) -> None:
    (_, first), (_, second) = begin(service, streaming=True), begin(service, streaming=True)
    first.push("a"), second.push("a")
    wait_until(lambda: service.session.queue_lengths() == (0, 2), what="two tokens")
    service.llm.stats = ['{"numActiveRequests": 1}']
    metrics._watch_engine()
    metrics.publish()
    assert (Family.values["puzzle_requests_waiting"], Family.values["puzzle_requests_running"]) == (0, 2)


def test_the_metrics_notice_that_an_idle_engine_died(service, metrics) -> None:
    service.llm.stats = EngineDeadError("killed while idle")
    metrics._watch_engine()
    wait_until(lambda: service.session.death == "killed while idle", what="the death")
    metrics.publish()
    assert Family.values["puzzle_engine_up"] == 0


def test_the_metrics_notice_that_the_engines_process_has_gone(service, metrics) -> None:
    with subprocess.Popen(["true"]) as gone:  # which is waited for at the end: until then nobody else has its pid
        os.waitid(os.P_PID, gone.pid, os.WEXITED | os.WNOWAIT)
        service.llm.engine_pid = gone.pid
        metrics._watch_engine()
        wait_until(lambda: service.session.death == "its process has ended", what="the death")


# --- an engine that lives and makes no steps ------------------------------------------------------------------------


@pytest.fixture
def look(service, monkeypatch) -> Callable[..., float]:
    """`look(seconds, steps)`: the thread's next look, so much later, at an engine that has made so many steps; returns
    the metric. After ten seconds without a step it is dead."""
    now_s = [1000.0]
    monkeypatch.setattr(metrics_module, "time", SimpleNamespace(monotonic=lambda: now_s[0]))
    Family.values = {}
    thread = MetricsThread(
        service.session, service.outbox, service.llm, metric_family=Family, step_timeout_s=10, log=lambda m: None
    )

    def look(seconds: float, steps: int | None) -> float:
        now_s[0] += seconds
        service.llm.stats = [] if steps is None else [{"iter": steps}]
        thread._watch_engine()
        thread._watch_steps()
        thread.publish()
        return Family.values["puzzle_seconds_without_step"]

    return look


def test_an_engine_that_ends_no_step_while_requests_wait_is_dead(service, look) -> None:
    sender, _ = begin(service)
    assert [look(3, steps) for steps in (5, 6, 6, 6, 7, 7)] == [0, 0, 3, 6, 0, 3]
    assert service.session.death is None
    look(3, 7), look(4, 7)
    assert sender.error == ("UNAVAILABLE", "the engine is dead: no step of it ended in 10 s (step_timeout_s)")


def test_an_engine_without_requests_need_not_make_steps(service, look) -> None:
    assert [look(4, 5) for _ in range(9)] == [0] * 9
    _, result = begin(service)
    assert look(4, 5) == 4
    result.push("a", None)
    wait_until(lambda: service.session.queue_lengths() == (0, 0), what="the end")
    assert look(4, 5) == 0 and service.session.death is None


def test_an_engine_makes_no_steps_for_texts_that_are_not_yet_tokens(service, look) -> None:
    """Long ones take turns; a minute each of ten that are all too long is nothing that the engine has heard of."""
    read, begun = threading.Event(), threading.Event()

    def encode(text: str) -> list[int]:
        begun.set()
        assert read.wait(HANG_S)
        return [1]

    service.llm.tokenizer = SimpleNamespace(encode=encode)
    accept(service, Sender(), text="ab" * 10_000)
    assert begun.wait(HANG_S) and [look(4, 5) for _ in range(4)] == [0] * 4
    read.set()
    wait_until(lambda: len(service.llm.results) == 1, what="submission")
    assert look(4, 5) == 4 and service.session.death is None


def test_a_runtime_that_counts_no_steps_is_not_accused(service, look) -> None:
    begin(service)
    assert [look(4, None) for _ in range(9)] == [0] * 9


def test_an_engine_whose_tokens_arrive_makes_steps_whatever_its_statistics_say(service, look) -> None:
    _, result = begin(service)
    for count in (1, 2, 3):
        look(4, 5)
        result.push("a")
        wait_until(lambda count=count: service.session.totals.output_tokens == count, what="the token")
        assert look(4, 5) == 0


def test_a_runtime_that_stops_giving_statistics_is_not_accused(service, look, monkeypatch) -> None:
    begin(service)
    assert [look(4, 5), look(4, 5)] == [0, 4]
    monkeypatch.setattr(service.llm, "get_stats", lambda timeout: 1 / 0)
    assert [look(4, 5) for _ in range(9)] == [0] * 9


def test_a_model_that_was_stopped_itself_accuses_nobody(service, look) -> None:
    """The whole machine may have slept."""
    begin(service)
    look(1, 5)
    assert look(3600, 5) == 5 and service.session.death is None


def test_kv_blocks_come_as_dicts_or_json() -> None:
    stats = {"kvCacheStats": {"usedNumBlocks": 3, "maxNumBlocks": 10}}
    counted = KvBlocks(used=3, total=10)
    assert kv_blocks([{}, stats]) == counted
    assert kv_blocks(['{"kvCacheStats": {"usedNumBlocks": 3, "maxNumBlocks": 10}}']) == counted
    stats["kvCacheStats"] |= {"reusedBlocks": 4, "missedBlocks": 5}
    assert kv_blocks([stats]) == KvBlocks(used=3, total=10, reused=4, missed=5)
    assert kv_blocks([]) is None and kv_blocks([{"iter": 1}]) is None


def test_steps_come_as_dicts_or_json() -> None:
    assert num_steps([{"iter": 3}, {"iter": 7}]) == num_steps(['{"iter": 7}']) == 7
    assert num_steps([]) is None and num_steps([{}]) is None
