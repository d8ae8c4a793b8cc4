"""Small questions to a running server over HTTP."""

from __future__ import annotations

import http.client
import re
import urllib.error
import urllib.request

_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_NO_ANSWER = (OSError, http.client.HTTPException)
"""A server that dies while it answers leaves half a response, which is no OSError."""
_TIMEOUT_S = 2.0
_SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)


def http_status(url: str) -> int | None:
    """The status code of a GET; None where nobody answers."""
    try:
        with _NO_PROXY.open(url, timeout=_TIMEOUT_S) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except _NO_ANSWER:
        return None


def hangs_up(url: str, *, timeout_s: float = _TIMEOUT_S) -> bool:
    """Whether a GET is refused or cut off without a word; who is busy, or has no room, lets callers wait instead."""
    try:
        _NO_PROXY.open(url, timeout=timeout_s).close()
    except urllib.error.URLError as error:
        return isinstance(error.reason, ConnectionError)
    except _NO_ANSWER as error:
        return isinstance(error, ConnectionError)
    return False


def metrics_text(url: str) -> str | None:
    """The page as it is; None where nobody answers."""
    try:
        with _NO_PROXY.open(url, timeout=_TIMEOUT_S) as response:
            return str(response.read().decode())
    except _NO_ANSWER:
        return None


def read_metrics(url: str) -> dict[str, float] | None:
    """Prometheus samples by `name` or `name{labels}`; None where nobody answers. Our own of one instance carry none.

    The label `model` that all our metrics have is left out of the key.
    """
    text = metrics_text(url)
    if text is None:
        return None
    samples = {}
    for name, labels, value in _SAMPLE.findall(text):
        others = [label for label in labels.split(",") if label and not label.startswith("model=")]
        samples[f"{name}{{{','.join(others)}}}" if others else name] = float(value)
    return samples


def values_of(metrics: dict[str, float], name: str) -> list[float]:
    """The samples of one name, whatever their labels: one an instance of the model."""
    return [value for key, value in metrics.items() if key.partition("{")[0] == name]
