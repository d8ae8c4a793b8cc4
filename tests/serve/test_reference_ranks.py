"""Several ranks for real: processes, gloo, and what happens when one of them is killed.

That the parts compute the whole is tests/models/test_reference_sharding.py's; here they do it apart from each other.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from puzzle_trtllm.errors import EngineError
from puzzle_trtllm.process_states import is_alive
from puzzle_trtllm.serve.runtimes.reference import LLM, EngineDeadError, SamplingParams, processes
from puzzle_trtllm.serve.runtimes.reference.request import ReferenceRequestOutput
from tests.serve.scripted import HANG_S, wait_until

EIGHT_KV_HEADS = {"num_attention_heads": 16, "num_key_value_heads": 8, "intermediate_size": 288}
ARGS = {
    "dtype": "float32",
    "max_seq_len": 512,
    "max_batch_size": 8,
    "max_num_tokens": 64,
    "kv_cache_config": {"tokens_per_block": 8, "max_gpu_total_bytes": 16_000_000},
}
PARAMS = SamplingParams(max_tokens=40, ignore_eos=True)
LONG_ARGS = {**ARGS, "max_seq_len": 8192, "kv_cache_config": {"tokens_per_block": 8, "max_gpu_total_bytes": 64_000_000}}
ENDLESS = SamplingParams(max_tokens=8000, ignore_eos=True)
"""Tens of seconds with LONG_ARGS: still at work whenever something is done to a rank."""


@pytest.fixture(scope="module")
def child(make_checkpoint) -> Path:
    return make_checkpoint([(16, 24), (8, None), (24, 40)], seed=3, **EIGHT_KV_HEADS)


@pytest.fixture(scope="module")
def expected(child) -> list[list[int]]:
    with LLM(child, **ARGS) as llm:
        return generate(llm)


def prompts() -> list[list[int]]:
    """Twelve, more than a batch and longer than a chunk."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(7, 90, (5 + 8 * i,), generator=generator).tolist() for i in range(12)]


def generate(llm: LLM) -> list[list[int]]:
    return [request.outputs[0].token_ids for request in llm.generate(prompts(), PARAMS)]


def pids_of(llm: LLM) -> list[int]:
    return [rank["pid"] for rank in llm.facts["ranks"]]


def wait_until_gone(pids: list[int]) -> None:
    wait_until(lambda: not any(is_alive(pid) for pid in pids), what="the end of all ranks")


