"""How the reference runtime's engine process ends: killed, stopped, with its front, or with the LLM that held it."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time

import pytest

from puzzle_trtllm.process_states import is_alive
from puzzle_trtllm.serve.runtimes.reference import LLM, EngineDeadError, SamplingParams
from tests.serve.scripted import wait_until

ARGS = {"dtype": "float32", "max_seq_len": 256, "max_batch_size": 8, "kv_cache_config": {"tokens_per_block": 8}}
PROMPT = [*range(7, 27)]
LONG = SamplingParams(max_tokens=230, ignore_eos=True)


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
    request = llm.generate_async(PROMPT, LONG, streaming=True)
    os.kill(llm.engine_pid, signal.SIGKILL)
    with pytest.raises(EngineDeadError, match="died"):
        request.result(timeout=10)
    with pytest.raises(EngineDeadError):
        llm.generate(PROMPT)
    llm.shutdown()


def test_an_engine_that_takes_nothing_holds_up_neither_callers_nor_the_end(child, monkeypatch):
    """It takes messages between steps, and a step may be long: here it is stopped altogether."""
    monkeypatch.setattr("puzzle_trtllm.serve.runtimes.reference.llm._STOP_SECONDS", 0.5)
    llm = LLM(child, **ARGS)
    os.kill(llm.engine_pid, signal.SIGSTOP)
    began = time.monotonic()
    requests = [llm.generate_async(PROMPT * 12) for _ in range(400)]  # more than a socket holds
    requests[0].abort()
    llm.shutdown()
    assert time.monotonic() - began < 10 and not is_alive(llm.engine_pid)
    with pytest.raises(EngineDeadError, match="shut down"):
        requests[-1].result(timeout=10)


def test_an_engine_that_cannot_even_be_killed_does_not_hold_up_the_end(child, monkeypatch):
    """As one in uninterruptible sleep, which goes when it wakes up."""
    monkeypatch.setattr("puzzle_trtllm.serve.runtimes.reference.llm._STOP_SECONDS", 0.2)
    monkeypatch.setattr("puzzle_trtllm.serve.runtimes.reference.processes._EXIT_CODE_SECONDS", 0.2)
    llm = LLM(child, **ARGS)
    os.kill(llm.engine_pid, signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr("subprocess.Popen.kill", lambda _: None)
        began = time.monotonic()
        llm.shutdown()
    assert time.monotonic() - began < 5
    os.kill(llm.engine_pid, signal.SIGKILL)


def test_an_engine_that_is_stopped_for_long_is_given_up(child):
    with LLM(child, **ARGS) as llm:
        request = llm.generate_async(PROMPT, LONG)
        stopped = time.monotonic()
        os.kill(llm.engine_pid, signal.SIGSTOP)
        with pytest.raises(EngineDeadError, match=rf"process {llm.engine_pid}\) was stopped and does not go on"):
            request.result(timeout=30)
        assert 6 < time.monotonic() - stopped < 12
        assert not llm._check_health()
        wait_until(lambda: not is_alive(llm.engine_pid), what="its end", timeout_s=10)


def test_an_engine_that_is_stopped_for_a_moment_goes_on(child):
    with LLM(child, **ARGS) as llm:
        request = llm.generate_async(PROMPT, LONG)
        for _ in range(2):
            os.kill(llm.engine_pid, signal.SIGSTOP)
            time.sleep(2.5)
            os.kill(llm.engine_pid, signal.SIGCONT)
        assert len(request.result(timeout=30).outputs[0].token_ids) == 230


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_at_once_leaves_the_engine_to_its_front(child, number):
    """A terminal's Ctrl-C, or a service manager that stops `serve`, whose open requests still have time to end."""
    with LLM(child, **ARGS) as llm:
        request = llm.generate_async(PROMPT, LONG)
        os.kill(llm.engine_pid, number)
        assert len(request.result(timeout=30).outputs[0].token_ids) == 230
    assert not is_alive(llm.engine_pid)


def test_an_llm_that_is_dropped_takes_its_engine_along_but_not_under_a_request(child):
    llm = LLM(child, **ARGS)
    pid = llm.engine_pid
    request = llm.generate_async(PROMPT, LONG)
    del llm
    gc.collect()
    assert len(request.result(timeout=30).outputs[0].token_ids) == 230
    del request
    gc.collect()
    wait_until(lambda: not is_alive(pid), what="its end", timeout_s=10)


def test_an_engine_that_fails_outside_a_step_says_why(child):
    llm = LLM(child, **ARGS)
    request = llm.generate_async(PROMPT, LONG)
    llm._messages.put(b"no message")
    with pytest.raises(EngineDeadError, match="UnpicklingError"):
        request.result(timeout=10)
    llm.shutdown()


def test_the_engine_does_not_outlive_its_front(child):
    code = (
        "import sys, time; from puzzle_trtllm.serve.runtimes.reference import LLM\n"
        f"llm = LLM({str(child)!r}, dtype='float32', max_seq_len=64, max_batch_size=2)\n"
        "print(llm.engine_pid, flush=True); time.sleep(60)"
    )
    front = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert front.stdout is not None
    pid = int(front.stdout.readline())
    front.kill()
    front.wait()
    wait_until(lambda: not is_alive(pid), what="its end", timeout_s=10)
