"""What ranks say to each other, between two processes over gloo."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from puzzle_trtllm.models.reference.rank_group import RankGroup

PAYLOADS = [b"", b"x" * 100, *(b"y" * size for size in range(4060, 4100)), b"z" * 100_000]


def take_part(rank: int, meeting: Path) -> list[object]:
    ranks = RankGroup(rank=rank, size=2, local_rank=rank, local_size=2, meeting=f"file://{meeting}")
    heard: list[object] = [ranks.share(payload if rank == 0 else None) for payload in PAYLOADS]
    decided: list[int] = []

    def decide() -> int:
        decided.append(rank)
        if len(decided) == 2:
            raise ValueError("not this one")
        return 7

    for _ in range(3):
        try:
            heard.append(ranks.agree(decide))
        except Exception as error:
            heard.append(f"{type(error).__name__}: {error}")
    assert set(decided) <= {0}
    return heard


@pytest.fixture(scope="module")
def heard(tmp_path_factory) -> list[list[object]]:
    meeting = tmp_path_factory.mktemp("ranks") / "meeting"
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as processes:
        return list(processes.map(take_part, [0, 1], [meeting, meeting]))


def test_what_the_leader_shares_arrives_whatever_its_length(heard):
    for own in heard:
        assert own[: len(PAYLOADS)] == PAYLOADS


def test_what_the_leader_decides_holds_for_all_and_so_does_its_failure(heard):
    assert heard[0][len(PAYLOADS) :] == [7, "ValueError: not this one", 7]
    assert heard[1][len(PAYLOADS) :] == [7, "RuntimeError: ValueError: not this one", 7]
