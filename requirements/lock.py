"""Turn cpu-py311.in into cpu-py311.txt: what pip resolves in one run, as exact versions.

pip resolves without installing (`--dry-run --report`), so nothing of the running environment leaks in: no editable
entry, no local path. torch is written without its local suffix (`+cpu`), which only some indexes offer; the set-up asks
for the CPU build itself where it can be had. Run by `make lock` with Python 3.11.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
HEADER = "# Made by `make lock` from cpu-py311.in with Python 3.11; edit that file, not this one.\n"


def resolve(requirements: Path) -> dict[str, Any]:
    """pip's installation report for `requirements` in an environment where nothing is installed."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "-qq"]
    done = subprocess.run(
        [*command, "--report", "-", "-r", str(requirements)], check=True, stdout=subprocess.PIPE, text=True
    )
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def pins(report: dict[str, Any]) -> list[str]:
    """`name==version` lines, sorted as pip freeze sorts, without local version suffixes."""
    found = {item["metadata"]["name"]: item["metadata"]["version"].split("+")[0] for item in report["install"]}
    return [f"{name}=={version}" for name, version in sorted(found.items(), key=lambda pin: _canonical(pin[0]))]


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> None:
    """Write the lock beside this file."""
    lines = pins(resolve(FOLDER / "cpu-py311.in"))
    (FOLDER / "cpu-py311.txt").write_text(HEADER + "".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"{len(lines)} packages locked in {FOLDER / 'cpu-py311.txt'}")


if __name__ == "__main__":
    main()
