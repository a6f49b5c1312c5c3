"""What long prompts cost streams is found in the times of their tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.client import ServerError
from benchmarks.long_prompts import Round, problems, sum_up
from benchmarks.metrics import RequestRecord

# Ten tokens a second for four seconds, then two a second beside the prompts, then ten again.
TIMES = [0.1 * n for n in range(41)] + [4.5, 5.0, 5.5, 6.0] + [6.0 + 0.1 * n for n in range(1, 11)]
STREAM = RequestRecord(0.0, TIMES[-1], TIMES, 64, len(TIMES))
PROMPTS = [RequestRecord(4.0, end, [end], 7000, 1) for end in (5.0, 6.0)]


def test_gaps_count_where_they_are() -> None:
    one = sum_up([STREAM], PROMPTS, 0.5)
    assert one.alone == pytest.approx(0.1)
    assert one.beside == pytest.approx([0.5] * 4)
    assert one.slowdown == pytest.approx(5.0)
    assert one.prompt_speed == pytest.approx(7000.0)
    assert one.others == 0.5


def test_a_round_that_says_nothing_is_refused() -> None:
    with pytest.raises(ServerError, match="1 requests failed: no"):
        sum_up([replace(STREAM, error="no")], PROMPTS, 0.0)
    with pytest.raises(ServerError, match="streams ended before the prompts were computed"):
        sum_up([replace(STREAM, end=5.5)], PROMPTS, 0.0)
    with pytest.raises(ServerError, match="no stream had settled"):
        sum_up([STREAM], [replace(one, start=0.5) for one in PROMPTS], 0.0)


def test_bars() -> None:
    def round_of(slowdown: float, speed: float) -> list[Round]:
        return [Round(0.1, [0.1, 0.1 * slowdown, 1.0, 1.0], speed, 0.0)]

    fast = round_of(90.0, 1000.0)
    assert problems({"default": round_of(4.9, 710.0), "chunks of 512": fast}) == []
    assert problems({"default": round_of(5.1, 690.0), "chunks of 512": fast}) == [
        "a token beside the prompts takes 5.10 times as long",
        "prompts have 0.69 times the tokens/s of those in chunks of 512",
    ]
