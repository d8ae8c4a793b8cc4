"""Reading tritonserver's log when it did not start: the one line that says why."""

from __future__ import annotations

import re
from pathlib import Path

from puzzle_trtllm.errors import ServeError

_OURS = re.compile(r"cannot start: (.*?)(?:\\n|$)", re.MULTILINE)  # the log writes a newline as backslash and n
_TRITON = re.compile(r"^[EF]\d{4} [^\]]*\] (.*)")
_NO_GPU = "CudaDriverHelper"
"""In an error line of every start on a machine without a GPU."""
_TAIL_LINES = 12


def explain_failure(log_file: Path, what: str) -> ServeError:
    """A ServeError with the model's own reason if the log holds one, else with the end of the log."""
    try:
        text = log_file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ServeError(what)
    reason = find_reason(text)
    if reason is not None:
        return ServeError(f"{what}: {reason}", file=log_file)
    tail = "\n  ".join(text.strip().splitlines()[-_TAIL_LINES:])
    return ServeError(f"{what}; the log ends with:\n  {tail}" if tail else f"{what} without a word", file=log_file)


def find_reason(log: str) -> str | None:
    """The model's reason (`cannot start: ...`), else the server's first error."""
    ours = _OURS.search(log)
    if ours is not None:
        return ours.group(1).strip().strip('"')
    for line in log.splitlines():
        theirs = _TRITON.match(line)
        if theirs is not None and _NO_GPU not in line:
            return theirs.group(1).strip().strip('"')
    return None
