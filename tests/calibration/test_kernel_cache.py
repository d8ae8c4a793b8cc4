"""The limit on oneDNN's compiled kernels: set by the commands for their own process, and never over the user's own."""

from __future__ import annotations

import os

import pytest

from puzzle_trtllm.calibration import experts, kv
from puzzle_trtllm.calibration.kernel_cache import KEPT_KERNELS, VARIABLE
from tests.front_door.cli import invoke


@pytest.mark.parametrize("command", ["experts", "kv"])
@pytest.mark.parametrize(("given", "expected"), [(None, str(KEPT_KERNELS)), ("7", "7")])
def test_the_commands_set_it_unless_the_user_did(monkeypatch, command, given, expected):
    found: list[str | None] = []

    def tell(*_: object, **__: object) -> None:
        found.append(os.environ.get(VARIABLE))
        raise KeyboardInterrupt

    monkeypatch.setattr(experts, "calibrate_experts", tell)
    monkeypatch.setattr(kv, "calibrate_kv", tell)
    monkeypatch.setenv(VARIABLE, given or "")  # so that what the command sets does not stay
    if given is None:
        monkeypatch.delenv(VARIABLE)
    assert invoke("calibrate", command, "folder", "out").exit_code == 130
    assert found == [expected]
