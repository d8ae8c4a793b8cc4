"""Several processes, one result: the same files for 1, 2 and 3 ranks, and one line when a rank fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from puzzle_trtllm.calibration import rank_processes
from puzzle_trtllm.calibration import ranks as ranks_module
from puzzle_trtllm.calibration.kv import calibrate_kv
from puzzle_trtllm.calibration.rank_processes import run_ranks
from puzzle_trtllm.calibration.ranks import ALONE, LostRankError, Ranks, joined_ranks, require_enough
from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.errors import CalibrationError, PuzzleError
from tests.calibration import rank_functions
from tests.calibration.fork_server import FORK_SERVER

CHILD = [(6, 5), (4, None), (3, 17), (4, 5)]


def with_data(folder: Path) -> Path:
    """Sequences of several lengths, of which each is a micro-batch; held-out ones among them."""
    rng = np.random.default_rng(0)
    lines = [json.dumps({"input_ids": rng.integers(7, 90, 20 + i % 5).tolist()}) for i in range(24)]
    (folder / "calibration.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def folder(make_checkpoint) -> Path:
    return with_data(make_checkpoint(CHILD, seed=2))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's bytes; the report without the name of the folder that it is in."""
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    report = json.loads(files.pop("kv_report.json"))
    assert report.pop("out") == str(folder)
    return {**files, "kv_report.json": json.dumps(report).encode()}


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("alone") / "out"
    calibrate_kv(folder, out)
    return contents(out)


# -- sharing -----------------------------------------------------------------------------------------------------------


def test_shares_interleave_and_go_back_into_order():
    items = list(range(7))
    shares = [list(Ranks(rank=rank, size=3).share(items)) for rank in range(3)]
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]
    assert ALONE.in_order(list(ALONE.share(items))) == items


@pytest.mark.slow
def test_what_ranks_made_of_their_shares_comes_back_in_order():
    assert run_ranks(2, rank_functions.talk, {}) == [*(f"item {i}" for i in range(5)), "4"]


@pytest.fixture
def forked_ranks(monkeypatch) -> None:
    """Ranks from the fork server, where not their start is tested but what they compute."""
    monkeypatch.setattr(rank_processes.multiprocessing, "get_context", lambda _: FORK_SERVER)


@pytest.mark.parametrize("size", [2, 3])
def test_the_same_files_for_one_rank_and_several(forked_ranks, folder, alone, tmp_path, size):
    """Scales, maxima, report and page; with the layers all in memory for 2 ranks, one by one for 3."""
    calibrate_kv(folder, tmp_path / "out", ranks=size, stream=size == 3)
    assert contents(tmp_path / "out") == alone
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_the_same_files_the_other_way_round(folder, alone, tmp_path, size):
    calibrate_kv(folder, tmp_path / "out", ranks=size, stream=size == 2)
    assert contents(tmp_path / "out") == alone


@pytest.mark.slow
@pytest.mark.parametrize("path", ["--stream", "--no-stream"])
def test_the_same_files_under_torchrun(folder, alone, tmp_path, path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "puzzle_trtllm", "calibrate", "kv", str(folder), str(tmp_path / "out"), path]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == alone
    assert done.stdout.count("Against BF16 KV on held-out text") == 1  # the first rank talks


# -- going on ----------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from puzzle_trtllm.calibration import kv, layer_stream

original = layer_stream._read_all
def read_all(file, *arguments):
    if file.name == "hidden-002" and "rank-1-of-2" in str(file):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(file, *arguments)

layer_stream._read_all = read_all
if __name__ == "__main__":
    kv.calibrate_kv(sys.argv[1], sys.argv[2], stream=True, ranks=2)
