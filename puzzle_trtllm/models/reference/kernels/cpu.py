"""What the processor can do, as Linux names it."""

from __future__ import annotations

from pathlib import Path


def cpu_flags() -> frozenset[str]:
    """The processor's feature flags; empty where /proc/cpuinfo has none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    found = (line.split(":", 1)[1] for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(found, "").split())
