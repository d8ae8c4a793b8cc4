"""How numbers are written for people, the same way in the terminal and on the page."""

from __future__ import annotations

import math

from puzzle_trtllm.serve.metrics.statistics import Ratio

NONE = "–"


def show_bytes(count: float) -> str:
    """Binary units, three significant digits: 60.8 GiB, 1.24 MiB, 512 B."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1000 or unit == "TiB":
            break
        count /= 1024
    digits = 0 if unit == "B" or abs(count) >= 100 else 1 if abs(count) >= 10 else 2
    return f"{count:,.{digits}f} {unit}"


def show_number(value: float) -> str:
    """Three significant digits below 1000, whole numbers above: 0.0123, 0.123, 4.56, 78.9, 1,235."""
    size = abs(value)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    if 0 < size < 0.1:
        digits = 2 - math.floor(math.log10(size))
    return f"{value:,.{digits}f}"


def show_ratio(ratio: Ratio | None) -> str:
    """1.83×, or a dash when there is none."""
    return NONE if ratio is None or ratio.value is None else f"{ratio.value:.2f}×"


def show_interval(ratio: Ratio | None) -> str:
    """`1.70 to 1.95`, the ratio's 95% interval; nothing when it has none."""
    interval = None if ratio is None else ratio.interval
    if interval is None or interval.low is None or interval.high is None:
        return ""
    return f"{interval.low:.2f} to {interval.high:.2f}"


def show_percents(low: float, high: float) -> str:
    """`98.8 to 99.2%`, an interval with the digits of what lies in it."""
    return f"{100 * low:.1f} to {show_percent(high)}"


def show_percent(value: float | None, *, digits: int = 1) -> str:
    return NONE if value is None else f"{value:.{digits}%}"
