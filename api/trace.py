"""GET /debug/trace: the last steps in the JSON form of Chrome's traces, for ui.perfetto.dev and chrome://tracing.

A process an engine; in it a track for the steps and one for each sample of a request: what it computed in which step,
and in between how long it waited, and for what.
"""

from __future__ import annotations

import asyncio
from array import array
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from api.errors import ApiError, retry_later
from api.keys import client_of
from api.service import Service
from engine.core.step_trace import Trace, TracedSequence

MAX_SECONDS = 600.0

MAX_PRIORITIES, LARGEST = 16, 2**63
"""How many priorities are told apart, and what stands for the others."""

REASONS = {
    "blocks": "no blocks are free",
    "budget": "the step's tokens are taken",
    "places": "the batch's places are taken",
    "hashing": "other prompts are hashed",
    "preemption": "others' blocks were taken back",
    "prefix": "its prefix is computed by another",
    "leader": "its first sample's prompt is computed",
    "pending": "its last token is in flight",
    "": "the next step",
}
"""Why a sequence waits."""

PRIORITY = "smaller priorities go first"

Event = dict[str, Any]


async def create_trace(
    service: Service, http_request: Request, turn: asyncio.Lock, sees_all: bool
) -> Response:
    """Answers with the trace of the last seconds.

    Args:
        turn: One trace is made at a time: it takes a second of a core.
        sees_all: Whether the ids of all requests are shown; else those of the key's own.
    """
    text = http_request.query_params.get("seconds", "30")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds <= MAX_SECONDS:
        raise ApiError(
            400, f"seconds must be above 0 and at most {MAX_SECONDS:g}, got {text!r}", param="seconds"
        )
    service.check_alive()
    owner = None if sees_all else client_of(http_request).share
    if turn.locked():
        raise retry_later(503, "another trace is being made", "overloaded", 2)
    async with turn:
        traces = await service.engine.traces(seconds)
        # In a thread: there may be many rows.
        body = await asyncio.to_thread(_encode, traces, owner)
    return Response(body, media_type="application/json")


def _encode(traces: list[Trace], owner: str | None) -> bytes:
    events = [
        event for process, trace in enumerate(traces, 1) for event in trace_events(trace, process, owner)
    ]
    return msgspec.json.encode({"traceEvents": events, "displayTimeUnit": "ms"})


def trace_events(trace: Trace, process: int, owner: str | None) -> Iterator[Event]:
    """The events of one engine; times are microseconds.

    Args:
        owner: Whose requests have their ids; None: all.
    """
    yield _named("process_name", f"engine {process}", process, 0)
    yield _named("thread_name", "steps", process, 0)
    rows: defaultdict[int, list[tuple[int, int, int]]] = defaultdict(list)
    for step in trace.steps:
        done = step.done or trace.now
        numbers = array("q", step.rows)
        pairs = list(zip(numbers[::2], numbers[1::2], strict=True))
        for number, num_tokens in pairs:
            rows[number].append((step.planned, done, num_tokens))
        arguments: dict[str, int | str] = {"rows": len(pairs), "tokens": sum(numbers[1::2])}
        if step.obstacle:
            arguments["the next waits"] = REASONS[step.obstacle]
        yield _slice("step", step.planned, done, process, 0, arguments)
    waits = _Waits(trace)
    # Threads are numbered from 1: 0 has the steps.
    for sequence in trace.sequences:
        is_own = owner is None or sequence.owner == owner
        name = f"{sequence.request_id} [{sequence.index}]" if is_own else "a request of another key"
        yield _named("thread_name", name, process, sequence.number + 1)
        yield from _track(trace, sequence, rows[sequence.number], waits, process)


class _Waits:
    """Why sequences waited, in any interval."""

    def __init__(self, trace: Trace) -> None:
        # When steps were planned that did not admit who was next, by why and by the priority of that.
        self._times: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
        # Clients choose priorities: those of few steps are not told apart.
        often = Counter(step.priority for step in trace.steps).most_common(MAX_PRIORITIES)
        kept = {priority for priority, _ in often}
        for step in trace.steps:
            priority = step.priority if step.priority in kept else LARGEST
            self._times[step.obstacle, priority].append(step.planned)
        self._moments: defaultdict[int, list[tuple[int, str]]] = defaultdict(list)
        for moment in trace.moments:
            self._moments[moment.number].append((moment.at, moment.what))

    def reasons(self, sequence: TracedSequence, start: int, end: int) -> Counter[str]:
        """In how many steps of the interval it waited for what."""
        for at, what in reversed(self._moments[sequence.number]):
            if start <= at < end and what in REASONS:
                return Counter({REASONS[what]: 1})
        counts: Counter[str] = Counter()
        for (obstacle, priority), times in self._times.items():
            count = bisect_left(times, end) - bisect_left(times, start)
            if count:
                counts[PRIORITY if priority < sequence.priority else REASONS[obstacle]] += count
        return counts

    def was_preempted(self, sequence: TracedSequence, start: int, end: int) -> bool:
        return any(what == "preempted" and start <= at <= end for at, what in self._moments[sequence.number])


def _track(
    trace: Trace,
    sequence: TracedSequence,
    rows: list[tuple[int, int, int]],
    waits: _Waits,
    process: int,
) -> Iterator[Event]:
    """What one sequence computed, and its waits between."""
    tid = sequence.number + 1
    end = sequence.ended or trace.now
    first = trace.steps[0].planned if trace.steps else end
    at = max(sequence.began, min(first, end))
    for planned, done, num_tokens in [*rows, (end, end, 0)]:
        # Between two steps in a row there is what the engine does besides.
        reasons = waits.reasons(sequence, at, planned) if planned > at else Counter()
        if reasons:
            [(reason, _)] = reasons.most_common(1)
            preempted = {"preempted": True} if waits.was_preempted(sequence, at, planned) else {}
            yield _slice(f"waits: {reason}", at, planned, process, tid, {**reasons, **preempted})
        if num_tokens:
            name = "decode" if num_tokens == 1 else f"prefill {num_tokens}"
            # Of steps that overlap each begins, on a track, where the one before ends.
            yield _slice(name, max(at, planned), done, process, tid, {"tokens": num_tokens})
        at = max(at, done)


def _slice(
    name: str, start: int, end: int, process: int, tid: int, arguments: Mapping[str, int | str]
) -> Event:
    return {
        "name": name,
        "ph": "X",
        "ts": start / 1e3,
        "dur": max(0, end - start) / 1e3,
        "pid": process,
        "tid": tid,
        "args": arguments,
    }


def _named(kind: str, name: str, process: int, tid: int) -> Event:
    return {"name": kind, "ph": "M", "pid": process, "tid": tid, "args": {"name": name}}
