"""The reported numbers against hand-computed ones."""

from dataclasses import astuple

import pytest

from benchmarks.metrics import Distribution, RequestRecord, summarize


def record(start: float, text_times: list[float], end: float, output_tokens: int) -> RequestRecord:
    return RequestRecord(
        start=start,
        end=end,
        text_times=text_times,
        input_tokens=20,
        output_tokens=output_tokens,
        cached_tokens=4,
    )


def test_latencies_of_one_request() -> None:
    # Five tokens in four chunks: ITL counts chunks, TPOT counts tokens.
    one = record(start=1.0, text_times=[1.5, 1.75, 2.25, 2.5], end=2.5, output_tokens=5)
    assert one.ttft == 0.5
    assert one.itl == [0.25, 0.5, 0.25]
    assert one.e2e == 1.5
    assert one.tpot == 0.25


def test_one_token_has_no_time_per_output_token() -> None:
    assert record(0.0, [0.5], 0.5, output_tokens=1).tpot is None


def test_without_text_the_first_token_came_with_the_end() -> None:
    silent = record(1.0, [], 3.0, output_tokens=3)
    assert (silent.ttft, silent.itl) == (2.0, [])


def test_percentiles_interpolate() -> None:
    assert Distribution.of([float(value) for value in range(101)]) == Distribution(50.0, 50.0, 90.0, 99.0)
    two = Distribution.of([1.0, 2.0])
    assert two is not None
    assert astuple(two) == pytest.approx((1.5, 1.5, 1.9, 1.99))
    assert Distribution.of([]) is None


def test_summary_pools_requests_and_leaves_failures_out() -> None:
    summary = summarize(
        [
            record(0.0, [1.0, 1.5], 1.5, output_tokens=2),
            record(2.0, [2.5, 2.75, 4.0], 4.0, output_tokens=8),
            RequestRecord(start=0.0, end=99.0, error="refused"),
        ]
    )
    assert (summary.num_requests, summary.num_failed) == (3, 1)
    assert summary.duration == 4.0
    assert (summary.input_tokens, summary.output_tokens, summary.cached_tokens) == (40, 10, 8)
    assert summary.requests_per_second == 0.5
    assert summary.output_tokens_per_second == 2.5
    assert summary.total_tokens_per_second == 12.5
    assert summary.ttft == Distribution.of([1.0, 0.5])
    assert summary.itl == Distribution.of([0.5, 0.25, 1.25])
    assert summary.tpot == Distribution.of([0.5, 1.5 / 7])
    assert summary.e2e == Distribution.of([1.5, 2.0])
    assert summary.prefill_tokens_per_second == (16 / 1.0 + 16 / 0.5) / 2
    assert summary.decode_tokens_per_second == pytest.approx((2.0 + 7 / 1.5) / 2)
    assert summary.lateness is None


def test_lateness_is_measured_from_the_scheduled_arrival() -> None:
    summary = summarize([RequestRecord(start=1.25, end=2.0, scheduled=1.0)])
    assert summary.lateness == Distribution(0.25, 0.25, 0.25, 0.25)


def test_summary_of_failures_only() -> None:
    summary = summarize([RequestRecord(start=0.0, end=1.0, error="refused")])
    assert (summary.num_failed, summary.requests_per_second, summary.ttft) == (1, 0.0, None)
