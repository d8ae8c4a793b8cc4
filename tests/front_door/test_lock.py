"""The lock: exact, nothing local, what its source pins, and made from pip's own report."""

from __future__ import annotations

from requirements import lock
from tests.front_door.cli import ROOT


def test_the_lock_is_exact_and_has_nothing_local() -> None:
    text = (ROOT / "requirements" / "cpu-py311.txt").read_text(encoding="utf-8")
    pins = [line for line in text.splitlines() if not line.startswith("#")]
    assert len(pins) > 50
    for pin in pins:
        name, separator, version = pin.partition("==")
        assert separator, pin
        assert version[0].isdigit(), pin
        assert not set("+@/ ;") & set(pin), pin
        assert name not in ("pip", "puzzle-trtllm")


def test_the_lock_holds_what_its_source_pins() -> None:
    source = (ROOT / "requirements" / "cpu-py311.in").read_text(encoding="utf-8").splitlines()
    wanted = {line.replace("[grpc]", "") for line in source if "==" in line and not line.startswith("#")}
    assert len(wanted) > 10
    assert wanted <= set((ROOT / "requirements" / "cpu-py311.txt").read_text(encoding="utf-8").splitlines())


def test_a_lock_from_pips_report() -> None:
    versions = {"torch": "2.13.0+cpu", "Jinja2": "3.1.6", "typing_extensions": "4.16.0", "typing-inspect": "0.9.0"}
    report = {"install": [{"metadata": {"name": name, "version": version}} for name, version in versions.items()]}
    assert lock.pins(report) == ["Jinja2==3.1.6", "torch==2.13.0", "typing_extensions==4.16.0", "typing-inspect==0.9.0"]
