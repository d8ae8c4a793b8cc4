"""How much memory this machine has left for us. In a container its limit counts as well."""

from __future__ import annotations

from pathlib import Path


def free_memory_bytes(*, meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Memory that can be taken without swapping, within the control group's limit; None where nobody says."""
    try:
        lines = meminfo.read_text().splitlines()
        free_bytes = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    try:
        limit, used = (int((cgroup / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no control group, or "max": no limit
        return free_bytes
    return min(free_bytes, max(0, limit - used + int(stat.get("inactive_file", 0))))  # unused page cache is given back
