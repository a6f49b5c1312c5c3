"""What is traced of steps: who ran, who waited and for what, in bounded memory."""

from __future__ import annotations

from array import array
from itertools import count

from engine.core.request import Sequence
from engine.core.step_trace import StepTrace, Trace
from tests.core.test_scheduler import make_request, make_scheduler, prompt_of, step


def rows_of(trace: Trace) -> list[dict[int, int]]:
    numbers = [array("q", one.rows) for one in trace.steps]
    return [dict(zip(row[::2], row[1::2], strict=True)) for row in numbers]


def test_steps_have_their_rows_and_why_others_wait() -> None:
    scheduler = make_scheduler(num_blocks=6, max_num_batched_tokens=8, max_num_seqs=2, threshold=8)
    scheduler.add(make_request("a", prompt_of(10), max_tokens=2))
    scheduler.add(make_request("b", prompt_of(4, 200), max_tokens=6))
    scheduler.add(make_request("late", prompt_of(20, 300), priority=3, max_tokens=1))
    while scheduler.has_work:
        step(scheduler)
    trace = scheduler.trace.last(60)
    assert rows_of(trace)[:3] == [{0: 8}, {0: 2, 1: 4}, {0: 1, 1: 1}]
    why = [(one.obstacle, one.head, one.priority) for one in trace.steps]
    # The budget goes first, then both places; where one is free, of six blocks not five are.
    assert why[:3] == [("budget", 1, 0), ("places", 2, 3), ("places", 2, 3)]
    assert ("blocks", 2, 3) in why
    assert why[-1] == ("", -1, 0)
    assert all(one.planned <= one.done for one in trace.steps)
    names = {one.number: (one.request_id, one.index, one.priority) for one in trace.sequences}
    assert names == {0: ("a", 0, 0), 1: ("b", 0, 0), 2: ("late", 0, 3)}
    assert all(one.began <= one.ended for one in trace.sequences)


def test_a_prefix_and_a_preemption_are_told() -> None:
    scheduler = make_scheduler(num_blocks=8, max_num_batched_tokens=12, threshold=8)
    scheduler.add(make_request("a", prompt_of(9), max_tokens=12, ignore_eos=True))
    scheduler.add(make_request("b", [*prompt_of(8), 7, 7], max_tokens=12, n=2, ignore_eos=True))
    while scheduler.has_work:
        step(scheduler)
    what = {(moment.number, moment.what) for moment in scheduler.trace.last(60).moments}
    assert {(1, "prefix"), (2, "leader"), (2, "preempted")} <= what


def test_the_ring_is_bounded_and_knows_who_lives() -> None:
    ticks = count(0, 10**9)
    trace = StepTrace(max_bytes=10_000, clock=lambda: next(ticks))
    lives = Sequence(make_request("lives", [1]), 0, 0, b"")
    trace.begin(lives)
    for number in range(1, 1000):
        other = Sequence(make_request(f"{number}", [1]), 0, number, b"")
        trace.begin(other)
        trace.plan({lives: 1, other: 1}, "", None)
        trace.done()
        trace.note(other, "ended")
        assert trace.num_bytes <= 10_000
    last = trace.last(40)
    assert {one.request_id for one in last.sequences} >= {"lives", "999"}
    assert 5 <= len(last.steps) <= 40
    assert all(one.planned >= last.now - 40 * 10**9 for one in last.steps)
    assert len(trace.last(1e6).steps) < 50