def test_two_ranks_generate_what_one_generates_and_leave_no_process(child, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with LLM(child, tensor_parallel_size=2, moe_expert_parallel_size=2, **ARGS) as llm:
        assert generate(llm) == expected
        ranks, pids = llm.facts["ranks"], pids_of(llm)
        assert [rank["rank"] for rank in ranks] == [0, 1]
        assert pids[0] == llm.engine_pid and len(set(pids)) == 2
        assert [rank["experts"] for rank in ranks] == [[8, 4, 12]] * 2
        assert [(rank["query_heads"], rank["kv_heads"]) for rank in ranks] == [(8, 4)] * 2
        free = llm.get_stats()[0]["kvCacheStats"]
        assert free["freeNumBlocks"] == free["maxNumBlocks"]
        assert list(tmp_path.iterdir()) == [], "what a front that is killed would leave"
    wait_until_gone(pids)


def take_a_step(request: ReferenceRequestOutput) -> None:
    async def step() -> None:
        await asyncio.wait_for(anext(request), HANG_S)

    asyncio.run(step())


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_rank_fails_every_request_within_seconds(child, victim):
    with LLM(child, tensor_parallel_size=2, **LONG_ARGS) as llm:
        requests = [llm.generate_async(prompt, ENDLESS, streaming=True) for prompt in prompts()]
        for _ in range(3):
            take_a_step(requests[0])
        pids = pids_of(llm)
        os.kill(pids[victim], signal.SIGKILL)
        for request in requests:
            with pytest.raises(EngineDeadError, match=rf"rank {victim} .*was killed by SIGKILL"):
                request.result(timeout=HANG_S)  # by itself the other rank would wait for five minutes
        assert not llm._check_health()
        with pytest.raises(EngineDeadError):
            llm.generate_async([8, 9], PARAMS)
        wait_until_gone(pids)


def test_a_rank_that_is_stopped_fails_every_request_and_is_ended(child, monkeypatch):
    """It is alive and keeps its sockets open. Ten looks at it a second, as test_reference_life.py has them."""
    monkeypatch.setattr(processes, "_LOOK_SECONDS", 0.1)
    with LLM(child, tensor_parallel_size=2, **LONG_ARGS) as llm:
        requests = [llm.generate_async(prompt, ENDLESS, streaming=True) for prompt in prompts()]
        take_a_step(requests[0])
        pids = pids_of(llm)
        stopped = time.monotonic()
        os.kill(pids[1], signal.SIGSTOP)
        for request in requests:
            with pytest.raises(EngineDeadError, match=rf"rank 1 .*process {pids[1]}\) was stopped"):
                request.result(timeout=HANG_S)
        assert time.monotonic() - stopped > 0.6
        wait_until_gone(pids)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_rank_outlives_its_front(child, how):
    code = (
        "import sys\n"
        "from puzzle_trtllm.serve.runtimes.reference import LLM, SamplingParams\n"
        f"llm = LLM({str(child)!r}, tensor_parallel_size=2, **{ARGS!r})\n"
        "params = SamplingParams(max_tokens=450, ignore_eos=True)\n"
        "requests = [llm.generate_async([9] * 20, params) for _ in range(40)]\n"
        "print(*[rank['pid'] for rank in llm.facts['ranks']], flush=True)\n"
        "[request.result() for request in requests]\n"
        "sys.stdin.read()\n"
    )
    front = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.PIPE)
    assert front.stdout is not None
    pids = [int(pid) for pid in front.stdout.readline().split()]
    assert len(pids) == 2 and not any(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE for pid in pids)
    front.send_signal(how)
    front.wait(HANG_S)
    wait_until_gone(pids)


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
UNDER_TORCHRUN = "puzzle_trtllm.serve.runtimes.reference.torchrun"


