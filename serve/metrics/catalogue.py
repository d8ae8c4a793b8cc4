"""Every metric of a load run, each with its tag, unit and formula.

Two kinds: a scalar is one number for the run; a distribution is one number per request (or per gap between tokens) and
is reported as mean and percentiles. Latencies of a closed loop are taken over all answered requests of the run: each
was sent while the load was held; those of an open loop over the answered requests that arrived in the window.
Conventions that differ between tools, and what is done here:

- ITL of a response that brings k tokens is gap / k, k times (a server with `stream_interval` k sends k at once);
  the tokens after the first one in a first response have no gap.
- TPOT leaves the first token out: (last token - first token) / (tokens - 1). Tokens that all came in one response say
  nothing about it, and a TPOT of 0 would pass for the fastest of all.
- output_tokens_per_s is that of the steady window; other tools divide all tokens by the whole run's time, idle tail
  included, which is run_output_tokens_per_s.
- requests_per_s is output_tokens_per_s / mean_output_tokens, so that it can be formed for other mean lengths too (the
  request-level efficiency of a reasoning effort); what an evaluation run completes is `measured_requests_per_s`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from puzzle_trtllm.errors import BenchError
from puzzle_trtllm.serve.metrics.records import RequestCounts, RequestRecord
from puzzle_trtllm.serve.metrics.statistics import Distribution
from puzzle_trtllm.serve.metrics.window import NANOSECONDS_PER_SECOND, SteadyWindow, open_window, steady_window

NANOSECONDS_PER_MILLISECOND = 1_000_000


@dataclass(frozen=True, kw_only=True)
class LatencyLimits:
    """Limits that users would notice, ms; None is no limit. A request of one response has no gap to exceed."""

    max_ttft_ms: float | None = None
    max_tpot_ms: float | None = None
    """On the mean gap between a request's tokens, not on each gap."""

    def __bool__(self) -> bool:
        return self.max_ttft_ms is not None or self.max_tpot_ms is not None

    def met_by(self, record: RequestRecord) -> bool:
        """True for a completed request within all limits; a truncated one is no good answer, however fast."""
        limited = ((self.max_ttft_ms, _ttft_ms), (self.max_tpot_ms, _tpot_ms))
        return record.status == "completed" and all(
            value <= limit for limit, values in limited if limit is not None for value in values(record)
        )


@dataclass(frozen=True, kw_only=True)
class MeasuredLoad:
    """What a run left behind: its requests, and the window in which the load was held."""

    records: tuple[RequestRecord, ...]
    window: SteadyWindow
    num_gpus: int = 0
    """GPUs of the server; 0 on a CPU or when unknown."""
    limits: LatencyLimits = LatencyLimits()
    """What a request must meet to count as goodput."""
    arrivals_in_window_only: bool = False
    """True for an open loop: requests that arrived outside the window count as tokens and load, not as latencies."""

    @classmethod
    def of(
        cls,
        records: Sequence[RequestRecord],
        *,
        concurrency: int,
        num_gpus: int = 0,
        limits: LatencyLimits = LatencyLimits(),
    ) -> MeasuredLoad:
        """Raises BenchError when no request was answered or the load was never held."""
        _require_answers(records)
        window = steady_window(records, concurrency=concurrency)
        return cls(records=tuple(records), window=window, num_gpus=num_gpus, limits=limits)

    @classmethod
    def of_open_loop(
        cls,
        records: Sequence[RequestRecord],
        *,
        num_gpus: int = 0,
        limits: LatencyLimits = LatencyLimits(),
    ) -> MeasuredLoad:
        """Raises BenchError when no request that arrived in the window was answered, or there is no window."""
        _require_answers(records)
        window = open_window(records)
        load = cls(
            records=tuple(records), window=window, num_gpus=num_gpus, limits=limits, arrivals_in_window_only=True
        )
        if not load.answered:
            raise BenchError("no request that arrived in the steady window was answered", key="num_requests")
        return load

    @property
    def counted(self) -> list[RequestRecord]:
        """The requests that count, however they ended."""
        if not self.arrivals_in_window_only:
            return list(self.records)
        return [record for record in self.records if self.window.holds(record.sent_ns)]

    @property
    def answered(self) -> list[RequestRecord]:
        """The requests whose lengths and latencies count."""
        return [record for record in self.counted if record.is_answered]

    @property
    def good(self) -> list[RequestRecord]:
        """The requests within all limits."""
        return [record for record in self.answered if self.limits.met_by(record)]