"""


@pytest.mark.slow
def test_after_a_kill_the_ranks_agree_where_to_go_on(folder, alone, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    done = subprocess.run(
        [sys.executable, script, folder, tmp_path / "out"], check=False, capture_output=True, text=True
    )
    assert "rank 1: ended without a result (found killed by SIGKILL)" in done.stderr
    left = {path.name: sorted(file.name for file in path.iterdir()) for path in tmp_path.glob(".out.stream*")}
    assert "layer-001.st" in left[".out.stream-rank-1-of-2.partial-resumable"]
    calibrate_kv(folder, tmp_path / "out", ranks=2, stream=True)
    assert contents(tmp_path / "out") == alone


# -- failing -----------------------------------------------------------------------------------------------------------


def test_a_rank_that_is_killed_ends_all_with_one_line():
    with pytest.raises(CalibrationError, match=r"^rank 1: ended without a result \(found killed by SIGKILL\)$"):
        run_ranks(2, rank_functions.die, {})  # the other would stay for longer than pytest waits


def test_a_rank_waits_for_another_longer_than_gloo_would(tmp_path, monkeypatch):
    assert timedelta(days=1) <= ranks_module.PATIENCE
    monkeypatch.setattr(ranks_module, "PATIENCE", timedelta(seconds=0.1))
    with pytest.raises(LostRankError), joined_ranks(f"file://{tmp_path / 'store'}", rank=0, size=2):
        pass


def test_ranks_end_when_the_command_is_killed(tmp_path):
    program = (
        "from puzzle_trtllm.calibration.rank_processes import run_ranks\n"
        "from tests.calibration.rank_functions import work_for_long\n"
        "run_ranks(2, work_for_long, {})\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}  # whoever is killed leaves things there
    command_line = [sys.executable, "-c", program]
    with subprocess.Popen(command_line, env=environment, stdout=subprocess.PIPE, text=True) as command:
        assert [command.stdout.readline() for _ in range(2)] == ["working\n"] * 2
        command.terminate()
        assert command.communicate(timeout=200) == ("", None)  # their stdout is its own: all have ended


def test_ranks_of_one_machine_talk_over_its_loopback_whatever_its_name_means():
    if subprocess.run(["unshare", "--uts", "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs the right to rename a machine, which root does not have in every container")
    program = (
        "from puzzle_trtllm.calibration.rank_processes import run_ranks\n"
        "from tests.calibration.rank_functions import addresses\n"
        "print(run_ranks(2, addresses, {}))\n"
    )
    renamed = ["unshare", "--uts", "sh", "-c", 'hostname nobody.example && exec "$@"', "sh"]
    done = subprocess.run([*renamed, sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("{'127.0.0.1'}\n", "")


def test_ranks_that_have_done_their_part_go_without_a_word(capfd):
    run_ranks(2, rank_functions.be_slow_to_leave, {})
    assert "Traceback" not in capfd.readouterr().err


def test_a_rank_that_is_ended_as_it_answers_goes_at_once_too(tmp_path):
    """It tidied up once more, for which it got 20 seconds."""
    left = tmp_path / "tidied"
    assert run_ranks(1, rank_functions.end_once_it_has_answered, {"tidied": str(left)}) == "done"
    assert not left.exists()


@pytest.mark.slow
def test_a_rank_that_refuses_ends_all_with_its_line():
    """Not with the line of the rank that lost its partner."""
    with pytest.raises(PuzzleError, match=r"^a.txt: not like this \(found 1\)$"):
        run_ranks(2, rank_functions.refuse, {"place": "a.txt"})


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_activations_that_are_not_finite_name_the_layer(make_checkpoint, tmp_path, stream):
    folder = with_data(make_checkpoint(CHILD, seed=2))
    bias = Checkpoint.open(folder).entry("model.layers.2.self_attn.v_proj.bias")
    with bias.file.open("r+b") as file:
        file.seek(bias.offset)
        file.write(np.array([0x7FC0], dtype="<u2").tobytes())
    with pytest.raises(CalibrationError, match=r"model\.layers\.2\.self_attn \(V\): activations are not finite") as e:
        calibrate_kv(folder, tmp_path / "out", ranks=2, stream=stream)
    assert "\n" not in str(e.value)
    assert not list(tmp_path.iterdir())


def test_more_ranks_than_micro_batches():
    with pytest.raises(CalibrationError, match=r"^ranks: too little data to share \(found 3, expected at most 2"):
        require_enough(2, Ranks(rank=1, size=3))
    require_enough(3, Ranks(rank=1, size=3))
