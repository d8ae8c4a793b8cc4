"""How the reference runtime's engine process ends: killed, stopped, with its front, or with the LLM that held it."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict

import pytest

from puzzle_trtllm.process_states import StoppedProcesses, is_alive
from puzzle_trtllm.serve.runtimes.reference import LLM, EngineDeadError, SamplingParams, processes
from tests.serve.scripted import HANG_S, wait_until

ARGS = {"dtype": "float32", "max_seq_len": 16_384, "max_batch_size": 8, "kv_cache_config": {"tokens_per_block": 8}}
PROMPT = [*range(7, 27)]
LONG = SamplingParams(max_tokens=230, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=16_000, ignore_eos=True)
"""A quarter of a minute on a fast machine: still at work whenever something is done to the engine."""


@pytest.fixture(scope="module")
def child(make_checkpoint):
    return make_checkpoint([(6, 24), (4, None), (3, 40), (2, 24)], seed=3)


def test_an_engine_imports_nothing_from_the_folder_where_it_is_started(child, monkeypatch, tmp_path):
    (tmp_path / "random.py").write_text("raise ImportError('the wrong one')")
    monkeypatch.chdir(tmp_path)
    with LLM(child, **ARGS) as llm:
        assert len(llm.generate(PROMPT, SamplingParams(max_tokens=3, ignore_eos=True)).outputs[0].token_ids) == 3


def test_a_killed_engine_fails_open_and_new_requests_and_leaves_no_process(child):
    llm = LLM(child, **ARGS)
    request = llm.generate_async(PROMPT, ENDLESS, streaming=True)
    os.kill(llm.engine_pid, signal.SIGKILL)
    with pytest.raises(EngineDeadError, match="died"):
        request.result(timeout=HANG_S)
    with pytest.raises(EngineDeadError):
        llm.generate(PROMPT)
    llm.shutdown()


def test_an_engine_that_takes_nothing_holds_up_neither_callers_nor_the_end(child, monkeypatch):
    """It takes messages between steps, and a step may be long: here it is stopped altogether, and never given up."""
    monkeypatch.setattr("puzzle_trtllm.serve.runtimes.reference.processes._MAX_LOOKS", 1_000_000)
    monkeypatch.setattr("puzzle_trtllm.serve.runtimes.reference.llm._STOP_SECONDS", 0.5)
    llm = LLM(child, **ARGS)
    os.kill(llm.engine_pid, signal.SIGSTOP)
    requests = [llm.generate_async(PROMPT * 12) for _ in range(400)]  # more than a socket holds
    requests[0].abort()
    llm.shutdown()
    assert not is_alive(llm.engine_pid)
    with pytest.raises(EngineDeadError, match="shut down"):
        requests[-1].result(timeout=HANG_S)


def test_an_engine_that_cannot_even_be_killed_does_not_hold_up_the_end(child, monkeypatch):
    """As one in uninterruptible sleep, which goes when it wakes up."""
    monkeypatch.setattr("puzzle_trtllm.serve.runtimes.reference.processes._MAX_LOOKS", 1_000_000)
    monkeypatch.setattr("puzzle_trtllm.serve.runtimes.reference.llm._STOP_SECONDS", 0.2)
    monkeypatch.setattr("puzzle_trtllm.serve.runtimes.reference.processes._EXIT_CODE_SECONDS", 0.2)
    llm = LLM(child, **ARGS)
    os.kill(llm.engine_pid, signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr("subprocess.Popen.kill", lambda _: None)
        llm.shutdown()
    assert is_alive(llm.engine_pid)
    os.kill(llm.engine_pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(llm.engine_pid), what="its end")


@pytest.fixture
def looks(monkeypatch) -> defaultdict[int, list[int]]:
    """By process, what each look at it found: how many in a row have found it stopped. Ten looks a second."""
    monkeypatch.setattr(processes, "_LOOK_SECONDS", 0.1)
    looks: defaultdict[int, list[int]] = defaultdict(list)
    look = StoppedProcesses.given_up

    def given_up(self: StoppedProcesses, pid: int) -> bool:
        given_up = look(self, pid)
        looks[pid].append(self._looks[pid])
        return given_up

    monkeypatch.setattr(StoppedProcesses, "given_up", given_up)
    return looks


def test_a_stopped_engine_is_given_some_seconds():
    """Constants, since the tests look more often."""
    assert (processes._LOOK_SECONDS, processes._MAX_LOOKS) == (1.0, 8)


def test_an_engine_that_is_stopped_for_long_is_given_up(child, looks):
    with LLM(child, **ARGS) as llm:
        request = llm.generate_async(PROMPT, ENDLESS)
        stopped = time.monotonic()
        os.kill(llm.engine_pid, signal.SIGSTOP)
        with pytest.raises(EngineDeadError, match=rf"process {llm.engine_pid}\) was stopped and does not go on"):
            request.result(timeout=HANG_S)
        assert looks[llm.engine_pid][-8:] == [*range(1, 9)] and time.monotonic() - stopped > 0.6
        assert not llm._check_health()
        wait_until(lambda: not is_alive(llm.engine_pid), what="its end")


def test_an_engine_that_is_stopped_for_a_moment_goes_on(child, looks, monkeypatch):
    monkeypatch.setattr(processes, "_MAX_LOOKS", 80)  # for as long as usual: this process may stand still, too
    with LLM(child, **ARGS) as llm:
        request = llm.generate_async(PROMPT, LONG)
        for _ in range(2):
            os.kill(llm.engine_pid, signal.SIGSTOP)
            wait_until(lambda: looks[llm.engine_pid][-1:] >= [3], what="three looks in a row")
            os.kill(llm.engine_pid, signal.SIGCONT)
            wait_until(lambda: looks[llm.engine_pid][-1:] == [0], what="a look at one that goes on")
        assert len(request.result(timeout=HANG_S).outputs[0].token_ids) == 230


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_at_once_leaves_the_engine_to_its_front(child, number):
    """A terminal's Ctrl-C, or a service manager that stops `serve`, whose open requests still have time to end."""
    with LLM(child, **ARGS) as llm:
        request = llm.generate_async(PROMPT, LONG)
        os.kill(llm.engine_pid, number)
        assert len(request.result(timeout=HANG_S).outputs[0].token_ids) == 230
    assert not is_alive(llm.engine_pid)


def test_an_llm_that_is_dropped_takes_its_engine_along_but_not_under_a_request(child):
    llm = LLM(child, **ARGS)
    pid = llm.engine_pid
    request = llm.generate_async(PROMPT, LONG)
    del llm
    gc.collect()
    assert len(request.result(timeout=HANG_S).outputs[0].token_ids) == 230
    del request
    gc.collect()
    wait_until(lambda: not is_alive(pid), what="its end")


def test_an_engine_that_fails_outside_a_step_says_why(child):
    llm = LLM(child, **ARGS)
    request = llm.generate_async(PROMPT, ENDLESS)
    llm._messages.put(b"no message")
    with pytest.raises(EngineDeadError, match="UnpicklingError"):
        request.result(timeout=HANG_S)
    llm.shutdown()


def test_the_engine_does_not_outlive_its_front(child):
    code = (
        "import sys, time; from puzzle_trtllm.serve.runtimes.reference import LLM\n"
        f"llm = LLM({str(child)!r}, dtype='float32', max_seq_len=64, max_batch_size=2)\n"
        "print(llm.engine_pid, flush=True); time.sleep(600)"
    )
    front = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert front.stdout is not None
    pid = int(front.stdout.readline())
    front.kill()
    front.wait()
    wait_until(lambda: not is_alive(pid), what="its end")
