"""What the benchmark of load makes of its records."""

from __future__ import annotations

import random
from dataclasses import asdict, replace

from benchmarks.load import is_good, plan_requests, problems, sum_up
from benchmarks.metrics import RequestRecord
from benchmarks.prompts import PromptMaker


def record(start: float, ttft: float, gaps: list[float]) -> RequestRecord:
    times = [start + ttft]
    for gap in gaps:
        times.append(times[-1] + gap)
    return RequestRecord(start, times[-1], times, output_tokens=len(times), scheduled=start, status=200)


GOOD, SLOW = record(0.0, 4.9, [0.1] * 99 + [1.0]), record(0.0, 1.0, [0.1] * 90 + [0.3] * 10)


def test_the_objective_is_about_the_first_token_and_most_of_the_gaps() -> None:
    assert is_good(GOOD)
    assert is_good(record(0.0, 1.0, []))
    assert not is_good(record(0.0, 5.1, [0.1]))
    assert not is_good(SLOW)
    assert not is_good(replace(GOOD, error="HTTP 500"))


def test_refusals_count_among_what_is_not_taken_in() -> None:
    refused = RequestRecord(1.0, 1.0, error="HTTP 429", scheduled=1.0, status=429)
    failed = RequestRecord(1.0, 2.0, error="HTTP 500", scheduled=1.0, status=500)
    phase = sum_up([GOOD, SLOW, refused, failed], rate=1.0)
    assert (phase.num_requests, phase.num_refused, phase.failures) == (4, 1, ["HTTP 500"])
    assert phase.share_good == round(1 / 3, 4)
    assert phase.goodput == round(GOOD.output_tokens / GOOD.end, 1)


def test_bars() -> None:
    full = asdict(sum_up([GOOD] * 20, rate=1.0))
    good = {**full, "goodput": 0.91 * full["goodput"]}
    assert problems(full, good, None) == []
    [missed] = problems(full, {**full, "goodput": 0.89 * full["goodput"]}, None)
    assert "goodput falls to 0.89" in missed
    [missed] = problems(full, {**full, "share_good": 0.9}, None)
    assert "90.0 %" in missed
    held = {"num_descriptors": 50, "num_processes": 2, "num_threads": 19, "num_shared_files": 0}
    soaked = {"whole": full, "before": held, "after": {**held, "num_descriptors": 51}}
    assert problems(full, full, soaked) == ["num_descriptors rose from 50 to 51"]


def test_arrivals_are_as_many_as_asked_for() -> None:
    planned = plan_requests(2000, 4.0, random.Random(0), PromptMaker(0, 0))
    times = [one.arrival or 0.0 for one in planned]
    assert times == sorted(times)
    assert 450 < times[-1] < 550
