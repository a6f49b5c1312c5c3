"""The numbers a serving benchmark reports, computed from what each request saw."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

DEFINITIONS = """\
TTFT  time to first token: request sent -> first chunk with text
ITL   inter-token latency: every gap between two chunks with text, pooled over all requests
TPOT  time per output token: (E2E - TTFT) / (output tokens - 1), one value a request
E2E   request sent -> finish reason received
req/s, tok/s   over the time from the first request's start to the last one's end; token counts are the
      server's own (usage), total = input (cached included) + output; failed requests count nowhere else
prefill tok/s  uncached input tokens / TTFT; decode tok/s: 1 / TPOT; median over requests, per stream"""


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request as its client saw it. Times are in seconds since the scenario began.

    Attributes:
        scheduled: When the arrival trace wanted it sent; None if the client chose.
        start: When it was sent.
        end: When the finish reason arrived, or when it failed.
        text_times: Arrival of every chunk that carried text.
        input_tokens, output_tokens, cached_tokens: From the server's usage; 0 where it reports none.
        error: Why it failed; None if it did not.
        status: Of the answer; None if there was none.
    """

    start: float
    end: float
    text_times: list[float] = field(default_factory=list)
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    scheduled: float | None = None
    error: str | None = None
    status: int | None = None

    @property
    def e2e(self) -> float:
        """Seconds from sending to the finish reason."""
        return self.end - self.start

    @property
    def ttft(self) -> float:
        """Seconds to the first text; to the end if every token's text was empty."""
        return (self.text_times[0] if self.text_times else self.end) - self.start

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first; None with fewer than two tokens."""
        return (self.e2e - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    @property
    def itl(self) -> list[float]:
        """Seconds between successive chunks with text."""
        return [later - earlier for earlier, later in pairwise(self.text_times)]


@dataclass(frozen=True, slots=True)
class Distribution:
    """Mean and percentiles (linear interpolation) of a sample."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Distribution | None:
        """The distribution of `values`; None if there are none."""
        if not values:
            return None
        p50, p90, p99 = np.percentile(values, [50, 90, 99])
        return cls(mean=float(np.mean(values)), p50=float(p50), p90=float(p90), p99=float(p99))


@dataclass(frozen=True, slots=True)
class Summary:
    """What one scenario reports: times in seconds, rates per second, None where nothing was measured."""

    num_requests: int
    num_failed: int
    duration: float
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    requests_per_second: float
    output_tokens_per_second: float
    total_tokens_per_second: float
    ttft: Distribution | None
    itl: Distribution | None
    tpot: Distribution | None
    e2e: Distribution | None
    prefill_tokens_per_second: float | None
    decode_tokens_per_second: float | None
    lateness: Distribution | None


def _median(values: Iterable[float]) -> float | None:
    distribution = Distribution.of(list(values))
    return distribution.p50 if distribution else None


def summarize(records: Sequence[RequestRecord]) -> Summary:
    """Sum up one scenario's requests; only those that succeeded enter times and rates."""
    done = [record for record in records if record.error is None]
    duration = max(r.end for r in done) - min(r.start for r in done) if done else 0.0
    input_tokens = sum(r.input_tokens for r in done)
    output_tokens = sum(r.output_tokens for r in done)

    def per_second(amount: int) -> float:
        return amount / duration if duration > 0 else 0.0

    tpots = [r.tpot for r in done if r.tpot is not None]
    return Summary(
        num_requests=len(records),
        num_failed=len(records) - len(done),
        duration=duration,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        cached_tokens=sum(r.cached_tokens for r in done),
        requests_per_second=per_second(len(done)),
        output_tokens_per_second=per_second(output_tokens),
        total_tokens_per_second=per_second(input_tokens + output_tokens),
        ttft=Distribution.of([r.ttft for r in done]),
        itl=Distribution.of([gap for r in done for gap in r.itl]),
        tpot=Distribution.of(tpots),
        e2e=Distribution.of([r.e2e for r in done]),
        prefill_tokens_per_second=_median(
            (r.input_tokens - r.cached_tokens) / r.ttft for r in done if r.ttft > 0
        ),
        decode_tokens_per_second=_median(1 / tpot for tpot in tpots if tpot > 0),
        lateness=Distribution.of([r.start - r.scheduled for r in done if r.scheduled is not None]),
    )