def _require_answers(records: Sequence[RequestRecord]) -> None:
    counts = RequestCounts.of(records)
    if not counts.answered:
        first = next((record.error for record in records if record.error), "no reason given")
        raise BenchError(f"zero successful requests ({counts}); the first says: {first}")


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What a metric is, apart from how it is computed."""

    tag: str
    unit: str
    formula: str
    prerequisite: str
    """What must be there for it to exist; the message when it is not."""


@dataclass(frozen=True, kw_only=True)
class ScalarMetric(Metric):
    """One number a run."""

    compute: Callable[[MeasuredLoad], float | None]
    """None when the prerequisite does not hold."""

    def of(self, load: MeasuredLoad) -> float:
        """Raises BenchError when the prerequisite does not hold."""
        value = self.compute(load)
        if value is None:
            raise BenchError(f"cannot be computed: {self.prerequisite}", key=self.tag)
        return value


@dataclass(frozen=True, kw_only=True)
class DistributionMetric(Metric):
    """One number a request, or several."""

    values: Callable[[RequestRecord], Iterable[float]]

    def of(self, load: MeasuredLoad) -> Distribution:
        """Raises BenchError when no request has a value."""
        sample = [value for record in load.answered for value in self.values(record)]
        if not sample:
            raise BenchError(f"cannot be computed: {self.prerequisite}", key=self.tag)
        return Distribution.of(sample)


def _output_tokens_per_s(load: MeasuredLoad) -> float | None:
    tokens = load.window.count_tokens(load.records)
    return tokens / load.window.seconds if tokens else None


def _output_tokens_per_s_per_gpu(load: MeasuredLoad) -> float | None:
    return OUTPUT_TOKENS_PER_S.of(load) / load.num_gpus if load.num_gpus else None


def _run_output_tokens_per_s(load: MeasuredLoad) -> float | None:
    tokens = sum(record.num_output_tokens for record in load.records if record.is_answered)
    run_ns = max(record.end_ns for record in load.records) - min(record.sent_ns for record in load.records)
    return tokens / run_ns * NANOSECONDS_PER_SECOND if run_ns else None


def _mean_output_tokens(load: MeasuredLoad) -> float:
    return sum(record.num_output_tokens for record in load.answered) / len(load.answered)


def _requests_per_s(load: MeasuredLoad) -> float:
    return OUTPUT_TOKENS_PER_S.of(load) / MEAN_OUTPUT_TOKENS.of(load)


def _goodput_fraction(load: MeasuredLoad) -> float | None:
    return len(load.good) / len(load.counted) if load.limits else None


def _goodput_requests_per_s(load: MeasuredLoad) -> float | None:
    return REQUESTS_PER_S.of(load) * len(load.good) / len(load.answered) if load.limits else None


def _ttft_ms(record: RequestRecord) -> Iterator[float]:
    yield (record.first_token_ns - record.sent_ns) / NANOSECONDS_PER_MILLISECOND


def _itl_ms(record: RequestRecord) -> Iterator[float]:
    """Gaps between responses, shared out over the tokens that the later response brings."""
    previous_ns, tokens = record.first_token_ns, 0
    for index, time_ns in enumerate(record.token_times_ns):
        if time_ns == record.first_token_ns:
            continue
        tokens += 1
        is_last_of_response = index + 1 == record.num_output_tokens or record.token_times_ns[index + 1] != time_ns
        if is_last_of_response:
            gap_ms = (time_ns - previous_ns) / tokens / NANOSECONDS_PER_MILLISECOND
            yield from [gap_ms] * tokens
            previous_ns, tokens = time_ns, 0


def _tpot_ms(record: RequestRecord) -> Iterator[float]:
    if decode_ns := record.token_times_ns[-1] - record.first_token_ns:
        yield decode_ns / (record.num_output_tokens - 1) / NANOSECONDS_PER_MILLISECOND


def _tokens_per_s_per_user(record: RequestRecord) -> Iterator[float]:
    for tpot_ms in _tpot_ms(record):
        yield 1000 / tpot_ms


def _e2e_ms(record: RequestRecord) -> Iterator[float]:
    yield (record.end_ns - record.sent_ns) / NANOSECONDS_PER_MILLISECOND


OUTPUT_TOKENS_PER_S = ScalarMetric(
    tag="output_tokens_per_s",
    unit="tok/s",
    formula="generated tokens that arrived in the steady window / its seconds",
    prerequisite="no token arrived in the steady window",
    compute=_output_tokens_per_s,
)
OUTPUT_TOKENS_PER_S_PER_GPU = ScalarMetric(
    tag="output_tokens_per_s_per_gpu",
    unit="tok/s/GPU",
    formula="output_tokens_per_s / GPUs of the server",
    prerequisite="the server's number of GPUs is 0 or unknown",
    compute=_output_tokens_per_s_per_gpu,
)
RUN_OUTPUT_TOKENS_PER_S = ScalarMetric(
    tag="run_output_tokens_per_s",
    unit="tok/s",
    formula="generated tokens of answered requests / from the first request sent to the last end",
    prerequisite="requests end in the instant they are sent",
    compute=_run_output_tokens_per_s,
)
MEAN_OUTPUT_TOKENS = ScalarMetric(
    tag="mean_output_tokens",
    unit="tokens",
    formula="generated tokens / requests, over answered requests",
    prerequisite="no request was answered",
    compute=_mean_output_tokens,
)
REQUESTS_PER_S = ScalarMetric(
    tag="requests_per_s",
    unit="requests/s",
    formula="output_tokens_per_s / mean_output_tokens",
    prerequisite="no request was answered",
    compute=_requests_per_s,
)
GOODPUT_FRACTION = ScalarMetric(
    tag="goodput_fraction",
    unit="of requests",
    formula="good: completed requests with TTFT <= max_ttft_ms and TPOT <= max_tpot_ms / requests, failed ones too",
    prerequisite="the load sets no latency limit",
    compute=_goodput_fraction,
)
GOODPUT_REQUESTS_PER_S = ScalarMetric(
    tag="goodput_requests_per_s",
    unit="requests/s",
    formula="requests_per_s * good requests / answered requests",
    prerequisite="the load sets no latency limit",
    compute=_goodput_requests_per_s,
)
TTFT_MS = DistributionMetric(
    tag="ttft_ms",
    unit="ms",
    formula="time to first token: first token - sent",
    prerequisite="no request was answered",
    values=_ttft_ms,
)
ITL_MS = DistributionMetric(
    tag="itl_ms",
    unit="ms",
    formula="inter-token latency: gap between consecutive responses / tokens in the later one, per token",
    prerequisite="no request streamed two responses",
    values=_itl_ms,
)
TPOT_MS = DistributionMetric(
    tag="tpot_ms",
    unit="ms",
    formula="time per output token: (last token - first token) / (tokens - 1), per request",
    prerequisite="no request streamed two responses",
    values=_tpot_ms,
)
TOKENS_PER_S_PER_USER = DistributionMetric(
    tag="tokens_per_s_per_user",
    unit="tok/s/user",
    formula="interactivity: 1000 / TPOT in ms, per request",
    prerequisite="no request streamed two responses",
    values=_tokens_per_s_per_user,
)
E2E_MS = DistributionMetric(
    tag="e2e_ms",
    unit="ms",
    formula="end-to-end latency: end of the answer's stream - sent",
    prerequisite="no request was answered",
    values=_e2e_ms,
)

SCALARS = (
    OUTPUT_TOKENS_PER_S,
    OUTPUT_TOKENS_PER_S_PER_GPU,
    RUN_OUTPUT_TOKENS_PER_S,
    MEAN_OUTPUT_TOKENS,
    REQUESTS_PER_S,
    GOODPUT_FRACTION,
    GOODPUT_REQUESTS_PER_S,
)
DISTRIBUTIONS = (TTFT_MS, ITL_MS, TPOT_MS, TOKENS_PER_S_PER_USER, E2E_MS)
METRICS: Mapping[str, Metric] = {metric.tag: metric for metric in (*SCALARS, *DISTRIBUTIONS)}


@dataclass(frozen=True, kw_only=True)
class MetricValues:
    """All metrics of one load, and why the ones that are missing are."""

    scalars: Mapping[str, float]
    distributions: Mapping[str, Distribution]
    absent: Mapping[str, str]


def compute_metrics(load: MeasuredLoad) -> MetricValues:
    """Compute the whole catalogue. A metric without its prerequisite is listed under `absent`, never set to 0.

    Raises BenchError when even the output throughput cannot be computed.
    """
    OUTPUT_TOKENS_PER_S.of(load)
    scalars: dict[str, float] = {}
    distributions: dict[str, Distribution] = {}
    absent: dict[str, str] = {}
    for scalar in SCALARS:
        try:
            scalars[scalar.tag] = scalar.of(load)
        except BenchError:
            absent[scalar.tag] = scalar.prerequisite
    for distribution in DISTRIBUTIONS:
        try:
            distributions[distribution.tag] = distribution.of(load)
        except BenchError:
            absent[distribution.tag] = distribution.prerequisite
    return MetricValues(scalars=scalars, distributions=distributions, absent=absent)