@contextlib.contextmanager
def under_torchrun(script: Path, ranks_wanted: int, child: Path) -> Iterator[subprocess.Popen[str]]:
    script.write_text(
        "import json\n"
        "from puzzle_trtllm.serve.runtimes.reference import LLM, SamplingParams\n"
        f"with LLM({str(child)!r}, tensor_parallel_size={ranks_wanted}, **{ARGS!r}) as llm:\n"
        "    print(json.dumps([rank['pid'] for rank in llm.facts['ranks']]), flush=True)\n"
        f"    results = llm.generate({prompts()!r}, SamplingParams(max_tokens=40, ignore_eos=True))\n"
        "    print(json.dumps([request.outputs[0].token_ids for request in results]), flush=True)\n"
        "    llm.generate([9] * 20, SamplingParams(max_tokens=480, ignore_eos=True))\n"
    )
    command = [sys.executable, *TORCHRUN, "-m", UNDER_TORCHRUN, str(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as launch:
        try:
            yield launch
        finally:
            launch.terminate()


@pytest.mark.slow
def test_torchrun_may_start_the_ranks(child, expected, tmp_path):
    with under_torchrun(tmp_path / "script.py", 2, child) as launch:
        out, _ = launch.communicate(timeout=120)
    pids, tokens = (json.loads(line) for line in out.splitlines())
    assert (launch.returncode, tokens) == (0, expected)
    wait_until_gone(pids)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_under_torchrun_ends_the_launch(child, tmp_path, victim):
    with under_torchrun(tmp_path / "script.py", 2, child) as launch:
        assert launch.stdout is not None
        pids = json.loads(launch.stdout.readline())
        os.kill(pids[victim], signal.SIGKILL)
        launch.communicate(timeout=60)
    assert launch.returncode != 0
    wait_until_gone(pids)


@pytest.mark.slow
def test_torchrun_with_another_number_of_ranks_is_an_error(child, tmp_path):
    with under_torchrun(tmp_path / "script.py", 4, child) as launch:
        _, err = launch.communicate(timeout=120)
    assert "tensor_parallel_size: torchrun started more or fewer (found 4, expected 2)" in err


@pytest.mark.slow
def test_a_rank_killed_while_loading_is_an_error_not_a_wait(child):
    import threading

    def kill_the_follower() -> None:
        me = psutil.Process()
        found: list[psutil.Process] = []
        while not found:
            found = [p for p in me.children() if p.environ().get("RANK") == "1"]
        found[0].kill()

    killer = threading.Thread(target=kill_the_follower)
    killer.start()
    with pytest.raises(EngineError, match=r"rank 1 .*was killed by SIGKILL"):
        LLM(child, tensor_parallel_size=2, **ARGS)
    killer.join()


@pytest.mark.slow
def test_a_front_that_was_stopped_with_its_ranks_accuses_nobody(child):
    code = (
        "from puzzle_trtllm.serve.runtimes.reference import LLM, SamplingParams\n"
        f"llm = LLM({str(child)!r}, tensor_parallel_size=2, **{ARGS!r})\n"
        "request = llm.generate_async([9] * 20, SamplingParams(max_tokens=450, ignore_eos=True))\n"
        "print('running', flush=True)\n"
        "print(len(request.result().outputs[0].token_ids))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        front = psutil.Process(process.pid)
        everyone = [*front.children(), front]
        for one in everyone:
            one.suspend()
        time.sleep(12)
        for one in reversed(everyone):  # the ranks as late as can be
            one.resume()
            time.sleep(1)
        assert process.stdout.readline() == "450\n"


@pytest.mark.slow
def test_a_stopped_rank_that_wakes_up_goes_on(child, expected):
    with LLM(child, tensor_parallel_size=2, **ARGS) as llm:
        follower = psutil.Process(pids_of(llm)[1])
        follower.suspend()
        requests = [llm.generate_async(prompt, PARAMS) for prompt in prompts()]
        time.sleep(5)
        assert not any(request.finished for request in requests)
        follower.resume()
        assert [request.result(timeout=60).outputs[0].token_ids for request in requests] == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        {"tensor_parallel_size": 4},
        {"tensor_parallel_size": 4, "moe_expert_parallel_size": 2},
        {"tensor_parallel_size": 8, "moe_expert_parallel_size": 8},
        {"tensor_parallel_size": 8, "moe_tensor_parallel_size": 8},
    ],
    ids=str,
)
def test_four_and_eight_ranks_generate_what_one_generates(child, expected, sizes):
    with LLM(child, **sizes, **ARGS) as llm:
        assert generate(llm) == expected
        assert len(set(pids_of(llm))) == sizes["tensor_parallel_size"]


@pytest.mark.parametrize(
    ("llm_args", "message"),
    [
        (
            {"tensor_parallel_size": 3},
            r"tensor_parallel_size: impossible parallelism .found 3, expected a divisor of the 16 attention heads",
        ),
        (
            {"tensor_parallel_size": 16, "moe_expert_parallel_size": 16},
            "moe_expert_parallel_size: .*a divisor of the 8 experts of layer 1",
        ),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size: .*found 2, expected 1: the reference runtime"),
        (
            {"tensor_parallel_size": 2, "enable_attention_dp": True},
            "enable_attention_dp: .*expected false: the reference runtime deals out attention heads",
        ),
    ],
)
def test_impossible_parallelism_is_one_line_before_any_process_starts(child, llm_args, message):
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    with pytest.raises(EngineError, match=message) as caught:
        LLM(child, **llm_args, **ARGS)
    assert "\n" not in str(caught.value)
    assert {process.pid for process in psutil.Process().children(recursive=True)} <= before
