"""Lists of processor cores, and processes that keep to them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puzzle_trtllm.cores import other_cores, parse_cores, run_on
from puzzle_trtllm.errors import PuzzleError

OURS = sorted(os.sched_getaffinity(0))


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 5)), min_size=1))
def test_a_list_names_each_core_of_its_ranges_once(ranges):
    text = ",".join(f"{first}-{first + more}" if more else str(first) for first, more in ranges)
    expected = {core for first, more in ranges for core in range(first, first + more + 1)}
    assert parse_cores(text, key="--engine-cores") == sorted(expected)


@pytest.mark.parametrize("text", ["", "a", "1,", "3-1", "-1", "1-2-3", "1;2", "1.5", "999999"])
def test_other_text_is_refused(text):
    with pytest.raises(PuzzleError, match=r"^--engine-cores: not a list of cores \(found '.*', expected such as"):
        parse_cores(text, key="--engine-cores")


def test_the_others_are_those_that_are_left():
    with pytest.raises(PuzzleError, match="k: leaves no core to the server"):
        other_cores(OURS, key="k")
    with pytest.raises(PuzzleError, match=r"k: no such cores here \(found 70000, expected some of"):
        other_cores([OURS[0], 70000], key="k")
    assert other_cores(OURS[1:], key="k") == {OURS[0]}


def test_what_is_started_in_the_block_keeps_to_its_cores_and_we_do_not():
    command = [sys.executable, "-S", "-c", "import os; print(*sorted(os.sched_getaffinity(0)))"]
    for cores, expected in (([OURS[-1]], [OURS[-1]]), (None, OURS)):
        with run_on(cores):
            found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert [int(core) for core in found.split()] == expected
        assert sorted(os.sched_getaffinity(0)) == OURS
